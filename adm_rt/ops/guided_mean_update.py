"""The op that ends every sampler step: x0, clip, guidance, linear update, noise in one pass."""

from typing import NamedTuple

import numpy as np

from .philox import STEP_NOISE, philox_normal


class StepCoefficients(NamedTuple):
    """One step's row of coefficients: what makes one op every sampler's update.

    Every update in use (DDPM, DDIM, DPM-Solver++, UniPC) is linear in x, x0, at most three history
    tensors and the noise. Make a row in float64; the kernels round it to float32 once.
    """

    cfg: float = 0.0
    x0_x: float = 0.0
    x0_out: float = 0.0
    guide_x0: float = 0.0
    guide_mean: float = 0.0
    next_x: float = 0.0
    next_x0: float = 0.0
    next_h0: float = 0.0
    next_h1: float = 0.0
    next_h2: float = 0.0
    state_x: float = 0.0
    state_x0: float = 0.0
    state_h0: float = 0.0
    state_h1: float = 0.0
    state_h2: float = 0.0
    min_log: float = 0.0
    max_log: float = 0.0
    noise: float = 0.0

    def row(self):
        """The coefficients as a float64 [18] array, in field order."""
        return np.array(self, dtype=np.float64)


def guided_mean_update(
    x,
    model_output,
    coefficients,
    *,
    gradient=None,
    uncond_output=None,
    history=(),
    noise=None,
    seeds=None,
    step=0,
    learned_variance=False,
    clip="static",
    quantile=0.995,
):
    """See StepCoefficients. Returns (x_next, x0, state or None), arrays of x's kind."""
    import torch

    from . import reference

    is_numpy = isinstance(x, np.ndarray)
    if noise is None and seeds is not None and coefficients.noise != 0:
        noise = philox_normal(seeds, tuple(x.shape[1:]), step, STEP_NOISE)

    def tensor(a):
        return None if a is None else torch.as_tensor(a)

    with torch.no_grad():
        results = reference.guided_mean_update(
            tensor(x),
            tensor(model_output),
            coefficients,
            gradient=tensor(gradient),
            uncond_output=tensor(uncond_output),
            history=[tensor(h) for h in history],
            noise=None if noise is None else tensor(noise).to(tensor(x).dtype),
            learned_variance=learned_variance,
            clip=clip,
            quantile=quantile,
        )
    return tuple(r.numpy() if is_numpy and r is not None else r for r in results)


def count_nonfinite(x):
    """Number of NaN or infinite values per image: x [N, ...] -> NumPy int64 [N]."""
    x = x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()
    return (~np.isfinite(x)).reshape(len(x), -1).sum(axis=1)
