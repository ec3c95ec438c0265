"""Every function body against the ops in float64, one node at a time, by ONNX Runtime."""

import numpy as np
import pytest
import torch
from node_cases import attention_case, norm_case, types_of

from adm_rt.export.nodes import DOMAIN, NODES, OPS_VERSION, OPSET
from adm_rt.ops import reference

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from adm_rt.export.functions import function, function_text  # noqa: E402

NORMS = [n for n in NODES if NODES[n].op == "ada_group_norm"]
ATTENTIONS = [n for n in NODES if NODES[n].op == "qkv_attention"]
LIMITS = {"float32": 2e-6, "float16": 2e-3}  # relative to the largest value
CODES = {"float32": 1, "int64": 7, "float16": 10}


def run(name, dtype, attributes, given, proto=None):
    """The outputs of one node, its batch axis dynamic. given: name -> float64 tensor."""
    node = NODES[name]
    types = types_of(node.inputs | node.outputs, dtype)
    arrays = {k: v.numpy().astype(types[k]) for k, v in given.items()}

    def info(pairs):
        return [
            onnx.helper.make_tensor_value_info(
                k,
                CODES[types[k]],
                ["N", *arrays[k].shape[1:]] if k in arrays else [None] * len(dims.split()),
            )
            for k, (_, dims) in pairs.items()
        ]

    made = onnx.helper.make_node(
        name, list(node.inputs), list(node.outputs), domain=DOMAIN, **attributes
    )
    graph = onnx.helper.make_graph([made], "one", info(node.inputs), info(node.outputs))
    for parameter in ("weight", "bias"):  # no batch axis
        for value in graph.input:
            if value.name == parameter:
                value.type.tensor_type.shape.dim[0].dim_value = arrays[parameter].shape[0]
    model = onnx.helper.make_model(
        graph,
        functions=[proto or function(name)],
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid(DOMAIN, OPS_VERSION),
        ],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, arrays)
    assert [a.dtype.name for a in found] == [types[name] for name in node.outputs]
    return dict(zip(node.outputs, found, strict=True))


def close(found, expected, limit):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * max(1e-3, np.abs(expected).max())


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", NORMS)
def test_ada_group_norm(name, dtype):
    case = norm_case(name, dtype)
    found = run(name, dtype, case.attributes, case.inputs)
    for key, value in found.items():
        # the mean is up to 40 standard deviations away
        close(value, case.outputs[key], 10 * LIMITS[dtype])


@pytest.mark.parametrize("num_queries", [1, 7])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_qkv_attention(name, dtype, num_queries):
    case = attention_case(name, dtype, num_queries)
    found = run(name, dtype, case.attributes, case.inputs)
    for key, value in found.items():
        close(value, case.outputs[key], 4 * LIMITS[dtype])


@pytest.mark.parametrize("name", NODES)
def test_a_function_has_the_interface_of_its_node(name):
    proto = function(name)
    node = NODES[name]
    assert list(proto.input) == list(node.inputs)
    assert list(proto.output) == list(node.outputs)
    assert list(proto.attribute) == [*node.attributes, "plugin_namespace", "plugin_version"]
    assert {n.domain for n in proto.node} == {""}


def test_a_wrong_body_is_seen():
    text = function_text("qkv_attention_legacy")
    assert text.count("-0.25") == 1
    wrong = onnx.parser.parse_function(text.replace("-0.25", "-0.2"))
    qkv = torch.randn(1, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attributes = {"num_heads": 1, "head_dim": 4, "num_queries": 4}
    expected = reference.qkv_attention(qkv.transpose(1, 2), 1).transpose(1, 2)
    found = run("qkv_attention_legacy", "float32", attributes, {"qkv": qkv}, wrong)["out"]
    with pytest.raises(AssertionError):
        close(found, expected, 1e-3)
