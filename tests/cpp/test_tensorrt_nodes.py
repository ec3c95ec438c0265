"""The nodes as the TensorRT plugins launch them against the standard-op functions beside them.

A runtime takes one or the other from the same file, so both must say the same: our CUDA kernels,
under the emulator, through ``csrc/tensorrt/node_launch.cpp``; the functions in ONNX Runtime.
"""

import ctypes

import numpy as np
import pytest

from adm_rt.export.nodes import DOMAIN, NODES, OPS_VERSION, OPSET, T

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'adm_rt[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

N, H, W, C, G = 2, 4, 6, 64, 8
HEADS, DIM, LENGTH = 2, 16, 21
ALL = ("groups", "num_heads", "head_dim", "num_queries")
DTYPES = {"float32": (np.float32, 0, 2e-5), "float16": (np.float16, 2, 4e-3)}


def attributes_of(node, queries):
    values = {"groups": G, "eps": 1e-5, "num_heads": HEADS, "head_dim": DIM, "num_queries": queries}
    return {name: values[name] for name in node.attributes}


def shape_of(dims, queries):
    sizes = {"N": N, "C": C, "2C": 2 * C, "G": G, "T": LENGTH, "Q": queries, "2": 2}
    sizes |= {"H": H if "W" in dims else HEADS, "W": W}
    sizes |= {"Hd": HEADS * DIM, "3Hd": 3 * HEADS * DIM}
    return tuple(sizes[word] for word in dims.split())


def run_function(node, inputs, queries, dtype):
    """The outputs of the node's function in ONNX Runtime, by name."""
    from adm_rt.export.functions import function

    kinds = {T: onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), "float32": 1}

    def values(tensors):
        return [
            onnx.helper.make_tensor_value_info(name, kinds[kind], shape_of(dims, queries))
            for name, (kind, dims) in tensors.items()
        ]

    made = onnx.helper.make_node(
        node.name,
        list(node.inputs),
        list(node.outputs),
        domain=DOMAIN,
        plugin_namespace="adm_rt",
        plugin_version="1",
        **attributes_of(node, queries),
    )
    graph = onnx.helper.make_graph([made], "node", values(node.inputs), values(node.outputs))
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, OPS_VERSION)]
    model = onnx.helper.make_model(
        graph, opset_imports=opsets, functions=[function(node.name)], ir_version=11
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return dict(zip(node.outputs, session.run(None, inputs)))


def inputs_of(node, queries, dtype, rng):
    """Random inputs; those that come of a forward node are what that says."""

    def random(name, kind, dims):
        values = rng.standard_normal(shape_of(dims, queries))
        return values.astype(dtype if kind == T else np.float32)

    inputs = {name: random(name, *tensor) for name, tensor in node.inputs.items()}
    if node.options["direction"] == "backward":
        kept = {"ada_group_norm": "_with_moments", "qkv_attention": "_with_stats"}[node.op]
        forward = NODES[node.name.replace("_backward", kept)]
        before = {name: inputs[name] for name in forward.inputs}
        after = run_function(forward, before, queries, dtype)
        inputs |= {name: after[name] for name in ("mean", "rstd", "out", "stats") if name in inputs}
    return inputs


@pytest.fixture(scope="module")
def library(compile_emulated):
    built = compile_emulated("nodes_emulated.cpp")
    built.node_name.restype = ctypes.c_char_p
    return built


def run_plugin(library, node, inputs, queries, dtype, code):
    outputs = {
        name: np.full(shape_of(dims, queries), np.nan, dtype if kind == T else np.float32)
        for name, (kind, dims) in node.outputs.items()
    }

    def addresses(arrays):
        return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))

    given = attributes_of(node, queries)
    main = inputs["x" if node.op == "ada_group_norm" else "qkv"].shape
    status = library.launch_node(
        list(NODES).index(node.name),
        (ctypes.c_int32 * 4)(*(given.get(name, 0) for name in ALL)),
        ctypes.c_float(given.get("eps", 0.0)),
        len(main),
        (ctypes.c_int64 * len(main))(*main),
        code,
        addresses([np.ascontiguousarray(inputs[name]) for name in node.inputs]),
        addresses(list(outputs.values())),
    )
    assert status == 0, library.error_text()
    return outputs


def cases():
    """Every node in every dtype, attentions with all queries and with one."""
    for node in NODES.values():
        for dtype in DTYPES:
            for queries in (LENGTH, 1) if node.op == "qkv_attention" else (LENGTH,):
                yield pytest.param(node, dtype, queries, id=f"{node.name}-{dtype}-{queries}")


@pytest.mark.parametrize("node, dtype, queries", list(cases()))
def test_a_plugin_says_what_its_function_says(library, node, dtype, queries):
    kind, code, limit = DTYPES[dtype]
    seed = 7
    inputs = inputs_of(node, queries, kind, np.random.default_rng(seed))
    expected = run_function(node, inputs, queries, kind)
    found = run_plugin(library, node, inputs, queries, kind, code)
    for name, value in expected.items():
        value, ours = value.astype(np.float64), found[name].astype(np.float64)
        error = np.abs(ours - value).max() / np.abs(value).max()
        assert error <= limit, f"{name}: {error:.3g} of the largest value (seed {seed})"


def test_the_nodes_have_the_same_order_in_both_tables(library):
    assert [library.node_name(i).decode() for i in range(len(NODES))] == list(NODES)
