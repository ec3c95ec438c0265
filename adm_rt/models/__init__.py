"""ADM models: configurations and presets (no torch), torch modules, checkpoints.

Everything is loaded on first use, so that reading a configuration never imports torch.
"""

import importlib

_EXPORTS = {
    "ModelConfig": "config",
    "preset": "presets",
    "list_presets": "presets",
    "UNet": "unet",
    "SuperResUNet": "unet",
    "NoisyClassifier": "classifier",
    "load_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "load_weights": "checkpoint",
    "ModelWeights": "model_weights",
    "save_model": "checkpoint",
}
__all__ = [*_EXPORTS, "build"]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'adm_rt.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adm_rt.models.{_EXPORTS[name]}"), name)


def build(cfg):
    """The torch module of a ``ModelConfig``, with fresh weights, on torch's current device."""
    classes = {"diffusion": "UNet", "upsampler": "SuperResUNet", "classifier": "NoisyClassifier"}
    return __getattr__(classes[cfg.kind])(cfg)
