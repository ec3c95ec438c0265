"""DDIM (arXiv 2010.02502, equation 12) and its reverse, from images to noise.

eps is derived again from the clipped x0. Guidance shifts eps, and the x0 that follows from the
shifted eps is not clipped, so it may leave [-1, 1], as in the published sampler.
"""

from __future__ import annotations

import math

from adm_rt.diffusion import Diffusion, guidance
from adm_rt.ops import StepCoefficients
from adm_rt.samplers.ddpm import x0_coefficients
from adm_rt.samplers.guided_step import GuidedRun, finite


def _row(diffusion, i, guidance_scale, next_abar, sigma):
    """x = sqrt(next_abar) x0 + sqrt(1 - next_abar - sigma^2) eps + sigma z, eps out of x and x0."""
    abar = diffusion.alphas_cumprod[i]
    x0_x, x0_out = x0_coefficients(diffusion, i)
    eps = math.sqrt(max(1.0 - next_abar - sigma**2, 0.0) / (1.0 - abar))
    return StepCoefficients(
        x0_x=x0_x,
        x0_out=x0_out,
        guide_x0=guidance.score_shift(guidance_scale, abar),
        next_x=eps,
        next_x0=math.sqrt(next_abar) - eps * math.sqrt(abar),
        noise=sigma,
    )


def coefficients(
    diffusion: Diffusion, i: int, guidance_scale: float = 0.0, eta: float = 0.0
) -> StepCoefficients:
    """The row of the step from position ``i`` to ``i - 1``."""
    abar, previous = diffusion.alphas_cumprod[i], diffusion.alphas_cumprod_prev[i]
    sigma = eta * math.sqrt((1.0 - previous) / (1.0 - abar)) * math.sqrt(1.0 - abar / previous)
    return _row(diffusion, i, guidance_scale, previous, sigma)


def reverse_coefficients(
    diffusion: Diffusion, i: int, guidance_scale: float = 0.0
) -> StepCoefficients:
    """The row of the step from position ``i`` to ``i + 1``; after the last one abar is 0."""
    return _row(diffusion, i, guidance_scale, diffusion.alphas_cumprod_next[i], 0.0)


def ddim(
    engine, x, diffusion: Diffusion, y=None, guidance_scale: float = 0.0, *, eta=0.0, **options
):
    """x_T [N, C, H, W] to x_0 in ``diffusion.num_timesteps`` steps; ``options`` as in GuidedRun.

    ``eta`` from 0 (deterministic) to 1 (as much noise as DDPM's smaller variance).
    """
    eta = finite("eta", eta, low=0.0, high=1.0)
    positions = range(diffusion.num_timesteps - 1, -1, -1)
    timesteps = diffusion.timestep_map[::-1]
    run = GuidedRun(
        engine, x, diffusion, y, guidance_scale, timesteps=timesteps, draws_noise=eta > 0, **options
    )
    for k, i in enumerate(positions):
        step = run.step(k, x, coefficients(diffusion, i, guidance_scale, eta))
        if step.stop:
            return step.x0
        x = step.x
    return x


def ddim_reverse(engine, x, diffusion: Diffusion, y=None, guidance_scale: float = 0.0, **options):
    """Images x_0 [N, C, H, W] to the noise from which :func:`ddim` makes them again.

    The published step has no guidance; here it enters as in :func:`ddim`, so that a guided run can
    be reversed too. ``options`` as in GuidedRun.
    """
    timesteps = diffusion.timestep_map
    run = GuidedRun(engine, x, diffusion, y, guidance_scale, timesteps=timesteps, **options)
    for i in range(diffusion.num_timesteps):
        step = run.step(i, x, reverse_coefficients(diffusion, i, guidance_scale))
        if step.stop:
            return step.x0
        x = step.x
    return x
