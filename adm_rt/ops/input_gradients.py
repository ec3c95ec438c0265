"""Forward passes that keep what the gradient with respect to their input needs, and that gradient.

For networks that compute a gradient with explicit operations instead of autograd. Each forward
function returns ``(y, saved)``; its ``*_input_gradient`` takes the upstream gradient and ``saved``,
an opaque tuple of tensors. Both choose alike: the compiled kernels for the tensors that
``ops.ada_group_norm`` and ``ops.qkv_attention`` give to them, on the CPU and on CUDA, the same
formulas in plain torch for everything else and inside ``use_reference()``.
Nothing here is recorded by autograd or works in place, so a network of these calls can be exported
(from the CPU: those that resample call their CUDA kernels without an operator in between).
"""

import torch

from . import _ada_group_norm_resample as resampling
from ._ada_group_norm_torch import kernels_take as _norm_kernels_take
from ._library import register_torch_ops
from ._qkv_attention_torch import kernels_take as _attention_kernels_take

register_torch_ops()

_INPUT_ONLY = (True, False, False, False)  # of the gradients of x, weight, bias, scale_shift


def _wide(tensor):
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def ada_group_norm_forward(x, weight, bias, scale_shift=None, groups=32, eps=1e-5, silu=True):
    """``ops.ada_group_norm`` -> (y like x, saved); arguments as there, torch tensors only."""
    weight, bias, scale_shift = _wide(weight), _wide(bias), _wide(scale_shift)
    if _norm_kernels_take(x):
        y, mean, rstd = torch.ops.adm_rt.ada_group_norm_with_moments(
            x, weight, bias, scale_shift, groups, eps, silu
        )
        return y, (x, weight, bias, scale_shift, mean, rstd)
    grouped = _grouped(_wide(x), groups)
    variance, mean = torch.var_mean(grouped, dim=2, keepdim=True, correction=0)
    rstd = torch.rsqrt(variance + eps)
    saved = x, weight, bias, scale_shift, mean, rstd
    _, v = _normalized(saved, groups)
    y = v * torch.sigmoid(v) if silu else v
    return y.reshape(x.shape).to(x.dtype), saved


def ada_group_norm_input_gradient(grad, saved, groups=32, silu=True):
    """Gradient of ``ada_group_norm_forward`` with respect to x; grad like y -> like x.

    With dv = grad * silu'(v) and a = weight * (1 + scale):
    dx = rstd * (a dv - mean(a dv) - xhat mean(a dv xhat)), the means over each group.
    """
    x, weight, bias, scale_shift, mean, rstd = saved
    if _norm_kernels_take(x):
        return torch.ops.adm_rt.ada_group_norm_backward(
            grad.to(x.dtype), x, mean, rstd, weight, bias, scale_shift, groups, silu, _INPUT_ONLY
        )[0]
    xhat, v = _normalized(saved, groups)
    dv = _wide(grad).reshape(v.shape)
    if silu:
        sigmoid = torch.sigmoid(v)
        dv = dv * (sigmoid * (1 + v * (1 - sigmoid)))
    adv = _grouped(dv * _slope_and_offset(saved)[0], groups)
    projection = (adv * xhat).mean(dim=2, keepdim=True)
    dx = rstd * (adv - adv.mean(dim=2, keepdim=True) - xhat * projection)
    return dx.reshape(x.shape).to(x.dtype)


def ada_group_norm_resample_forward(x, weight, bias, groups=32, eps=1e-5, silu=True, resample=None):
    """``ops.ada_group_norm_resample`` without skip and modulation -> (y, x resampled, saved)."""
    if resample is not None and _resample_kernels_take(x):
        weight, bias, code = _wide(weight), _wide(bias), resampling.RESAMPLES[resample]
        y, x_out, mean, rstd = resampling.forward(
            x, None, weight, bias, None, groups, eps, silu, code
        )
        return y, x_out, (x, weight, bias, None, mean, rstd)
    y, saved = ada_group_norm_forward(x, weight, bias, None, groups, eps, silu)
    return resampling.resampled(y, resample), resampling.resampled(x, resample), saved


