"""The nodes of domain "adm_rt" as TensorRT plugins (IPluginV3) that call our CUDA kernels.

Made from the table of ``adm_rt.export.nodes``: one plugin per node, of the same name. Their enqueue
neither allocates nor waits, so it can be captured in a CUDA graph. The library that
``ADM_RT_TENSORRT_INCLUDE`` builds (``csrc/tensorrt``) holds the same plugins in C++, with the same
names, version and serialised fields: an engine made with the one loads with the other. Where it is
there it is taken, because a Python plugin costs time in every call outside a graph.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import numpy as np

from adm_rt.engines import tensorrt_adapter
from adm_rt.errors import EngineError
from adm_rt.export.nodes import NODES, PLUGIN_NAMESPACE, PLUGIN_VERSION, T

LIBRARY = Path(__file__).parents[1] / "libadm_rt_trt.so"
OPS = ("auto", "plugins", "functions")
LAUNCHERS = (
    "ada_group_norm",
    "ada_group_norm_backward",
    "qkv_attention",
    "qkv_attention_backward",
)

_CODES = {"FLOAT": 0, "BF16": 1, "HALF": 2}  # of csrc/common/dtype.h
_ORDERS = ("legacy", "new")
_TOKEN_MAJOR = 1
_registered: dict[str, list] = {}  # module -> creators, which must live as long as the process


def choose_ops(library, ops):
    """("plugins" | "functions", a one-line remark or ""). Raises ValueError, ImportError."""
    if ops not in OPS:
        raise ValueError(f"ops={ops!r} is unknown; allowed: {', '.join(map(repr, OPS))}")
    if ops == "functions":
        return ops, ""
    if library.is_rtx and ops == "auto":
        return "functions", f"{library} takes no plugins: our nodes run as standard operations"
    why = _missing_launchers()
    if not why:
        return "plugins", ""
    if ops == "plugins":
        raise ImportError(
            f"ops='plugins': {why}; build with ADM_RT_CUDA=on, or use ops='functions'"
        )
    return "functions", f"our nodes run as standard operations, without our kernels: {why}"


@contextlib.contextmanager
def registered(library, ops):
    """Within it a parsed or loaded graph finds our plugins ("plugins") or none of them.

    Raises EngineError where plugins of a library are in the way, which TensorRT does not hide.
    """
    if ops == "plugins":
        register(library)
        yield
        return
    hidden = []
    try:
        for name in NODES:
            creator = _find(library, name)
            if creator is None:
                continue
            if not library.registry.deregister_creator(creator):
                raise EngineError(
                    f"ops='functions': a plugin library with {name} is loaded in this process, and "
                    f"{library} would take its plugins; use a process of its own for functions"
                )
            hidden.append(creator)
        yield
    finally:
        for creator in hidden:
            library.registry.register_creator(creator, PLUGIN_NAMESPACE)


def register(library, launchers=None):
    """Register the plugins in the process's registry, once. launchers: for tests."""
    if _registered.get(library.name):
        return
    if launchers is None and LIBRARY.exists():
        handle = tensorrt_adapter.load_plugin_library(library, LIBRARY)
        _registered[library.name] = [handle]
        return
    creators = plugin_creators(library.module, launchers or cuda_launchers)
    for creator in creators:
        library.registry.register_creator(creator, PLUGIN_NAMESPACE)
    _registered[library.name] = creators


def cuda_launchers():
    """The module with the kernels' launchers."""
    return importlib.import_module("adm_rt._cuda")


def _find(library, name):
    return tensorrt_adapter.find_creator(library, name, PLUGIN_VERSION, PLUGIN_NAMESPACE)


def _missing_launchers():
    try:
        module = cuda_launchers()
    except ImportError as error:
        return f"the CUDA kernels are not built ({error})"
    missing = [name for name in LAUNCHERS if not hasattr(module, name)]
    return f"the CUDA module has no {missing[0]}; it is of an older build" if missing else ""


# ---- shapes and launches, of plain numbers ----


