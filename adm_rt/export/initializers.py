"""What the initializers of an exported graph are called and how they come of the weights.

An initializer has the name of its weight in the state_dict. Where the graph needs another matrix
than the weight, the name has a suffix of ``TRANSFORMS``: convolutions of the classifier's gradient
run backwards with rotated weights. So anyone who holds a state_dict can refit a graph or an engine
by name: ``initializer(name, state)`` gives the values, in row-major order, of each. Names that
start with "const." are no weights.

Nothing here imports onnx or torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def _rotated(weight):
    """[C', C, *kernel] -> [C, C', *kernel], turned by half a turn.

    The weight of the convolution that is the data gradient of one of stride 1 (Dumoulin & Visin
    2016, section 4.2).
    """
    spatial = tuple(range(2, weight.ndim))
    return np.ascontiguousarray(np.flip(weight, spatial).swapaxes(0, 1))


TRANSFORMS = {
    ".rotated": _rotated,
    # The gradient of a 2x2 average: a quarter to each pixel, exact in every dtype.
    ".rotated_quarter": lambda weight: _rotated(weight) * np.float32(0.25),
}


def split_name(name: str) -> tuple[str, str]:
    """(the weight's name in the state_dict, the suffix or "") of an initializer."""
    for suffix in TRANSFORMS:
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def is_weight(name: str) -> bool:
    """Whether an initializer comes of a weight; others are constants of the graph."""
    return not name.startswith("const.")


def initializer(name: str, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """The float32 values of initializer ``name``; its shape in the graph may differ.

    Raises KeyError for a weight that ``state`` has not.
    """
    weight, suffix = split_name(name)
    values = state[weight]
    return TRANSFORMS[suffix](values) if suffix else values
