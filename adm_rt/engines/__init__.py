"""Engines: what runs the networks. ``create`` makes one by name; one line here adds one."""

from __future__ import annotations

import importlib

from adm_rt.engines.base import Engine

__all__ = ["ENGINES", "PLANNED", "Engine", "choose", "create"]

# name -> (module, class); modules are imported on first use
ENGINES = {"torch": ("adm_rt.engines.torch_engine", "TorchEngine")}
# names that exist in the design but not in this build
PLANNED = ("native", "onnx", "tensorrt")


def choose(name="auto"):
    """Resolve an engine name to (name, reason). Raises ValueError for one this build has not."""
    if name == "auto":
        return "torch", "the only engine in this build"
    if name in ENGINES:
        return name, "asked for"
    available = ", ".join(repr(n) for n in ("auto", *ENGINES))
    if name in PLANNED:
        raise ValueError(f"engine={name!r} is not in this build yet; available: {available}")
    raise ValueError(f"engine={name!r} is unknown; available: {available}")


def create(name, unet, classifier=None, device="cpu", dtype="float32"):
    """An ``Engine`` over built networks.

    name: "auto", or a key of ``ENGINES``. unet: ``UNet`` or ``SuperResUNet``. classifier:
    ``NoisyClassifier`` or None. device: "auto", "cpu", "cuda", "cuda:N". dtype: "auto",
    "float32", "bfloat16", "float16". Raises ValueError for an unknown name, device or dtype and
    for a classifier that does not fit the denoiser.
    """
    module, cls = ENGINES[choose(name)[0]]
    engine = getattr(importlib.import_module(module), cls)
    return engine(unet, classifier, device=device, dtype=dtype)
