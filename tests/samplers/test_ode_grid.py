"""Where the multistep solvers' grid starts and ends."""

import numpy as np
import pytest

from adm_rt.diffusion import Diffusion
from adm_rt.samplers.ode_grid import MIN_HALF_LOG_SNR, ode_grid


@pytest.mark.parametrize("steps", ["5", "25", "100"])
def test_linear_grid_runs_from_the_last_timestep_to_the_first(steps):
    grid = ode_grid(Diffusion(timestep_respacing=steps))
    np.testing.assert_allclose(grid.timesteps, np.linspace(999, 0, int(steps) + 1), atol=1e-12)


@pytest.mark.parametrize("steps", ["5", "25", "100"])
def test_cosine_grid_starts_where_x0_can_still_be_computed(steps):
    diffusion = Diffusion(noise_schedule="cosine", timestep_respacing=steps)
    grid = ode_grid(diffusion)
    assert grid.half_log_snr[0] == pytest.approx(MIN_HALF_LOG_SNR, abs=1e-9)
    assert 990 < grid.timesteps[0] < 999
    assert 1 / grid.alpha[0] < 200  # 20,000 at t = 999
    np.testing.assert_allclose(np.diff(grid.timesteps, 2), 0, atol=1e-9)
    assert grid.timesteps[-1] == 0


def test_an_earlier_start_is_kept():
    grid = ode_grid(Diffusion(noise_schedule="cosine", timestep_respacing="ddim25"))
    assert grid.timesteps[0] == 960
