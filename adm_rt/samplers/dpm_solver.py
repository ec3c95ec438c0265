"""DPM-Solver++(2M): second-order multistep on the x0 prediction (arXiv 2211.01095, algorithm 2)."""

from __future__ import annotations

import math

from adm_rt.diffusion import Diffusion
from adm_rt.ops import StepCoefficients
from adm_rt.samplers.guided_step import GuidedRun
from adm_rt.samplers.ode_grid import OdeGrid, ode_grid


def coefficients(grid: OdeGrid, k: int, guidance_scale: float = 0.0) -> StepCoefficients:
    """The row of the step from grid point ``k`` to ``k + 1``; history: the x0 of step ``k - 1``.

    The first and the last step are of first order (which is DDIM): there is no history yet, and
    the last interval is by far the longest in lambda.
    """
    lam = grid.half_log_snr
    h = lam[k + 1] - lam[k]
    gain = -grid.alpha[k + 1] * math.expm1(-h)
    row = grid.evaluation(k, guidance_scale)._replace(
        next_x=grid.sigma[k + 1] / grid.sigma[k], next_x0=gain
    )
    if k in (0, len(lam) - 2):
        return row
    weight = h / (2.0 * (lam[k] - lam[k - 1]))
    return row._replace(next_x0=gain * (1.0 + weight), next_h0=-gain * weight)


def dpmpp_2m(engine, x, diffusion: Diffusion, y=None, guidance_scale: float = 0.0, **options):
    """x [N, C, H, W] at the last kept timestep to the first, ``diffusion.num_timesteps`` steps.

    ``options`` as in GuidedRun; the grid is that of ``ode_grid``.
    """
    grid = ode_grid(diffusion)
    run = GuidedRun(
        engine, x, diffusion, y, guidance_scale, timesteps=grid.timesteps[:-1], **options
    )
    history = ()
    for k in range(diffusion.num_timesteps):
        step = run.step(k, x, coefficients(grid, k, guidance_scale), history=history)
        if step.stop:
            return step.x0
        x, history = step.x, (step.x0,)
    return x
