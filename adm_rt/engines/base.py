"""What a sampler needs from whatever runs the networks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

DTYPES = ("float32", "bfloat16", "float16")


@runtime_checkable
class Engine(Protocol):
    """Runs the denoiser and the gradient of the classifier; knows nothing of schedules.

    Arrays are of the engine's own kind (torch tensors for ``torch``); ``from_numpy`` and
    ``to_numpy`` cross the border. All images are [N, C, H, W] in about [-1, 1], ``t`` is one
    timestep of the ORIGINAL process for the whole batch (fractions allowed), ``y`` int64 [N].
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
