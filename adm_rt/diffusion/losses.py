"""Training losses in torch: the hybrid objective of Improved DDPM (arXiv 2102.09672, section 3.1).

The caller runs the network, on ``q_sample(...)`` and ``diffusion.model_timesteps(t)``; these
functions turn its output into one loss per image. Everything is computed in float32 (float64 for
float64 images), whatever precision the network ran in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from adm_rt.diffusion import gaussian
from adm_rt.diffusion.schedule import Diffusion

LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


def q_sample(diffusion: Diffusion, x0, t, noise):
    """x_t for images ``x0`` [N, C, H, W] in [-1, 1] at positions ``t`` int64 [N]."""
    return gaussian.q_sample(diffusion, x0, t, noise)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, .) || N(mean2, .)) in nats, elementwise."""
    return 0.5 * (
        log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
        - 1.0
    )


def _normal_cdf(x):
    # The tanh approximation the released models were trained with, not erf.
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log P in nats, elementwise, of 8-bit images ``x`` scaled to [-1, 1] (DDPM eq. 13).

    A level's bin reaches 1/255 to either side; those of 0 and 255 reach to infinity. Probabilities
    are floored at 1e-12 before the logarithm.
    """
    inverse = torch.exp(-log_scale)
    below_upper = _normal_cdf(inverse * (x - mean + 1.0 / 255.0))
    below_lower = _normal_cdf(inverse * (x - mean - 1.0 / 255.0))
    inside = torch.where(x > 0.999, 1.0 - below_lower, below_upper - below_lower)
    inside = torch.where(x < -0.999, below_upper, inside)
    return torch.log(inside.clamp(min=1e-12))


def vb_terms_bpd(diffusion: Diffusion, model_output, x0, x_t, t):
    """One term of the variational bound, [N], in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) of the
    discretised Gaussian at t = 0. The predicted x_0 is not clipped.
    """
    mean, log_variance, _ = gaussian.p_mean_variance(diffusion, model_output, x_t, t, clip=False)
    return _bound_bpd(diffusion, mean, log_variance, x0, x_t, t)


def _bound_bpd(diffusion, mean, log_variance, x0, x_t, t):
    """The term of p(x_{t-1} | x_t) = N(mean, exp(log_variance)), [N], in bits per dimension."""
    true_mean, true_log_variance = gaussian.q_posterior(diffusion, x0, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
    bits = torch.where((t == 0).view(-1, *[1] * (x0.ndim - 1)), nll, kl)
    return bits.flatten(1).mean(1) / math.log(2.0)


def evaluation_terms(diffusion: Diffusion, model_output, x0, x_t, t, noise, clip: bool = True):
    """What an evaluation of the bound reports at positions ``t``: dict of [N] tensors.

    ``vb``: the term in bits per dimension, with ``clip`` its x_0 clipped to [-1, 1] as in sampling;
    ``xstart_mse``: squared error of the predicted x_0; ``mse``: that of the noise which this x_0
    stands for. Arguments as in :func:`training_losses`.
    """
    out = model_output.to(x0.dtype)
    mean, log_variance, predicted = gaussian.p_mean_variance(diffusion, out, x_t, t, clip=clip)
    eps = gaussian.predict_eps_from_xstart(diffusion, x_t, t, predicted)
    return {
        "vb": _bound_bpd(diffusion, mean, log_variance, x0, x_t, t),
        "xstart_mse": (predicted - x0).square().flatten(1).mean(1),
        "mse": (eps - noise).square().flatten(1).mean(1),
    }


def prior_bpd(diffusion: Diffusion, x0):
    """KL(q(x_T | x_0) || N(0, 1)), [N], in bits per dimension: the bound's constant term."""
    last = diffusion.num_timesteps - 1
    mean = gaussian.extract(diffusion.sqrt_alphas_cumprod, last, x0) * x0
    log_variance = gaussian.extract(diffusion.log_one_minus_alphas_cumprod, last, x0)
    zero = torch.zeros_like(log_variance)
    return normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2.0)


def check_snr_weight(diffusion: Diffusion, loss_type: str | None = None):
    """ValueError where ``training_losses`` cannot have snr_weight."""
    loss_type = diffusion.loss_type if loss_type is None else loss_type
    if diffusion.model_mean_type != "xstart" or "mse" not in loss_type:
        raise ValueError(
            f"snr_weight is for the mse of x0; this is the {loss_type} of "
            f"{diffusion.model_mean_type}. Set predict_xstart=True (without use_kl), or "
            "snr_weight=False."
        )


def training_losses(
    diffusion: Diffusion,
    model_output,
    x0,
    x_t,
    t,
    noise,
    loss_type: str | None = None,
    snr_weight: bool = False,
) -> dict[str, torch.Tensor]:
    """Per-image losses from the network's output at ``x_t = q_sample(diffusion, x0, t, noise)``.

    Args:
        model_output: [N, C or 2C, H, W] (2C with learned variances), any float dtype.
        x0, x_t, noise: [N, C, H, W], float32 (or float64).
        t: int64 [N], positions in ``diffusion``, not the timesteps fed to the network.
        loss_type: default ``diffusion.loss_type``. "mse": mean squared error of the target, plus,
            with learned variances, the bound with the mean held fixed, so that it trains only the
            variances; "rescaled_mse" weighs the bound by num_timesteps/1000; "kl": the bound alone;
            "rescaled_kl": the bound times num_timesteps.
        snr_weight: multiplies the squared error of an x0 target by the signal-to-noise ratio,
            at least 1 (truncated SNR: Salimans & Ho 2022, section 4) and at most 1000, whose noise
            is 4 levels of 255. Other targets and losses: ValueError.

    Returns:
        dict of [N] tensors: ``loss`` to be averaged and differentiated; ``mse``; ``vb`` in bits as
        weighed in the loss. A part that the loss does not contain is for logging: no gradient.
    """
    loss_type = diffusion.loss_type if loss_type is None else loss_type
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is not one of {LOSS_TYPES}.")
    if snr_weight:
        check_snr_weight(diffusion, loss_type)
    out = model_output.to(x0.dtype)
    prediction, v = gaussian.split_output(diffusion, out, x0.shape[1])
    if diffusion.model_mean_type == "xstart":
        target = x0
    elif diffusion.model_mean_type == "previous_x":
        target, _ = gaussian.q_posterior(diffusion, x0, x_t, t)
    else:
        target = noise

    if loss_type in ("kl", "rescaled_kl"):
        vb = vb_terms_bpd(diffusion, out, x0, x_t, t)
        if loss_type == "rescaled_kl":
            vb = vb * diffusion.num_timesteps
        mse = F.mse_loss(prediction.detach(), target, reduction="none").flatten(1).mean(1)
        return {"loss": vb, "mse": mse, "vb": vb}

    mse = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
    loss = mse
    if snr_weight:
        alpha2 = gaussian.extract(diffusion.alphas_cumprod, t, x0).flatten()
        loss = mse * (alpha2 / (1.0 - alpha2)).clamp(1.0, 1000.0)
    if v is None:
        with torch.no_grad():
            vb = vb_terms_bpd(diffusion, out, x0, x_t, t)
        return {"loss": loss, "mse": mse, "vb": vb}
    frozen = torch.cat([prediction.detach(), v], dim=1)
    vb = vb_terms_bpd(diffusion, frozen, x0, x_t, t)
    if loss_type == "rescaled_mse":
        vb = vb * (diffusion.num_timesteps / 1000.0)
    return {"loss": loss + vb, "mse": mse, "vb": vb}
