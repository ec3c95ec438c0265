"""The three ops of ADM and the noise they share; ``reference`` is their specification.

Importing this package imports neither torch nor the compiled extension.
"""

import importlib

from adm_rt.ops._backend import reference_forced, use_reference
from adm_rt.ops.ada_group_norm import ada_group_norm
from adm_rt.ops.guided_mean_update import StepCoefficients, count_nonfinite, guided_mean_update
from adm_rt.ops.philox import philox_normal
from adm_rt.ops.qkv_attention import qkv_attention

__all__ = [
    "StepCoefficients",
    "ada_group_norm",
    "ada_group_norm_resample",
    "count_nonfinite",
    "guided_mean_update",
    "philox_normal",
    "qkv_attention",
    "reference",
    "reference_forced",
    "use_reference",
]


def __getattr__(name):
    if name == "reference":
        return importlib.import_module("adm_rt.ops.reference")
    if name == "ada_group_norm_resample":  # torch only
        return importlib.import_module(
            "adm_rt.ops._ada_group_norm_resample"
        ).ada_group_norm_resample
    raise AttributeError(f"module 'adm_rt.ops' has no attribute {name!r}")
