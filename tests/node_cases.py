"""Nodes of domain "adm_rt" with inputs, and with what they give in float64 by ``ops.reference``."""

from typing import NamedTuple

import numpy as np
import torch

from adm_rt.export.nodes import NODES, Node, T
from adm_rt.ops import reference

EPS = 1e-4


class NodeCase(NamedTuple):
    """inputs, outputs: name -> float64 tensor; inputs of type T are numbers of the case's dtype."""

    node: Node
    attributes: dict
    inputs: dict
    outputs: dict


def norm_case(name, dtype, channels=12, groups=4, height=5, width=2, seed=0):
    """x's mean is large in some groups: E[x^2] - E[x]^2 would lose its digits there."""
    node, g = NODES[name], torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, height, width, generator=g, dtype=torch.float64)
    x = x + 30 * torch.arange(channels).reshape(1, -1, 1, 1) // (channels * 3 // 4)
    values = {
        "weight": torch.randn(channels, generator=g).double(),
        "bias": torch.randn(channels, generator=g).double(),
        "scale_shift": torch.randn(3, 2 * channels, generator=g).double(),
        "grad": _rounded(torch.randn(x.shape, generator=g), dtype),
    }
    x = _rounded(x, dtype).requires_grad_(True)
    scale_shift = values["scale_shift"] if node.options["modulated"] else None
    y = reference.ada_group_norm(
        x, values["weight"], values["bias"], scale_shift, groups, EPS, node.options["silu"]
    )
    (dx,) = torch.autograd.grad(y, x, values["grad"])
    grouped = x.detach().reshape(3, groups, -1)
    moments = {
        "mean": grouped.mean(-1),
        "rstd": (grouped.var(-1, correction=0) + EPS).rsqrt(),
    }
    everything = {"x": x, "y": y, "dx": dx, **moments, **values}
    attributes = {"groups": groups} | ({"eps": EPS} if "eps" in node.attributes else {})
    return _case(node, attributes, {k: _nhwc(v.detach()) for k, v in everything.items()})


def attention_case(name, dtype, num_queries, heads=2, head_dim=5, length=7):
    """The first ``num_queries`` of ``length`` positions ask."""
    node, g = NODES[name], torch.Generator().manual_seed(num_queries)
    qkv = 2 * torch.randn(3, length, 3 * heads * head_dim, generator=g)
    qkv = _rounded(qkv, dtype).requires_grad_(True)
    grad = _rounded(torch.randn(3, num_queries, heads * head_dim, generator=g), dtype)
    order = node.options["order"]
    out = reference.qkv_attention(qkv.transpose(1, 2), heads, order, num_queries).transpose(1, 2)
    (dqkv,) = torch.autograd.grad(out, qkv, grad)
    stats = _stats(qkv.detach(), heads, order, num_queries)
    everything = {"qkv": qkv, "grad": grad, "out": out, "stats": stats, "dqkv": dqkv}
    attributes = {"num_heads": heads, "head_dim": head_dim, "num_queries": num_queries}
    return _case(node, attributes, {k: v.detach() for k, v in everything.items()})


def types_of(tensors, dtype):
    """name -> dtype's name, of a node's inputs or outputs."""
    return {name: dtype if kind == T else kind for name, (kind, _) in tensors.items()}


def _case(node, attributes, everything):
    return NodeCase(
        node,
        attributes,
        {name: everything[name] for name in node.inputs},
        {name: everything[name] for name in node.outputs},
    )


def _rounded(tensor, dtype):
    return tensor.to(getattr(torch, dtype)).double()


def _nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).contiguous() if tensor.dim() == 4 else tensor


def _stats(qkv, heads, order, num_queries):
    n, length, _ = qkv.shape
    axis = {"legacy": 3, "new": 2}[order]
    shape = (n, length, heads, 3, -1) if order == "legacy" else (n, length, 3, heads, -1)
    q, k, _ = qkv.reshape(shape).unbind(axis)
    logits = torch.einsum("nqhd,nkhd->nhqk", q[:, :num_queries], k) / q.shape[-1] ** 0.5
    maximum = logits.amax(-1, keepdim=True)
    total = torch.exp(logits - maximum).sum(-1)
    return torch.stack([maximum[..., 0] / np.log(2), total], dim=2)