def output_shape(node, dims, attributes, first_input):
    """Shape of an output. dims: as in ``Node.outputs``; first_input: the shape of input 0.

    An output with the dimensions of an input has that input's shape: see ``same_shape``.
    """
    sizes = {
        "N": first_input[0],
        "G": attributes.get("groups"),
        "H": attributes.get("num_heads"),
        "Q": attributes.get("num_queries"),
        "Hd": attributes.get("num_heads", 0) * attributes.get("head_dim", 0),
        "2": 2,
    }
    return [sizes[word] for word in dims.split()]


def same_shape(node, dims):
    """Index of the input whose shape an output has, or None."""
    inputs = [own for _, own in node.inputs.values()]
    return inputs.index(dims) if dims in inputs else None


def workspace_bytes(kernels, node, attributes, shapes, dtype):
    """Scratch of one launch. shapes: of the inputs by name; dtype: the code of type T."""
    if node.op == "ada_group_norm":
        shape, options = _norm_arguments(node, attributes, shapes, dtype)
        if node.options["direction"] == "backward":
            return kernels.ada_group_norm_backward_workspace(shape, options)
        return kernels.ada_group_norm_workspace(shape, options)
    if node.options["direction"] == "backward":
        heads, queries = attributes["num_heads"], attributes["num_queries"]
        return kernels.qkv_attention_backward_workspace(shapes["qkv"][0], heads, queries)
    return 0


def launch(kernels, node, attributes, shapes, dtype, pointers, workspace, stream):
    """Enqueue a node. pointers: device addresses of inputs and outputs by name."""
    run = _launch_norm if node.op == "ada_group_norm" else _launch_attention
    run(kernels, node, attributes, shapes, dtype, pointers, workspace, stream)


def _norm_arguments(node, attributes, shapes, dtype):
    batch, height, width, channels = shapes["x"]
    shape = (batch, channels, 0, height, width, attributes["groups"])
    eps = attributes.get("eps", 0.0)  # the backward node has rstd instead
    silu, float32, channels_last, no_resampling = node.options["silu"], 0, True, 0
    options = (eps, silu, dtype, channels_last, no_resampling, float32, 2 * channels)
    return shape, options


def _launch_norm(kernels, node, attributes, shapes, dtype, pointers, workspace, stream):
    shape, options = _norm_arguments(node, attributes, shapes, dtype)
    p = {**dict.fromkeys(("scale_shift", "mean", "rstd"), 0), **pointers}
    affine = (p["weight"], p["bias"], p["scale_shift"])
    if node.options["direction"] == "backward":
        inputs = (p["grad"], 0, p["x"], 0, p["mean"], p["rstd"], *affine)
        outputs = (p["dx"], 0, 0, 0, 0)
        kernels.ada_group_norm_backward(shape, options, inputs, outputs, workspace, stream)
        return
    inputs = (p["x"], 0, *affine, 0, 0)
    outputs = (p["y"], 0, p["mean"], p["rstd"])
    kernels.ada_group_norm(shape, options, inputs, outputs, workspace, stream)


def _launch_attention(kernels, node, attributes, shapes, dtype, pointers, workspace, stream):
    batch, length, _ = shapes["qkv"]
    sizes = (batch, attributes["num_heads"], attributes["head_dim"], length)
    sizes += (attributes["num_queries"], _ORDERS.index(node.options["order"]), dtype, _TOKEN_MAJOR)
    p = {"stats": 0, **pointers}
    if node.options["direction"] == "backward":
        addresses = (p["grad"], p["qkv"], p["out"], p["stats"], p["dqkv"], workspace)
        kernels.qkv_attention_backward(*addresses, *sizes, stream)
    else:
        kernels.qkv_attention(p["qkv"], p["out"], p["stats"], *sizes, stream)


# ---- TensorRT's classes ----


