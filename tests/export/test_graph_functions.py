"""Every function body against the ops in float64, one node at a time, by ONNX Runtime."""

import numpy as np
import pytest
import torch

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
    types = {"T": dtype, "float32": "float32"}
    arrays = {k: v.numpy().astype(types[node.inputs[k][0]]) for k, v in given.items()}

    def info(pairs):
        return [
            onnx.helper.make_tensor_value_info(
                k,
                CODES[types[kind]],
                ["N", *arrays[k].shape[1:]] if k in arrays else [None] * len(dims.split()),
            )
            for k, (kind, dims) in pairs.items()
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
    assert [a.dtype.name for a in found] == [types[kind] for kind, _ in node.outputs.values()]
    return dict(zip(node.outputs, found, strict=True))


def close(found, expected, limit):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * max(1e-3, np.abs(expected).max())


def norm_case(name, seed=0):
    """x's mean is large in some groups: E[x^2] - E[x]^2 would lose its digits there."""
    g = torch.Generator().manual_seed(seed)
    channels, groups = 12, 4
    x = torch.randn(3, channels, 5, 2, generator=g, dtype=torch.float64)
    x = x + 30 * torch.arange(channels).reshape(1, -1, 1, 1) // 9
    values = {
        "weight": torch.randn(channels, generator=g).double(),
        "bias": torch.randn(channels, generator=g).double(),
        "scale_shift": torch.randn(3, 2 * channels, generator=g).double(),
        "grad": torch.randn(x.shape, generator=g).double(),
    }
    return x, values, groups


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", NORMS)
def test_ada_group_norm(name, dtype):
    node = NODES[name]
    x, values, groups = norm_case(name)
    x = x.to(getattr(torch, dtype)).double().requires_grad_(True)
    scale_shift = values["scale_shift"] if node.options["modulated"] else None
    y = reference.ada_group_norm(
        x, values["weight"], values["bias"], scale_shift, groups, 1e-4, node.options["silu"]
    )
    grouped = x.detach().reshape(3, groups, -1)
    mean, rstd = grouped.mean(-1), (grouped.var(-1, correction=0) + 1e-4).rsqrt()
    given = {"x": x.detach(), "mean": mean, "rstd": rstd, **values}
    given = {k: nhwc(given[k]) for k in node.inputs}
    if "grad" in given:
        given["grad"] = given["grad"].to(getattr(torch, dtype)).double()
        values["grad"] = given["grad"].permute(0, 3, 1, 2)
    attributes = {"groups": groups} | ({"eps": 1e-4} if "eps" in node.attributes else {})
    found = run(name, dtype, attributes, given)
    limit = 10 * LIMITS[dtype]  # the mean is up to 40 standard deviations away
    if "y" in found:
        close(found["y"], nhwc(y), limit)
    if "mean" in found:
        close(found["mean"], mean, limit)
        close(found["rstd"], rstd, limit)
    if "dx" in found:
        (dx,) = torch.autograd.grad(y, x, values["grad"])
        close(found["dx"], nhwc(dx), limit)


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).contiguous() if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("num_queries", [1, 7])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_qkv_attention(name, dtype, num_queries):
    node, heads, head_dim, length = NODES[name], 2, 5, 7
    g = torch.Generator().manual_seed(num_queries)
    qkv = 2 * torch.randn(3, length, 3 * heads * head_dim, generator=g)
    qkv = qkv.to(getattr(torch, dtype)).double().requires_grad_(True)
    grad = torch.randn(3, num_queries, heads * head_dim, generator=g)
    grad = grad.to(getattr(torch, dtype)).double()
    order = node.options["order"]
    out = reference.qkv_attention(qkv.transpose(1, 2), heads, order, num_queries).transpose(1, 2)
    (dqkv,) = torch.autograd.grad(out, qkv, grad)
    given = {"qkv": qkv.detach(), "grad": grad, "out": out.detach()}
    given["stats"] = stats = expected_stats(qkv.detach(), heads, order, num_queries)
    attributes = {"num_heads": heads, "head_dim": head_dim, "num_queries": num_queries}
    found = run(name, dtype, attributes, {k: given[k] for k in node.inputs})
    expected = {"out": out, "stats": stats, "dqkv": dqkv}
    for key, value in found.items():
        close(value, expected[key], 4 * LIMITS[dtype])


def expected_stats(qkv, heads, order, num_queries):
    n, length, width = qkv.shape
    axis = {"legacy": 3, "new": 2}[order]
    shape = (n, length, heads, 3, -1) if order == "legacy" else (n, length, 3, heads, -1)
    q, k, _ = qkv.reshape(shape).unbind(axis)
    logits = torch.einsum("nqhd,nkhd->nhqk", q[:, :num_queries], k) / q.shape[-1] ** 0.5
    maximum = logits.amax(-1, keepdim=True)
    total = torch.exp(logits - maximum).sum(-1)
    return torch.stack([maximum[..., 0] / np.log(2), total], dim=2)


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
