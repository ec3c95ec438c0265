"""Classifier guidance as numbers: where it acts in each kind of step, and when it is evaluated.

With ``g = d log p(y | x_t) / d x_t`` and scale ``s`` (arXiv 2105.05233, section 4):

- DDPM, algorithm 1: the mean moves by ``s * variance * g``; x0 stays as predicted. As in the
  published code, g is taken at x_t, not at the mean.
- DDIM and ODE solvers, algorithm 2: ``eps -= s * sqrt(1 - abar) * g``. In terms of the predicted x0
  that is ``x0 += s * (1 - abar) / sqrt(abar) * g``, and the result is not clamped again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SKIP, FRESH, REUSE = "skip", "fresh", "reuse"


def score_shift(guidance_scale: float, alpha_cumprod: float) -> float:
    """What the gradient is multiplied with before it is added to x0 (DDIM and ODE solvers)."""
    return guidance_scale * (1.0 - alpha_cumprod) / math.sqrt(alpha_cumprod)


def inside(t: float, interval: tuple[float, float] | None) -> bool:
    """Whether guidance acts at timestep ``t`` of the original process; both ends count."""
    return interval is None or interval[0] <= t <= interval[1]


def gradient_plan(
    timesteps: Sequence[float], interval: tuple[float, float] | None = None, every: int = 1
) -> list[str]:
    """For each step: SKIP (no guidance), FRESH (evaluate the gradient) or REUSE (the latest one).

    Within the interval the gradient is evaluated at the first step and then at every ``every``-th.
    """
    plan = []
    since = None
    for t in timesteps:
        if not inside(t, interval):
            plan.append(SKIP)
            since = None
            continue
        since = 0 if since is None else since + 1
        plan.append(FRESH if since % every == 0 else REUSE)
    return plan