def plugin_creators(trt, launchers):
    """A creator for each node of ``NODES``. trt: the module; launchers() -> the CUDA module."""
    types = {getattr(trt.DataType, name): code for name, code in _CODES.items()}
    field_types = {"int": trt.PluginFieldType.INT32, "float": trt.PluginFieldType.FLOAT32}
    arrays = {"int": np.int32, "float": np.float32}

    class NodePlugin(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        def __init__(self, node, attributes):
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name = node.name
            self.plugin_version = PLUGIN_VERSION
            self.plugin_namespace = PLUGIN_NAMESPACE
            self.num_outputs = len(node.outputs)
            self.node, self.attributes = node, attributes

        def clone(self):
            copy = NodePlugin(self.node, self.attributes)
            copy.__dict__.update(self.__dict__)
            return copy

        def get_capability_interface(self, kind):
            return self

        # build

        def get_output_data_types(self, input_types):
            return [
                input_types[0] if kind == T else trt.DataType.FLOAT
                for kind, _ in self.node.outputs.values()
            ]

        def get_output_shapes(self, inputs, shape_inputs, builder):
            shapes = []
            for _, dims in self.node.outputs.values():
                same = same_shape(self.node, dims)
                if same is not None:
                    shapes.append(trt.DimsExprs(inputs[same]))
                    continue
                sizes = output_shape(self.node, dims, self.attributes, inputs[0])
                shape = trt.DimsExprs(len(sizes))
                for i, size in enumerate(sizes):
                    shape[i] = builder.constant(size) if isinstance(size, int) else size
                shapes.append(shape)
            return shapes

        def supports_format_combination(self, position, tensors, num_inputs):
            kinds = [kind for kind, _ in (*self.node.inputs.values(), *self.node.outputs.values())]
            desc, first = tensors[position].desc, tensors[0].desc
            if desc.format != trt.TensorFormat.LINEAR:
                return False
            if kinds[position] != T:
                return desc.type == trt.DataType.FLOAT
            return desc.type in types and (position == 0 or desc.type == first.type)

        def configure_plugin(self, inputs, outputs):
            pass

        def get_workspace_size(self, inputs, outputs):
            shapes = dict(zip(self.node.inputs, (tuple(tensor.max) for tensor in inputs)))
            code = types[inputs[0].desc.type]
            return workspace_bytes(launchers(), self.node, self.attributes, shapes, code)

        def get_valid_tactics(self):
            return []

        # runtime

        def get_fields_to_serialize(self):
            return trt.PluginFieldCollection(
                [
                    trt.PluginField(
                        name, np.array([self.attributes[name]], arrays[kind]), field_types[kind]
                    )
                    for name, kind in self.node.attributes.items()
                ]
            )

        def on_shape_change(self, inputs, outputs):
            pass

        def set_tactic(self, tactic):
            pass

        def attach_to_context(self, context):
            return self.clone()

        def enqueue(self, input_desc, output_desc, inputs, outputs, workspace, stream):
            names = (*self.node.inputs, *self.node.outputs)
            pointers = dict(zip(names, (*inputs, *outputs), strict=True))
            shapes = dict(zip(self.node.inputs, (tuple(d.dims) for d in input_desc)))
            code = types[input_desc[0].type]
            launch(
                launchers(),
                self.node,
                self.attributes,
                shapes,
                code,
                pointers,
                int(workspace or 0),
                stream,
            )

    class NodeCreator(trt.IPluginCreatorV3One):
        def __init__(self, node):
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.node = node.name, node
            self.plugin_version = PLUGIN_VERSION
            self.plugin_namespace = PLUGIN_NAMESPACE
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, np.array([], arrays[kind]), field_types[kind])
                    for name, kind in node.attributes.items()
                ]
            )

        def create_plugin(self, name, fields, phase):
            given = {field.name: field.data for field in fields}
            missing = [name for name in self.node.attributes if name not in given]
            if missing:
                raise ValueError(f"{self.name}: the attribute {missing[0]!r} is missing")
            kinds = {"int": int, "float": float}
            values = {
                name: kinds[kind](np.asarray(given[name]).reshape(-1)[0])
                for name, kind in self.node.attributes.items()
            }
            return NodePlugin(self.node, values)

    return [NodeCreator(node) for node in NODES.values()]
