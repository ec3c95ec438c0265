"""The nodes of domain "adm_rt" in exported graphs: one table for exporter, engines and plugins.

Every node works on NHWC-shaped tensors in plain row-major order (x [N, H, W, C]; qkv [N, T, 3*H*d]
with T = height * width) and carries the attributes ``plugin_namespace`` and ``plugin_version`` next
to its own: a runtime with our plugins takes the node as it is, any other one the model-local
function of the same name, whose body is standard ONNX. A function cannot branch on an attribute, so
what would be a flag of the op (SiLU, modulation, order of the channels) is part of the name here.

N is the only dynamic dimension. Nothing here imports onnx or torch.
"""

from __future__ import annotations

import dataclasses

DOMAIN = "adm_rt"
OPS_VERSION = 1  # of the domain: raised whenever a node changes its meaning
OPSET = 23
PLUGIN_NAMESPACE = "adm_rt"
PLUGIN_VERSION = "1"

# types of inputs and outputs: T is float32, float16 or bfloat16, one per node
T, FLOAT = "T", "float32"

_GROUPS = {"groups": "int"}
_NORM = {"groups": "int", "eps": "float"}
_ATTENTION = {"num_heads": "int", "head_dim": "int", "num_queries": "int"}

_X = {"x": (T, "N H W C")}
_AFFINE = {"weight": (FLOAT, "C"), "bias": (FLOAT, "C")}
_MODULATION = {"scale_shift": (FLOAT, "N 2C")}  # the scales of all channels, then the shifts
_MOMENTS = {"mean": (FLOAT, "N G"), "rstd": (FLOAT, "N G")}
_QKV = {"qkv": (T, "N T 3Hd")}
_OUT = {"out": (T, "N Q Hd")}
# row 0: the maximum of the logits in units of ln 2; row 1: the sum of exp(logit - maximum)
_STATS = {"stats": (FLOAT, "N H 2 Q")}


@dataclasses.dataclass(frozen=True)
class Node:
    """One node type.

    inputs, outputs: name -> (type, dimensions), in order; every one is required. attributes: name
    -> "int" or "float", every one required; the plugin attributes come on top. op: the op of
    ``adm_rt.ops`` that it is a variant of. options: what the name fixes of that op's arguments.
    """

    name: str
    op: str
    meaning: str
    inputs: dict[str, tuple[str, str]]
    outputs: dict[str, tuple[str, str]]
    attributes: dict[str, str]
    options: dict[str, bool | str]


def _norm(suffix, *, modulated, silu):
    options = {"modulated": modulated, "silu": silu}
    inputs = {**_X, **_AFFINE, **(_MODULATION if modulated else {})}
    formula = "silu(v)" if silu else "v"
    v = "u * (1 + scale) + shift" if modulated else "u"
    what = f"{formula}, v = {v}, u = (x - mean) * rstd * weight + bias, over groups of channels"
    forward = Node(
        f"ada_group_norm{suffix}",
        "ada_group_norm",
        what,
        inputs,
        {"y": _X["x"]},
        _NORM,
        {"direction": "forward", **options},
    )
    with_moments = dataclasses.replace(
        forward,
        name=f"ada_group_norm_with_moments{suffix}",
        meaning=f"{what}; and the moments of every group, for the backward node",
        outputs={"y": _X["x"], **_MOMENTS},
        options={"direction": "forward_with_moments", **options},
    )
    backward = Node(
        f"ada_group_norm_backward{suffix}",
        "ada_group_norm",
        "the gradient of y -> the gradient of x; mean and rstd as the node with moments gave them",
        {"grad": _X["x"], **_X, **_MOMENTS, **dict(list(inputs.items())[1:])},
        {"dx": _X["x"]},
        _GROUPS,
        {"direction": "backward", **options},
    )
    return forward, with_moments, backward


def _attention(order):
    where = {"legacy": "h*3d + {q,k,v}*d + i", "new": "{q,k,v}*H*d + h*d + i"}[order]
    what = (
        f"softmax(q k^T / sqrt(head_dim)) v per head, channel of qkv {where}; the first "
        "num_queries positions ask"
    )
    forward = Node(
        f"qkv_attention_{order}",
        "qkv_attention",
        what,
        _QKV,
        _OUT,
        _ATTENTION,
        {"direction": "forward", "order": order},
    )
    with_stats = dataclasses.replace(
        forward,
        name=f"qkv_attention_with_stats_{order}",
        meaning=f"{what}; and the softmax's maxima and sums, for the backward node",
        outputs={**_OUT, **_STATS},
        options={"direction": "forward_with_stats", "order": order},
    )
    backward = dataclasses.replace(
        forward,
        name=f"qkv_attention_backward_{order}",
        meaning="the gradient of out -> the gradient of qkv, zero for queries that did not ask; "
        "out and stats as the node with stats gave them",
        inputs={"grad": _OUT["out"], **_QKV, **_OUT, **_STATS},
        outputs={"dqkv": _QKV["qkv"]},
        options={"direction": "backward", "order": order},
    )
    return forward, with_stats, backward


NODES = {
    node.name: node
    for node in (
        *_norm("", modulated=False, silu=False),
        *_norm("_silu", modulated=False, silu=True),
        *_norm("_modulated_silu", modulated=True, silu=True),
        *_attention("legacy"),
        *_attention("new"),
    )
}
