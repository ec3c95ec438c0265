"""Measuring samples: metrics in NumPy, judge networks, the guidance sweep, bits per dim.

`adm_rt.evaluation.metrics` needs NumPy alone; `judge` needs torch, and is loaded when first used.
"""

import importlib

from adm_rt.evaluation.metrics import (
    class_accuracy,
    coverage,
    frechet_distance,
    precision_recall,
)

_LAZY = {
    "Judge": "judge",
    "train_judge": "judge",
    "save_judge": "judge",
    "load_judge": "judge",
    "guidance_sweep": "guidance_sweep",
    "bits_per_dim": "nll",
    "DigitScores": "digits",
}
__all__ = ["class_accuracy", "coverage", "frechet_distance", "precision_recall", *_LAZY]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
