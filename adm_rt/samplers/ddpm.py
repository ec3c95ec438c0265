"""Ancestral sampling: DDPM (arXiv 2006.11239, algorithm 2) with learned or fixed variances.

``x_{t-1} = mean + sigma z``, with the posterior mean at the predicted (clipped) x0 and no noise in
the last step. Guidance moves the mean by variance * scale * gradient; x0 is left alone.
"""

from __future__ import annotations

from adm_rt.diffusion import Diffusion
from adm_rt.ops import StepCoefficients
from adm_rt.samplers.guided_step import GuidedRun


def x0_coefficients(diffusion: Diffusion, i: int) -> tuple[float, float]:
    """(a, b) with x0 = a * x + b * output at position ``i``, for any prediction target."""
    if diffusion.model_mean_type == "xstart":
        return 0.0, 1.0
    if diffusion.model_mean_type == "previous_x":
        coef1, coef2 = diffusion.posterior_mean_coef1[i], diffusion.posterior_mean_coef2[i]
        return -coef2 / coef1, 1.0 / coef1
    return diffusion.sqrt_recip_alphas_cumprod[i], -diffusion.sqrt_recipm1_alphas_cumprod[i]


def coefficients(diffusion: Diffusion, i: int, guidance_scale: float = 0.0) -> StepCoefficients:
    """The row of the step from position ``i`` to ``i - 1``.

    A network that predicts the previous x gives the mean itself, whatever clipping does to the x0
    derived from it, so its output enters as the first history tensor.
    """
    x0_x, x0_out = x0_coefficients(diffusion, i)
    max_log = {
        "learned_range": diffusion.log_betas,
        "fixed_large": diffusion.fixed_large_log_variance,
        "fixed_small": diffusion.posterior_log_variance_clipped,
    }[diffusion.model_var_type]
    # The true posterior variance at i = 0 is 0; only its logarithm is clipped.
    no_shift = diffusion.model_var_type == "fixed_small" and i == 0
    row = StepCoefficients(
        x0_x=x0_x,
        x0_out=x0_out,
        guide_mean=0.0 if no_shift else guidance_scale,
        min_log=diffusion.posterior_log_variance_clipped[i],
        max_log=max_log[i],
        noise=1.0 if i > 0 else 0.0,
    )
    if diffusion.model_mean_type == "previous_x":
        return row._replace(next_h0=1.0)
    return row._replace(
        next_x=diffusion.posterior_mean_coef2[i], next_x0=diffusion.posterior_mean_coef1[i]
    )


def ddpm(engine, x, diffusion: Diffusion, y=None, guidance_scale: float = 0.0, **options):
    """x_T [N, C, H, W] to x_0 in ``diffusion.num_timesteps`` steps; ``options`` as in GuidedRun."""
    positions = range(diffusion.num_timesteps - 1, -1, -1)
    timesteps = diffusion.timestep_map[::-1]
    if options.get("eta", 0.0) != 0:
        raise ValueError(f"eta={options['eta']!r}: ddpm has no eta; use 0, or sampler 'ddim'.")
    run = GuidedRun(
        engine, x, diffusion, y, guidance_scale, timesteps=timesteps, draws_noise=True, **options
    )
    for k, i in enumerate(positions):
        step = run.step(
            k,
            x,
            coefficients(diffusion, i, guidance_scale),
            learned_variance=diffusion.learn_sigma,
            keep_output=diffusion.predict_previous,
        )
        if step.stop:
            return step.x0
        x = step.x
    return x
