"""What a sampler needs from whatever runs the networks."""

from __future__ import annotations

import os
from typing import Any, Protocol, runtime_checkable

import numpy as np

DTYPES = ("float32", "bfloat16", "float16")
# What a classifier's gradient is multiplied by on its way: float16 ends at 6e-8.
LOSS_SCALES = {"float32": 1.0, "bfloat16": 1.0, "float16": 128.0}


@runtime_checkable
class Engine(Protocol):
    """Runs the denoiser and the gradient of the classifier; knows nothing of schedules.

    Arrays are of the engine's own kind (torch tensors for ``torch``); ``from_numpy`` and
    ``to_numpy`` cross the border. All images are [N, C, H, W] in about [-1, 1], ``t`` is one
    timestep of the ORIGINAL process for the whole batch (fractions allowed), ``y`` int64 [N].

    An engine may also have ``run_captured(sampler, x, diffusion, y, guidance_scale, **options)``,
    a whole run at once: a ``captured_run.Run``, or None where its steps have to be run one by one.
    """

    name: str  # "torch", ...
    device: str  # "cpu", "cuda:0", ...
    dtype: str  # what the networks compute in: "float32", ...
    notes: list[str]  # one-line remarks on choices made for the user (an ignored flag, ...)

    def from_numpy(self, values: np.ndarray) -> Any:
        """A NumPy array as the engine's own kind on its device, same dtype."""

    def to_numpy(self, values: Any) -> np.ndarray:
        """The engine's own kind as a NumPy array."""

    def denoise(self, x, t: float, y=None, low_res=None):
        """Model output [N, C or 2C, H, W] float32: the prediction, then the learned variance.

        ``y`` is ignored by a network without classes; ``low_res`` [N, C, h, w] in [-1, 1] is
        needed by an upsampler and by nothing else.
        """

    def classifier_gradient(self, x, t: float, y):
        """d log p(y | x_t) / d x_t, [N, C, H, W] float32, not scaled."""

    def prepare(self, timesteps) -> None:
        """The timesteps that the calling thread is about to use, in order; a hint."""

    def image_bytes(self, guided: bool = False) -> int:
        """Bytes of working memory per image of a batch, without or with the classifier."""


# How the remark begins why "auto" leaves a GPU alone.
UNUSED_GPU = (
    "there is a GPU, but the CPU is used, because the CUDA kernels are not built (ADM_RT_CUDA=on "
    "pip install . builds them where nvcc is): "
)
# On Linux, in some sandboxes, and under Windows Subsystem for Linux.
_DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")


def driver_is_there():
    """Whether an NVIDIA driver seems to be there: without it nothing heavy has to be asked."""
    return any(os.path.exists(path) for path in _DRIVERS)


def check_fit(unet_cfg, classifier_cfg):
    """ValueError when the classifier cannot guide this denoiser (size or class count)."""
    if classifier_cfg.kind != "classifier":
        raise ValueError(
            f"classifier: the given model is of kind {classifier_cfg.kind!r}, not a classifier"
        )
    if classifier_cfg.image_size != unet_cfg.image_size:
        raise ValueError(
            f"classifier: it was made for {classifier_cfg.image_size}x{classifier_cfg.image_size} "
            f"images, but the model makes {unet_cfg.image_size}x{unet_cfg.image_size}; "
            "use the classifier of the model's own size"
        )
    if unet_cfg.class_cond and classifier_cfg.num_classes != unet_cfg.num_classes:
        raise ValueError(
            f"classifier: it knows {classifier_cfg.num_classes} classes, but the model has "
            f"{unet_cfg.num_classes}; use a classifier trained on the same classes"
        )


def check_low_res(low_res, cfg):
    """ValueError unless small images are given exactly where the network is an upsampler."""
    if (low_res is not None) != (cfg.kind == "upsampler"):
        raise ValueError(
            "low_res is missing: an upsampler needs the small images [N, C, h, w]"
            if low_res is None
            else "low_res was given, but the model is not an upsampler"
        )


def check_images(values, name, channels, side, count=None):
    """NumPy float32, C-contiguous; ValueError unless [count, channels, side, side]."""
    values = np.ascontiguousarray(values, np.float32)
    n = values.shape[0] if values.ndim else 0
    if values.shape != (n, channels, side, side) or n < 1 or count not in (None, n):
        count = "N" if count is None else count
        raise ValueError(
            f"{name} has shape {values.shape}; [{count}, {channels}, {side}, {side}] is needed"
        )
    return values


def check_labels(y, count, classes):
    """NumPy integers [count]; ValueError unless they are that and in 0..classes-1."""
    if y is None:
        raise ValueError(
            f"y is missing: the model is class-conditional, pass int64 [{count}] labels in "
            f"0..{classes - 1}"
        )
    y = np.asarray(y)
    if y.shape != (count,) or y.dtype.kind not in "iu":
        raise ValueError(f"y has shape {y.shape}, {y.dtype}; int64 labels [{count}] are needed")
    if y.min() < 0 or y.max() >= classes:
        bad = y[(y < 0) | (y >= classes)][0]
        raise ValueError(f"y: label {bad} is not in 0..{classes - 1}")
    return y