def ada_group_norm_resample_input_gradient(
    grad, grad_x_out, saved, groups=32, silu=True, resample=None
):
    """Gradients of y and of x resampled -> gradient of x; all like the tensors they are of."""
    x = saved[0]
    if _resample_kernels_take(x):
        x, weight, bias, scale_shift, mean, rstd = saved
        code = resampling.RESAMPLES[resample]
        grads = grad.to(x.dtype), grad_x_out.to(x.dtype)
        return resampling.backward(
            *grads, x, None, weight, bias, scale_shift, mean, rstd, groups, silu, code,
            (True, False, False, False, False),
        )[0]  # fmt: skip
    grad, grad_x_out = (_before(g, resample) for g in (grad, grad_x_out))
    return ada_group_norm_input_gradient(grad, saved, groups, silu) + grad_x_out


def _resample_kernels_take(x):
    return resampling.kernels_take(x) and x.dim() == 4


def _before(grad, resample):
    """The gradient before the resampling."""
    if resample == "down":  # a quarter to each of four pixels
        return torch.nn.functional.interpolate(grad * 0.25, scale_factor=2, mode="nearest")
    return torch.nn.functional.avg_pool2d(grad, 2) * 4 if resample == "up" else grad


def _grouped(x, groups):
    """[N, C, *spatial] -> [N, groups, values of a group]."""
    return x.reshape(x.shape[0], groups, -1)


def _slope_and_offset(saved):
    """(a, b), [N or 1, C, 1] each: v = a * xhat + b."""
    _, weight, bias, scale_shift, _, _ = saved
    a, b = weight[None, :, None], bias[None, :, None]
    if scale_shift is not None:
        scale, shift = scale_shift[:, :, None].chunk(2, dim=1)
        a, b = a * (1 + scale), b * (1 + scale) + shift
    return a, b


def _normalized(saved, groups):
    """(xhat [N, groups, values], v [N, C, spatial])."""
    x, _, _, _, mean, rstd = saved
    xhat = (_grouped(_wide(x), groups) - mean) * rstd
    a, b = _slope_and_offset(saved)
    return xhat, xhat.reshape(x.shape[0], x.shape[1], -1) * a + b


def qkv_attention_forward(qkv, num_heads, order="legacy", num_queries=None):
    """``ops.qkv_attention`` -> (out [N, H*d, num_queries or T], saved); torch tensors only."""
    num_queries = qkv.shape[2] if num_queries is None else num_queries
    if _attention_kernels_take(qkv, num_heads):
        out, stats = torch.ops.adm_rt.qkv_attention_with_stats(qkv, num_heads, order, num_queries)
        return out, (qkv, out, stats)
    q, k, v = _heads(qkv, num_heads, order)
    scale = q.shape[2] ** -0.25
    logits = (q[..., :num_queries] * scale).transpose(2, 3) @ (k * scale)
    probabilities = torch.softmax(_wide(logits), dim=-1).to(qkv.dtype)  # [N, H, queries, T]
    out = v @ probabilities.transpose(2, 3)
    return out.reshape(qkv.shape[0], -1, num_queries), (qkv, probabilities)


def qkv_attention_input_gradient(grad, saved, num_heads, order="legacy"):
    """Gradient of ``qkv_attention_forward`` with respect to qkv; grad like out -> like qkv.

    With P the probabilities: dv = grad P, dP = grad^T v, dS = P (dP - rowsum(P dP)),
    dq = k dS^T / sqrt(d), dk = q dS / sqrt(d). Queries that did not ask get zeros.
    """
    if len(saved) == 3:
        grad = grad.to(saved[0].dtype)
        return torch.ops.adm_rt.qkv_attention_backward(grad, *saved, num_heads, order)
    qkv, probabilities = saved
    n, width, length = qkv.shape
    num_queries = probabilities.shape[2]
    q, k, v = _heads(qkv, num_heads, order)
    grad = grad.to(qkv.dtype).reshape(n, num_heads, -1, num_queries)
    dv = grad @ probabilities
    p, dp = _wide(probabilities), _wide(grad.transpose(2, 3) @ v)
    ds = (p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * q.shape[2] ** -0.5).to(qkv.dtype)
    dq = k @ ds.transpose(2, 3)
    dk = q[..., :num_queries] @ ds
    dq = torch.nn.functional.pad(dq, (0, length - num_queries))
    return torch.stack((dq, dk, dv), dim=2 if order == "legacy" else 1).reshape(n, width, length)


def _heads(qkv, num_heads, order):
    """q, k, v, [N, H, d, T] each."""
    n, width, length = qkv.shape
    d = width // (3 * num_heads)
    if order == "legacy":
        return qkv.reshape(n, num_heads, 3, d, length).unbind(2)
    return qkv.reshape(n, 3, num_heads, d, length).unbind(1)
