"""The specification of the three ops in plain torch.

Short on purpose: every kernel is judged against these functions evaluated in float64. They accept
any floating dtype, are differentiable, and compute statistics and softmax in float32 (float64 for
float64 inputs) and cast back to the input's dtype, as the published model does.
"""

import torch
import torch.nn.functional as F


def _wide(dtype):
    """Accumulation dtype: float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ada_group_norm(x, weight, bias, scale_shift=None, groups=32, eps=1e-5, silu=True):
    """GroupNorm, affine, optional AdaGN modulation, optional SiLU.

    x [N, C, *spatial]; weight, bias [C]; scale_shift [N, 2C] with the scale first.
    Returns y like x: ``h = GN(x) * weight + bias; h = h * (1 + scale) + shift; y = silu(h)``.
    """
    wide = _wide(x.dtype)
    h = F.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    if scale_shift is not None:
        broadcast = scale_shift.to(wide).reshape(*scale_shift.shape, *[1] * (x.dim() - 2))
        scale, shift = broadcast.chunk(2, dim=1)
        h = h * (1 + scale) + shift
    return (F.silu(h) if silu else h).to(x.dtype)


def qkv_attention(qkv, num_heads, order="legacy", num_queries=None):
    """Multi-head attention on the output of one fused qkv projection.

    qkv [N, 3*H*d, T]. Channel layout: "legacy" ``h*3d + {q,k,v}*d + i``, "new"
    ``{q,k,v}*H*d + h*d + i``. Returns [N, H*d, num_queries or T], channel ``h*d + i``:
    ``softmax(q^T k / sqrt(d)) v`` for the first num_queries positions.
    """
    n, width, length = qkv.shape
    d = width // (3 * num_heads)
    if order == "legacy":
        q, k, v = qkv.reshape(n, num_heads, 3, d, length).unbind(2)
    else:
        q, k, v = qkv.reshape(n, 3, num_heads, d, length).unbind(1)
    q = q[..., :num_queries] if num_queries is not None else q
    scale = d**-0.25  # on q and k each: more stable in float16 than dividing the product
    logits = torch.einsum("nhdq,nhdk->nhqk", q * scale, k * scale)
    probabilities = torch.softmax(logits.to(_wide(qkv.dtype)), dim=-1).to(qkv.dtype)
    return torch.einsum("nhqk,nhdk->nhdq", probabilities, v).reshape(n, num_heads * d, -1)


def guided_mean_update(
    x,
    model_output,
    coefficients,
    *,
    gradient=None,
    uncond_output=None,
    history=(),
    noise=None,
    learned_variance=False,
    clip="static",
    quantile=0.995,
):
    """One sampler step: x0 prediction, clip, guidance, linear update, noise.

    x, gradient, noise and each history tensor [N, C, H, W]; model_output and uncond_output
    [N, C or 2C, H, W]; coefficients: a ``StepCoefficients``. Returns (x_next, x0, state), state
    being None when all of the row's state coefficients are zero. See
    ``adm_rt.ops.guided_mean_update`` for the meaning of every coefficient.
    """
    c = coefficients
    channels = x.shape[1]
    out = model_output[:, :channels].to(x.dtype)
    if uncond_output is not None:
        uncond = uncond_output[:, :channels].to(x.dtype)
        out = uncond + c.cfg * (out - uncond)
    x0 = c.x0_x * x + c.x0_out * out
    if clip == "static":
        x0 = x0.clamp(-1, 1)
    elif clip == "dynamic":
        limit = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=1)
        limit = limit.reshape(-1, 1, 1, 1)
        x0 = torch.maximum(torch.minimum(x0, limit), -limit) / limit
    if gradient is not None:
        x0 = x0 + c.guide_x0 * gradient
    if learned_variance:
        fraction = (model_output[:, channels:].to(x.dtype) + 1) / 2
        log_variance = fraction * c.max_log + (1 - fraction) * c.min_log
    else:
        log_variance = torch.full_like(x, c.max_log)

    def combine(on_x, on_x0, *on_history):
        total = on_x * x + on_x0 * x0
        for factor, tensor in zip(on_history, history, strict=False):
            total = total + factor * tensor
        return total

    x_next = combine(c.next_x, c.next_x0, c.next_h0, c.next_h1, c.next_h2)
    if gradient is not None and c.guide_mean != 0:
        x_next = x_next + c.guide_mean * torch.exp(log_variance) * gradient
    if noise is not None and c.noise != 0:
        x_next = x_next + c.noise * torch.exp(0.5 * log_variance) * noise
    state_row = (c.state_x, c.state_x0, c.state_h0, c.state_h1, c.state_h2)
    state = combine(*state_row) if any(state_row) else None
    return x_next, x0, state
