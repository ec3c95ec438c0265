"""Engines: what runs the networks. ``create`` makes one by name; one line here adds one."""

from __future__ import annotations

import importlib

from adm_rt.engines.base import UNUSED_GPU, Engine, driver_is_there
from adm_rt.export.manifest import ExportedNetwork
from adm_rt.ops._library import why_no_cuda_kernels

__all__ = ["ENGINES", "RUNS_EXPORTED", "Engine", "choose", "create"]

# name -> (module, class); modules are imported on first use
ENGINES = {
    "native": ("adm_rt.engines.native_engine", "NativeEngine"),
    "onnx": ("adm_rt.engines.onnx_engine", "OnnxEngine"),
    "tensorrt": ("adm_rt.engines.tensorrt_engine", "TensorRTEngine"),
    "torch": ("adm_rt.engines.torch_engine", "TorchEngine"),
}
# the engines that take the ``ExportedNetwork`` s of an exported folder
RUNS_EXPORTED = ("onnx", "tensorrt")


def choose(name="auto", device="auto", exported=False):
    """Resolve an engine name to (name, reason). Raises ValueError for one this build has not.

    "auto" is the native engine on the CPU and the torch engine on CUDA, where ``device`` asks for
    it or is "auto" and a GPU is there that torch and our kernels can use. exported: the model is an
    exported folder, which "auto" gives to the onnx engine and which others than ``RUNS_EXPORTED``
    refuse.
    """
    if name == "auto":
        return ("onnx", "the model is an exported folder") if exported else _automatic(device)
    if name in ENGINES:
        if exported and name not in RUNS_EXPORTED:
            able = " or ".join(repr(n) for n in ("auto", *RUNS_EXPORTED))
            raise ValueError(
                f"engine={name!r} cannot run an exported folder, which holds graphs; use "
                f"engine={able}, or give the model that was exported"
            )
        return name, "asked for"
    available = ", ".join(repr(n) for n in ("auto", *ENGINES))
    raise ValueError(f"engine={name!r} is unknown; available: {available}")


def create(name, unet, classifier=None, device="cpu", dtype="auto", **options):
    """An ``Engine`` over built networks.

    name: "auto", or a key of ``ENGINES``. unet: ``UNet`` or ``SuperResUNet``, or the
    ``ModelWeights`` or ``ExportedNetwork`` of one. classifier: ``NoisyClassifier``, its
    ``ModelWeights``, its gradient as an ``ExportedNetwork``, or None. device: "auto", "cpu",
    "cuda", "cuda:N". dtype: "float32", "bfloat16", "float16"; "auto" is float32 (TensorRT:
    float16), or that of an exported folder. options: further arguments of the engine's class.
    Raises ValueError for an unknown name, device or dtype and for a classifier that does not fit
    the denoiser.
    """
    exported = isinstance(unet, ExportedNetwork)
    chosen, why = choose(name, device, exported)
    module, cls = ENGINES[chosen]
    engine = getattr(importlib.import_module(module), cls)
    engine = engine(unet, classifier, device=device, dtype=dtype, **options)
    if why.startswith(UNUSED_GPU):
        engine.notes.append(why)
    return engine


def _automatic(device):
    if device not in ("auto", "cpu"):
        return "torch", f"device={device} was asked for"
    if device == "auto" and driver_is_there():
        import torch  # only where there is a driver

        if torch.cuda.is_available():
            missing = why_no_cuda_kernels()
            return ("native", UNUSED_GPU + missing) if missing else ("torch", "there is a GPU")
    return "native", "the fastest on a CPU"
