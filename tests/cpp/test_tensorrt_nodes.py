"""The nodes as the TensorRT plugins launch them against the standard-op functions beside them.

A runtime takes one or the other from the same file, so both must say the same: our CUDA kernels,
under the emulator, through ``csrc/tensorrt/node_launch.cpp``; the functions in ONNX Runtime.
"""

import ctypes

import numpy as np
import pytest
import torch
from node_cases import attention_case, norm_case, types_of

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

    given = [np.ascontiguousarray(inputs[name]) for name in node.inputs]
    pointers = [[array.ctypes.data for array in arrays] for arrays in (given, outputs.values())]
    launch(library, node, attributes_of(node, queries), shape_of_main(inputs), code, *pointers)
    return outputs


def shape_of_main(inputs):
    return inputs["x" if "x" in inputs else "qkv"].shape


def launch(library, node, given, main, code, inputs, outputs):
    """given: attributes; main: the shape of x or qkv; inputs, outputs: addresses."""
    status = library.launch_node(
        list(NODES).index(node.name),
        (ctypes.c_int32 * 4)(*(given.get(name, 0) for name in ALL)),
        ctypes.c_float(given.get("eps", 0.0)),
        len(main),
        (ctypes.c_int64 * len(main))(*main),
        code,
        (ctypes.c_void_p * len(inputs))(*inputs),
        (ctypes.c_void_p * len(outputs))(*outputs),
    )
    assert status == 0, library.error_text()


def cases(*dtypes):
    """Every node in every dtype, attentions with all queries and with one."""
    for node in NODES.values():
        for dtype in dtypes:
            for queries in (LENGTH, 1) if node.op == "qkv_attention" else (LENGTH,):
                yield pytest.param(node, dtype, queries, id=f"{node.name}-{dtype}-{queries}")


@pytest.mark.parametrize("node, dtype, queries", list(cases(*DTYPES)))
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


@pytest.mark.parametrize("node, dtype, queries", list(cases("bfloat16")))
def test_a_plugin_says_what_the_reference_says(library, node, dtype, queries):
    """In bfloat16, in which ONNX Runtime runs no function."""
    if node.op == "ada_group_norm":
        case = norm_case(node.name, dtype, C, G, H, W)
    else:
        case = attention_case(node.name, dtype, queries, HEADS, DIM, LENGTH)
    types = types_of(node.inputs | node.outputs, dtype)

    def typed(tensors):
        return {k: v.to(getattr(torch, types[k])).contiguous() for k, v in tensors.items()}

    inputs, found = typed(case.inputs), typed(case.outputs)
    for tensor in found.values():
        tensor.fill_(float("nan"))
    pointers = [[t.data_ptr() for t in tensors.values()] for tensors in (inputs, found)]
    launch(library, node, case.attributes, shape_of_main(inputs), 1, *pointers)
    for name, expected in case.outputs.items():
        error = float((found[name].double() - expected).abs().max() / expected.abs().max())
        assert error <= 1.5e-2, f"{name}: {error:.3g} of the largest value"


def test_the_nodes_have_the_same_order_in_both_tables(library):
    assert [library.node_name(i).decode() for i in range(len(NODES))] == list(NODES)
