"""Training of diffusion models and noisy classifiers through the same ops that sampling uses.

``train`` makes a whole run from names and numbers, as ``adm-rt train`` does. ``Trainer`` runs a
task (``DiffusionTask``, ``UpsamplerTask``, ``ClassifierTask``) on a network of one's own.
"""

import importlib

_EXPORTS = {
    "train": "run",
    "Trainer": "trainer",
    "TrainConfig": "trainer",
    "DiffusionTask": "tasks",
    "UpsamplerTask": "tasks",
    "ClassifierTask": "tasks",
}
__all__ = list(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'adm_rt.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adm_rt.training.{_EXPORTS[name]}"), name)
