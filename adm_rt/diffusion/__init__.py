"""The diffusion process: tables, respacing, Gaussian formulas, guidance, training losses.

Only :mod:`adm_rt.diffusion.losses` needs torch, so it is imported on first use.
"""

from importlib import import_module

from adm_rt.diffusion.schedule import Diffusion, ddim_step_counts, respaced_timesteps

__all__ = [
    "Diffusion",
    "ddim_step_counts",
    "gaussian",
    "guidance",
    "losses",
    "respaced_timesteps",
    "schedule",
]


def __getattr__(name):
    if name in ("gaussian", "guidance", "losses"):
        return import_module(f"adm_rt.diffusion.{name}")
    raise AttributeError(f"module 'adm_rt.diffusion' has no attribute {name!r}")
