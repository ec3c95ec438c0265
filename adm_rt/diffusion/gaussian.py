"""The process' Gaussian formulas as pure functions of arrays; NumPy arrays and torch tensors alike.

``t`` is an int64 array or tensor [N] of positions in the (respaced) process, or one int for all
images; ``x``-like arguments are [N, C, ...]. Table values are looked up in float64 and then cast to
float32 (to float64 for float64 images), as the released models were trained and sampled.
"""

from __future__ import annotations

import numpy as np

from adm_rt.diffusion.schedule import Diffusion


def extract(table: np.ndarray, t, like):
    """``table[t]`` in the array type, device and precision of ``like``, shape [N or 1, 1, ...]."""
    if isinstance(like, np.ndarray):
        dtype = np.float64 if like.dtype == np.float64 else np.float32
        values = np.asarray(table)[np.atleast_1d(np.asarray(t))].astype(dtype)
    else:
        import torch

        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        index = torch.atleast_1d(torch.as_tensor(t, device=like.device))
        # np.array copies: the tables are read-only, which torch.from_numpy warns about.
        values = torch.from_numpy(np.array(table)).to(like.device)[index].to(dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def q_sample(diffusion: Diffusion, x0, t, noise):
    """x_t ~ q(x_t | x_0) for standard normal ``noise`` (DDPM eq. 4)."""
    return (
        extract(diffusion.sqrt_alphas_cumprod, t, x0) * x0
        + extract(diffusion.sqrt_one_minus_alphas_cumprod, t, x0) * noise
    )


def q_posterior(diffusion: Diffusion, x0, x_t, t):
    """(mean [N, C, ...], log variance [N, 1, ...]) of q(x_{t-1} | x_t, x_0) (DDPM eq. 6-7)."""
    mean = (
        extract(diffusion.posterior_mean_coef1, t, x_t) * x0
        + extract(diffusion.posterior_mean_coef2, t, x_t) * x_t
    )
    return mean, extract(diffusion.posterior_log_variance_clipped, t, x_t)


def predict_xstart_from_eps(diffusion: Diffusion, x_t, t, eps):
    """x_0 = x_t / sqrt(abar) - sqrt(1/abar - 1) eps."""
    return (
        extract(diffusion.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        - extract(diffusion.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
    )


def predict_eps_from_xstart(diffusion: Diffusion, x_t, t, x0):
    """The inverse of :func:`predict_xstart_from_eps` in its last argument."""
    return (extract(diffusion.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x0) / extract(
        diffusion.sqrt_recipm1_alphas_cumprod, t, x_t
    )


def predict_xstart_from_previous(diffusion: Diffusion, x_t, t, x_previous):
    """The x_0 whose posterior mean is ``x_previous``."""
    ratio = diffusion.posterior_mean_coef2 / diffusion.posterior_mean_coef1
    return (
        extract(1.0 / diffusion.posterior_mean_coef1, t, x_t) * x_previous
        - extract(ratio, t, x_t) * x_t
    )


def predict_xstart(diffusion: Diffusion, x_t, t, prediction):
    """x_0 from the network's first C channels, whatever its target is."""
    if diffusion.model_mean_type == "xstart":
        return prediction
    if diffusion.model_mean_type == "previous_x":
        return predict_xstart_from_previous(diffusion, x_t, t, prediction)
    return predict_xstart_from_eps(diffusion, x_t, t, prediction)


def split_output(diffusion: Diffusion, model_output, channels: int):
    """(prediction [N, C, ...], v [N, C, ...] or None); ValueError if the channels do not fit."""
    expected = 2 * channels if diffusion.learn_sigma else channels
    if model_output.shape[1] != expected:
        raise ValueError(
            f"model_output has {model_output.shape[1]} channels; {channels}-channel images with "
            f"learn_sigma={diffusion.learn_sigma} need {expected}. Set it as trained."
        )
    if not diffusion.learn_sigma:
        return model_output, None
    return model_output[:, :channels], model_output[:, channels:]


def model_log_variance(diffusion: Diffusion, v, t, like):
    """The log variance of p(x_{t-1} | x_t): [N, C, ...] learned from ``v``, or [N, 1, ...] fixed.

    Learned (Improved DDPM eq. 15): ``v`` in [-1, 1] interpolates between the posterior's variance
    and beta in the log domain; values outside extrapolate.
    """
    if diffusion.model_var_type == "learned_range":
        low = extract(diffusion.posterior_log_variance_clipped, t, like)
        high = extract(diffusion.log_betas, t, like)
        fraction = (v + 1) / 2
        return fraction * high + (1 - fraction) * low
    if diffusion.model_var_type == "fixed_small":
        return extract(diffusion.posterior_log_variance_clipped, t, like)
    return extract(diffusion.fixed_large_log_variance, t, like)


def p_mean_variance(diffusion: Diffusion, model_output, x_t, t, clip: bool = True):
    """(mean, log variance, x_0) of p(x_{t-1} | x_t) from the network's output [N, C or 2C, ...].

    ``clip`` clamps x_0 to [-1, 1]. With ``predict_previous`` the mean is the network's output
    itself and x_0 is only derived from it.
    """
    prediction, v = split_output(diffusion, model_output, x_t.shape[1])
    x0 = predict_xstart(diffusion, x_t, t, prediction)
    if clip:
        x0 = x0.clip(-1, 1)
    if diffusion.model_mean_type == "previous_x":
        mean = prediction
    else:
        mean, _ = q_posterior(diffusion, x0, x_t, t)
    return mean, model_log_variance(diffusion, v, t, x_t), x0
