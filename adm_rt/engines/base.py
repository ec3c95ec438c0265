"""What a sampler needs from whatever runs the networks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np


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
