"""The Python plugins: shapes, types, fields and what they ask the CUDA launchers for."""

import inspect

import fake_tensorrt
import numpy as np
import pytest

from adm_rt.engines import tensorrt_plugins
from adm_rt.engines.tensorrt_adapter import TensorRT
from adm_rt.errors import EngineError
from adm_rt.export.nodes import NODES, PLUGIN_NAMESPACE, PLUGIN_VERSION, T

# N, H, W, C, groups of the norms; heads, head_dim, length, queries of the attention
N, HEIGHT, WIDTH, C, G = 2, 8, 4, 64, 32
HEADS, DIM, LENGTH, QUERIES = 3, 16, 32, 5
ATTRIBUTES = {"groups": G, "eps": 1e-5, "num_heads": HEADS, "head_dim": DIM, "num_queries": QUERIES}
SHAPES = {
    "N H W C": (N, HEIGHT, WIDTH, C),
    "C": (C,),
    "N 2C": (N, 2 * C),
    "N G": (N, G),
    "N T 3Hd": (N, LENGTH, 3 * HEADS * DIM),
    "N Q Hd": (N, QUERIES, HEADS * DIM),
    "N H 2 Q": (N, HEADS, 2, QUERIES),
}


class Kernels:
    """The launchers' signatures, as the CUDA module has them; records the calls."""

    def __init__(self):
        self.calls = []

    def ada_group_norm_workspace(self, shape, options):
        return self._norm(100, shape, options)

    def ada_group_norm(self, shape, options, inputs, outputs, workspace, stream):
        x, skip, weight, bias, scale_shift, x_moments, skip_moments = inputs
        y, x_out, mean, rstd = outputs
        self._norm(0, shape, options)
        self.calls.append((inputs, outputs, workspace, stream))

    def ada_group_norm_backward_workspace(self, shape, options):
        return self._norm(200, shape, options)

    def ada_group_norm_backward(self, shape, options, inputs, outputs, workspace, stream):
        grad, grad_x_out, x, skip, mean, rstd, weight, bias, scale_shift = inputs
        dx, dskip, dweight, dbias, dscale_shift = outputs
        self._norm(0, shape, options)
        self.calls.append((inputs, outputs, workspace, stream))

    def _norm(self, result, shape, options):
        batch, channels, skip_channels, height, width, groups = shape
        eps, silu, dtype, channels_last, resample, scale_shift_dtype, stride = options
        assert (batch, channels, skip_channels, height, width) == (N, C, 0, HEIGHT, WIDTH)
        assert (groups, channels_last, resample) == (G, True, 0)
        assert (scale_shift_dtype, stride) == (0, 2 * C)
        self.options = (eps, silu, dtype)
        return result

    def qkv_attention(
        self, qkv, out, stats, batch, heads, head_dim, length, num_queries, order, dtype, layout,
        stream,
    ):  # fmt: skip
        sizes = (batch, heads, head_dim, length, num_queries, layout)
        assert sizes == (N, HEADS, DIM, LENGTH, QUERIES, 1)
        self.options = (order, dtype)
        self.calls.append(((qkv,), (out, stats), 0, stream))

    def qkv_attention_backward(
        self, grad, qkv, out, stats, dqkv, workspace, batch, heads, head_dim, length, num_queries,
        order, dtype, layout, stream,
    ):  # fmt: skip
        sizes = (batch, heads, head_dim, length, num_queries, layout)
        assert sizes == (N, HEADS, DIM, LENGTH, QUERIES, 1)
        self.options = (order, dtype)
        self.calls.append(((grad, qkv, out, stats), (dqkv,), workspace, stream))

    def qkv_attention_backward_workspace(self, batch, heads, num_queries):
        assert (batch, heads, num_queries) == (N, HEADS, QUERIES)
        return 300


@pytest.fixture
def trt():
    return fake_tensorrt.make("tensorrt", "10.16.1")


@pytest.fixture
def kernels():
    return Kernels()


@pytest.fixture(params=NODES)
def node(request):
    return NODES[request.param]


@pytest.fixture
def plugin(trt, node, kernels):
    (creator,) = [
        c for c in tensorrt_plugins.plugin_creators(trt, lambda: kernels) if c.name == node.name
    ]
    kinds = {"int": np.int32, "float": np.float32}
    fields = [
        trt.PluginField(name, np.array([ATTRIBUTES[name]], kinds[kind]), None)
        for name, kind in node.attributes.items()
    ]
    text = trt.PluginField("plugin_namespace", np.frombuffer(b"adm_rt", np.uint8), None)
    return creator.create_plugin("layer", [text, *fields], None)


