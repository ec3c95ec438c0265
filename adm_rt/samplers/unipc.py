"""UniPC-2, the B2(h) variant on the x0 prediction (arXiv 2302.04867, algorithms 5-8).

A step's network evaluation ``m_k = x0(x_k)`` at the predicted point serves twice: the corrector
replaces x_k by ``c_k``, using m_k on the interval just passed, and the predictor goes on from c_k:

    c_k     = A c_{k-1} + B m_{k-1} + C m_{k-2} + D m_k
    x_{k+1} = a c_k     + b m_k     + c m_{k-1}

Both are linear, so one row holds them: ``history`` is (c_{k-1}, m_{k-1}, m_{k-2}) and ``state`` is
c_k. x_k itself only enters through m_k. The first and the last interval are of first order; the
last has no corrector, as that would need one more evaluation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from adm_rt.diffusion import Diffusion
from adm_rt.ops import StepCoefficients
from adm_rt.samplers.guided_step import GuidedRun
from adm_rt.samplers.ode_grid import OdeGrid, ode_grid


class _Interval(NamedTuple):
    """Weights of an interval's end in its start x and in x0 at its end, start and one before."""

    x: float
    end: float
    start: float
    before: float


def _order(grid, j):
    """The order of the interval that ends at grid point ``j``."""
    return 1 if j in (1, len(grid.timesteps) - 1) else 2


def _interval(grid: OdeGrid, j: int, correct: bool) -> _Interval:
    """From grid point ``j - 1`` to ``j``: the predictor, or the corrector, which knows the end."""
    lam = grid.half_log_snr
    h = lam[j] - lam[j - 1]
    phi1 = math.expm1(-h)
    scale = -grid.alpha[j] * phi1  # B(h) = expm1(-h) in front of the differences, too
    x = grid.sigma[j] / grid.sigma[j - 1]
    if _order(grid, j) == 1:
        end = 0.5 if correct else 0.0
        return _Interval(x, scale * end, scale * (1.0 - end), 0.0)
    r = (lam[j - 2] - lam[j - 1]) / h  # negative
    if not correct:
        weight_before, end = 0.5, 0.0
    else:
        # Exact for polynomials of degree 2: [[1, 1], [r, 1]] w = (b1, b2).
        phi2 = phi1 / -h - 1.0
        phi3 = phi2 / -h - 0.5
        b1, b2 = phi2 / phi1, 2.0 * phi3 / phi1
        weight_before = (b1 - b2) / (1.0 - r)
        end = b1 - weight_before
    before = weight_before / r
    return _Interval(x, scale * end, scale * (1.0 - before - end), scale * before)


def coefficients(grid: OdeGrid, k: int, guidance_scale: float = 0.0) -> StepCoefficients:
    """The row of evaluation ``k``: corrector of the interval behind, predictor of the one ahead."""
    row = grid.evaluation(k, guidance_scale)
    ahead = _interval(grid, k + 1, correct=False)
    last = k + 2 == len(grid.timesteps)
    if k == 0:
        row = row._replace(next_x=ahead.x, next_x0=ahead.start)
        return row if last else row._replace(state_x=1.0)
    behind = _interval(grid, k, correct=True)
    row = row._replace(
        next_x0=ahead.x * behind.end + ahead.start,
        next_h0=ahead.x * behind.x,
        next_h1=ahead.x * behind.start + ahead.before,
        next_h2=ahead.x * behind.before,
    )
    if last:
        return row
    return row._replace(
        state_x0=behind.end, state_h0=behind.x, state_h1=behind.start, state_h2=behind.before
    )


def unipc(engine, x, diffusion: Diffusion, y=None, guidance_scale: float = 0.0, **options):
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
        x, history = step.x, (step.state, step.x0, *history[1:2])
    return x
