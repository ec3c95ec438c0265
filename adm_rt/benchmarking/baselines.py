"""What the three ops are compared with: the torch calls that the published model code makes.

Each function is the sequence of eager torch operations of openai/guided-diffusion for the same
piece of work, in the same order, with the same intermediate tensors. ``diffusion`` is what
``tables`` makes of a ``Diffusion``.
"""

import types

import numpy as np
import torch
import torch.nn.functional as F


def ada_group_norm(x, weight, bias, scale_shift=None, silu=True):
    """GroupNorm in float32, cast back; modulation by broadcast scale and shift; SiLU."""
    h = F.group_norm(x.float(), 32, weight, bias, 1e-5).type(x.dtype)
    if scale_shift is not None:
        scale, shift = torch.chunk(scale_shift[..., None, None], 2, dim=1)
        h = h * (1 + scale) + shift
    return F.silu(h) if silu else h


def qkv_attention(qkv, num_heads, order):
    """Two einsums around a softmax in float32, over all positions."""
    n, width, length = qkv.shape
    d = width // (3 * num_heads)
    scale = d**-0.25
    if order == "legacy":
        q, k, v = qkv.reshape(n * num_heads, 3 * d, length).split(d, dim=1)
        q, k = q * scale, k * scale
    else:
        q, k, v = qkv.chunk(3, dim=1)
        q, k = ((part * scale).reshape(n * num_heads, d, length) for part in (q, k))
        v = v.reshape(n * num_heads, d, length)
    weight = torch.einsum("bct,bcs->bts", q, k)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(n, -1, length)


def tables(diffusion):
    """What the updates need of a ``Diffusion``, which torch may look at without copy or warning."""
    arrays = {k: v.copy() for k, v in vars(diffusion).items() if isinstance(v, np.ndarray)}
    return types.SimpleNamespace(**arrays, predict_xstart=diffusion.predict_xstart)


def _at(table, t, like):
    """Row t of a float64 table, broadcast to the shape of ``like``.

    A NumPy table goes to t's device each time, as it does there; a tensor has to be there.
    """
    if not isinstance(table, torch.Tensor):
        table = torch.from_numpy(table).to(t.device)
    values = table[t].float()
    return values.reshape(-1, 1, 1, 1).expand(like.shape)


def _mean_variance(diffusion, x, output, t):
    """Prediction of x0 and the posterior around it, with learned variances."""
    prediction, values = torch.split(output, x.shape[1], dim=1)
    min_log = _at(diffusion.posterior_log_variance_clipped, t, x)
    max_log = _at(diffusion.log_betas, t, x)
    fraction = (values + 1) / 2
    log_variance = fraction * max_log + (1 - fraction) * min_log
    variance = torch.exp(log_variance)
    x0 = prediction
    if not diffusion.predict_xstart:
        x0 = _predict_x0(diffusion, x, prediction, t)
    x0 = x0.clamp(-1, 1)
    return _posterior_mean(diffusion, x, x0, t), variance, log_variance, x0


def _predict_x0(diffusion, x, eps, t):
    return (
        _at(diffusion.sqrt_recip_alphas_cumprod, t, x) * x
        - _at(diffusion.sqrt_recipm1_alphas_cumprod, t, x) * eps
    )


def _predict_eps(diffusion, x, x0, t):
    return (_at(diffusion.sqrt_recip_alphas_cumprod, t, x) * x - x0) / _at(
        diffusion.sqrt_recipm1_alphas_cumprod, t, x
    )


def _posterior_mean(diffusion, x, x0, t):
    return (
        _at(diffusion.posterior_mean_coef1, t, x) * x0
        + _at(diffusion.posterior_mean_coef2, t, x) * x
    )


def ddpm_update(diffusion, x, output, t, gradient=None, noise=None):
    """One ancestral step; t int64 [N]; gradient already times the guidance scale."""
    mean, variance, log_variance, _ = _mean_variance(diffusion, x, output, t)
    if gradient is not None:
        mean = mean.float() + variance * gradient.float()
    noise = torch.randn_like(x) if noise is None else noise
    mask = (t != 0).float().reshape(-1, 1, 1, 1)
    return mean + mask * torch.exp(0.5 * log_variance) * noise


def ddim_update(diffusion, x, output, t, gradient=None, noise=None, eta=0.0):
    """One DDIM step; the noise is drawn whatever eta is."""
    _, _, _, x0 = _mean_variance(diffusion, x, output, t)
    abar = _at(diffusion.alphas_cumprod, t, x)
    if gradient is not None:
        eps = _predict_eps(diffusion, x, x0, t) - (1 - abar).sqrt() * gradient
        x0 = _predict_x0(diffusion, x, eps, t)
        _posterior_mean(diffusion, x, x0, t)  # made there too, though DDIM does not use it
    eps = _predict_eps(diffusion, x, x0, t)
    previous = _at(diffusion.alphas_cumprod_prev, t, x)
    sigma = eta * torch.sqrt((1 - previous) / (1 - abar)) * torch.sqrt(1 - abar / previous)
    noise = torch.randn_like(x) if noise is None else noise
    mean = x0 * torch.sqrt(previous) + torch.sqrt(1 - previous - sigma**2) * eps
    mask = (t != 0).float().reshape(-1, 1, 1, 1)
    return mean + mask * sigma * noise