class Desc:
    def __init__(self, trt, shape, kind, format="LINEAR"):
        self.dims = self.max = shape
        self.type, self.format = getattr(trt.DataType, kind), getattr(trt.TensorFormat, format)
        self.desc = self


def descs(trt, tensors, kind):
    return [Desc(trt, SHAPES[d], kind if t == T else "FLOAT") for t, d in tensors.values()]


def test_every_node_has_a_creator_of_its_name(trt):
    creators = tensorrt_plugins.plugin_creators(trt, Kernels)
    assert [c.name for c in creators] == list(NODES)
    for creator, node in zip(creators, NODES.values(), strict=True):
        assert (creator.plugin_namespace, creator.plugin_version) == ("adm_rt", "1")
        assert [f.name for f in creator.field_names] == list(node.attributes)


def test_fields_make_the_same_plugin_again(trt, plugin, node, kernels):
    fields = plugin.get_fields_to_serialize()
    assert {f.name: f.data.dtype.kind for f in fields} == {
        name: kind[0] for name, kind in node.attributes.items()
    }
    again = tensorrt_plugins.plugin_creators(trt, lambda: kernels)[list(NODES).index(node.name)]
    assert again.create_plugin("layer", fields, None).attributes == plugin.attributes
    assert plugin.clone().attributes == plugin.attributes
    copy = plugin.attach_to_context(None)
    assert (copy.plugin_name, copy.num_outputs) == (node.name, len(node.outputs))
    with pytest.raises(ValueError, match=f"{node.name}: the attribute .* is missing"):
        again.create_plugin("layer", list(fields)[:-1], None)


def test_output_shapes_and_types(trt, plugin, node):
    class Builder:
        def constant(self, value):
            return value

    inputs = [trt.DimsExprs(list(SHAPES[d])) for _, d in node.inputs.values()]
    shapes = plugin.get_output_shapes(inputs, [], Builder())
    assert [tuple(s) for s in shapes] == [SHAPES[d] for _, d in node.outputs.values()]
    half, wide = trt.DataType.HALF, trt.DataType.FLOAT
    given = [half if t == T else wide for t, _ in node.inputs.values()]
    expected = [half if t == T else wide for t, _ in node.outputs.values()]
    assert plugin.get_output_data_types(given) == expected


@pytest.mark.parametrize("kind", ["FLOAT", "HALF", "BF16"])
def test_formats(trt, plugin, node, kind):
    tensors = descs(trt, {**node.inputs, **node.outputs}, kind)
    for position, desc in enumerate(tensors):
        check = plugin.supports_format_combination
        assert check(position, tensors, len(node.inputs))
        desc.format = trt.TensorFormat.HWC8
        assert not check(position, tensors, len(node.inputs))
        desc.format, right = trt.TensorFormat.LINEAR, desc.type
        desc.type = trt.DataType.INT32
        assert not check(position, tensors, len(node.inputs))
        if position and kind != "FLOAT":
            desc.type = trt.DataType.FLOAT if right != trt.DataType.FLOAT else trt.DataType.HALF
            assert not check(position, tensors, len(node.inputs))
        desc.type = right


@pytest.mark.parametrize("kind, code", [("FLOAT", 0), ("BF16", 1), ("HALF", 2)])
def test_enqueue_hands_every_address_to_its_place(trt, plugin, node, kernels, kind, code):
    inputs, outputs = descs(trt, node.inputs, kind), descs(trt, node.outputs, kind)
    size = plugin.get_workspace_size(inputs, outputs)
    backward = node.options["direction"] == "backward"
    norm = node.op == "ada_group_norm"
    assert size == {(True, False): 100, (True, True): 200, (False, True): 300}.get(
        (norm, backward), 0
    )
    address = {name: 1000 + i for i, name in enumerate((*node.inputs, *node.outputs))}
    into = [address[n] for n in node.inputs]
    out = [address[n] for n in node.outputs]
    plugin.enqueue(inputs, outputs, into, out, 77, 88)
    ((given, made, workspace, stream),) = kernels.calls
    assert stream == 88 and workspace == (77 if norm or backward else 0)
    a = {**dict.fromkeys(("scale_shift", "mean", "rstd", "stats"), 0), **address}
    if norm:
        eps = 0.0 if backward else pytest.approx(1e-5)
        assert kernels.options == (eps, node.options["silu"], code)
        affine = (a["weight"], a["bias"], a["scale_shift"])
        if backward:
            assert given == (a["grad"], 0, a["x"], 0, a["mean"], a["rstd"], *affine)
            assert made == (a["dx"], 0, 0, 0, 0)
        else:
            assert given == (a["x"], 0, *affine, 0, 0)
            assert made == (a["y"], 0, a["mean"], a["rstd"])
    else:
        assert kernels.options == (["legacy", "new"].index(node.options["order"]), code)
        if backward:
            assert given == (a["grad"], a["qkv"], a["out"], a["stats"])
            assert made == (a["dqkv"],)
        else:
            assert given == (a["qkv"],) and made == (a["out"], a["stats"])


