"""The time grid of the multistep ODE solvers, in float64.

K network evaluations on a grid of K + 1 points, uniform in the timestep of the original process and
fractional, from the last kept timestep to the first. Between the entries of the original table log
alpha is linear, as in the discrete-time mapping of DPM-Solver (arXiv 2206.00927, appendix D.1). The
run ends at the noise level of the last grid point, not at x_0; at t = 0 that is a standard
deviation of 0.01 with the linear schedule.

A grid starts no earlier than lambda = log(alpha / sigma) = -5.1, just below the linear schedule's
end (-5.06). The cosine schedule goes on to alpha = 5e-5, where x0 = (x - sigma eps) / alpha and the
guidance in it are multiples of rounding errors; DPM-Solver cuts it at about the same place
(arXiv 2206.00927, appendix D.3).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from adm_rt.diffusion import Diffusion, guidance
from adm_rt.ops import StepCoefficients

MIN_HALF_LOG_SNR = -5.1


class OdeGrid(NamedTuple):
    """x_t = alpha x_0 + sigma eps. float64 [K + 1] each, except x0_x and x0_out [K]."""

    timesteps: np.ndarray  # of the original process
    alpha: np.ndarray
    sigma: np.ndarray
    half_log_snr: np.ndarray  # lambda = log(alpha / sigma), increasing along the grid
    x0_x: np.ndarray  # x0 = x0_x * x + x0_out * output
    x0_out: np.ndarray

    def evaluation(self, k: int, guidance_scale: float) -> StepCoefficients:
        """A row with only x0's coefficients at grid point ``k``."""
        return StepCoefficients(
            x0_x=self.x0_x[k],
            x0_out=self.x0_out[k],
            guide_x0=guidance.score_shift(guidance_scale, self.alpha[k] ** 2),
        )


def log_alpha(diffusion: Diffusion, t) -> np.ndarray:
    """log sqrt(abar) at fractional timesteps of the original process, from -1 (no noise) up."""
    points = np.arange(-1, diffusion.steps)
    values = np.append(0.0, 0.5 * np.log(diffusion.original_alphas_cumprod))
    return np.interp(t, points, values)


def _first_usable(diffusion: Diffusion, last: float) -> float:
    """The latest timestep up to ``last`` whose lambda is at least MIN_HALF_LOG_SNR."""
    # lambda = -5.1 in terms of alpha: alpha^2 / (1 - alpha^2) = exp(-10.2).
    lowest = -0.5 * np.log1p(np.exp(-2 * MIN_HALF_LOG_SNR))
    points = np.arange(-1, diffusion.steps)
    return min(last, float(np.interp(-lowest, -log_alpha(diffusion, points), points)))


def ode_grid(diffusion: Diffusion) -> OdeGrid:
    """The grid with ``diffusion.num_timesteps`` evaluations."""
    first, last = diffusion.timestep_map[0], diffusion.timestep_map[-1]
    if first == last:
        last = diffusion.steps - 1  # a single kept step is t = 0; one evaluation starts from noise
    if first == last:
        raise ValueError("steps=1: an ODE solver needs an original process of at least 2 steps.")
    last = _first_usable(diffusion, last)
    timesteps = np.linspace(last, first, diffusion.num_timesteps + 1)
    half_log = log_alpha(diffusion, timesteps)
    alpha, sigma = np.exp(half_log), np.sqrt(-np.expm1(2 * half_log))
    x0_x, x0_out = _x0_coefficients(diffusion, timesteps[:-1], alpha[:-1], sigma[:-1])
    return OdeGrid(timesteps, alpha, sigma, half_log - np.log(sigma), x0_x, x0_out)


def _x0_coefficients(diffusion, timesteps, alpha, sigma):
    if diffusion.model_mean_type == "xstart":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if diffusion.model_mean_type == "eps":
        return 1.0 / alpha, -sigma / alpha
    # The posterior mean one step of the original process earlier, as the network was trained.
    abar, previous = alpha**2, np.exp(2 * log_alpha(diffusion, timesteps - 1.0))
    coef1 = (1.0 - abar / previous) * np.sqrt(previous) / (1.0 - abar)
    coef2 = (1.0 - previous) * np.sqrt(abar / previous) / (1.0 - abar)
    return -coef2 / coef1, 1.0 / coef1
