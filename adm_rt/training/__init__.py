"""Training of diffusion models and noisy classifiers through the same ops that sampling uses.

``Trainer`` runs any task (``DiffusionTask``, ``ClassifierTask``); ``adm-rt train`` is its command.
"""

import importlib

_EXPORTS = {
    "Trainer": "trainer",
    "TrainConfig": "trainer",
    "DiffusionTask": "tasks",
    "ClassifierTask": "tasks",
}
__all__ = list(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'adm_rt.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adm_rt.training.{_EXPORTS[name]}"), name)
