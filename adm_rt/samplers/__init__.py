"""Samplers: ``SAMPLERS[name](engine, x, diffusion, y, guidance_scale, noise=..., ...) -> x``.

A new sampler is a file and an entry here; see docs/add-a-sampler.md. The arguments that all share
are described in ``guided_step.GuidedRun``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from adm_rt.samplers import ddim, ddpm, dpm_solver, unipc

__all__ = ["SAMPLERS", "Sampler"]


@dataclass(frozen=True)
class Sampler:
    """A sampler and the facts that callers and tests need to know about it."""

    name: str
    function: Callable
    summary: str
    needs_noise: bool = False  # draws noise in every step
    uses_eta: bool = False  # draws noise when eta > 0
    encodes: bool = False  # runs from images to noise
    ode_order: int = 1  # of the deterministic error (eta = 0); 0 for a stochastic sampler
    uses_ode_grid: bool = False  # K + 1 uniform fractional timesteps, not the respaced ones

    def __call__(self, engine, x, diffusion, y=None, guidance_scale=0.0, **options):
        return self.function(engine, x, diffusion, y, guidance_scale, **options)


class _Registry(dict):
    def __missing__(self, name):
        near = difflib.get_close_matches(str(name), self, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"sampler={name!r} is unknown; use one of {', '.join(self)}.{hint}")


SAMPLERS: dict[str, Sampler] = _Registry(
    (sampler.name, sampler)
    for sampler in (
        Sampler("ddpm", ddpm.ddpm, "ancestral sampling", needs_noise=True, ode_order=0),
        Sampler("ddim", ddim.ddim, "DDIM, with noise by eta", uses_eta=True),
        Sampler("ddim_reverse", ddim.ddim_reverse, "images to noise", encodes=True),
        Sampler(
            "dpmpp_2m", dpm_solver.dpmpp_2m, "DPM-Solver++(2M)", ode_order=2, uses_ode_grid=True
        ),
        Sampler("unipc", unipc.unipc, "UniPC-2 (bh2)", ode_order=2, uses_ode_grid=True),
    )
)