def test_the_cuda_module_has_these_launchers():
    module = pytest.importorskip(
        "adm_rt._cuda", reason="the CUDA module is not built (ADM_RT_CUDA=off)"
    )
    missing = [name for name in tensorrt_plugins.LAUNCHERS if not hasattr(module, name)]
    if missing:
        pytest.skip(f"the CUDA module is of an older build: it has no {missing[0]}")
    for name, function in inspect.getmembers(Kernels, inspect.isfunction):
        if name.startswith("_"):
            continue
        arguments = list(inspect.signature(function).parameters)[1:]
        text = getattr(module, name).__doc__
        found = [text.index(f"{argument}: ") for argument in arguments]
        assert found == sorted(found), f"{name}: {text}"


# ---- which path, and the registry ----


def test_which_path_is_taken(trt, monkeypatch):
    full, rtx = TensorRT(trt), TensorRT(fake_tensorrt.make("tensorrt_rtx", "1.7.1"))
    monkeypatch.setattr(tensorrt_plugins, "cuda_launchers", Kernels)
    assert tensorrt_plugins.choose_ops(full, "auto") == ("plugins", "")
    assert tensorrt_plugins.choose_ops(full, "functions") == ("functions", "")
    ops, why = tensorrt_plugins.choose_ops(rtx, "auto")
    assert ops == "functions" and "takes no plugins" in why
    with pytest.raises(ValueError, match="ops='fast' is unknown.*'plugins'"):
        tensorrt_plugins.choose_ops(full, "fast")
    monkeypatch.setattr(tensorrt_plugins, "cuda_launchers", object)
    assert "older build" in tensorrt_plugins.choose_ops(full, "auto")[1]

    def missing():
        raise ImportError("No module named 'adm_rt._cuda'")

    monkeypatch.setattr(tensorrt_plugins, "cuda_launchers", missing)
    ops, why = tensorrt_plugins.choose_ops(full, "auto")
    assert ops == "functions" and "not built" in why
    with pytest.raises(ImportError, match="ops='plugins'.*ADM_RT_CUDA=on.*ops='functions'"):
        tensorrt_plugins.choose_ops(full, "plugins")


def test_the_registry_has_the_plugins_where_they_are_wanted_and_only_there(trt, monkeypatch):
    monkeypatch.setattr(tensorrt_plugins, "_registered", {})
    monkeypatch.setattr(tensorrt_plugins, "cuda_launchers", Kernels)
    library = TensorRT(trt)

    def count():
        keys = [(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) for name in NODES]
        return sum(key in trt.get_plugin_registry().creators for key in keys)

    with tensorrt_plugins.registered(library, "functions"):
        assert count() == 0
    for _ in range(2):
        with tensorrt_plugins.registered(library, "plugins"):
            assert count() == len(NODES)
    with tensorrt_plugins.registered(library, "functions"):
        assert count() == 0
    assert count() == len(NODES)


def test_plugins_of_a_library_cannot_be_hidden_which_is_said(trt, monkeypatch):
    monkeypatch.setattr(tensorrt_plugins, "_registered", {})
    library, registry = TensorRT(trt), trt.get_plugin_registry()
    tensorrt_plugins.register(library, Kernels)
    fixed = next(c for (name, *_), c in registry.creators.items() if name == "qkv_attention_new")
    fixed.from_library = True
    before = set(registry.creators)
    with pytest.raises(EngineError, match="qkv_attention_new is loaded.*process of its own"):
        with tensorrt_plugins.registered(library, "functions"):
            raise AssertionError("inside")
    assert set(registry.creators) == before  # the others are there again


def test_the_compiled_library_comes_before_the_classes_here(trt, monkeypatch, tmp_path):
    path = tmp_path / "libadm_rt_trt.so"
    path.touch()
    monkeypatch.setattr(tensorrt_plugins, "LIBRARY", path)
    monkeypatch.setattr(tensorrt_plugins, "_registered", {})
    tensorrt_plugins.register(TensorRT(trt))
    tensorrt_plugins.register(TensorRT(trt))
    assert trt.calls == [("library", str(path))]
