"""From an image of any size to a square one, with the arithmetic of the published data loader.

The resampling is part of a data set: other filters give other statistics. So the size is halved by
a box filter while the shorter side is at least twice the wanted one, brought to it by one bicubic
resampling, and the square is cut out of the middle, or at random places and scales of 0.8 to 1.
"""

from __future__ import annotations

import math

import numpy as np

from adm_rt.errors import DataError

MIN_CROP_FRACTION, MAX_CROP_FRACTION = 0.8, 1.0  # side of a random crop over the shorter side
# A long strip is enlarged along both sides; past this many pixels it is refused.
MAX_RESIZED_PIXELS = 1 << 27


def center_crop(image, image_size: int) -> np.ndarray:
    """The middle square of a PIL image (RGB), resampled: uint8 [image_size, image_size, 3].

    Smaller images are enlarged (bicubic). DataError when a strip is too long to be resampled.
    """
    pixels = _shrink(image, image_size)
    top = (pixels.shape[0] - image_size) // 2
    left = (pixels.shape[1] - image_size) // 2
    return pixels[top : top + image_size, left : left + image_size]


def random_crop(image, image_size: int, draws) -> np.ndarray:
    """A square of random scale and place: uint8 [image_size, image_size, 3].

    draws: three uniforms in [0, 1): the shorter side before the cut (an integer from image_size to
    ceil(image_size / 0.8), all equally likely), then the row and the column of the cut.
    """
    smallest = math.ceil(image_size / MAX_CROP_FRACTION)
    largest = math.ceil(image_size / MIN_CROP_FRACTION)
    side = smallest + int(draws[0] * (largest + 1 - smallest))
    pixels = _shrink(image, side)
    top = int(draws[1] * (pixels.shape[0] - image_size + 1))
    left = int(draws[2] * (pixels.shape[1] - image_size + 1))
    return pixels[top : top + image_size, left : left + image_size]


def lsun_crop(image, image_size: int) -> np.ndarray:
    """The published preparation of LSUN: one box resampling, then the middle square."""
    from PIL import Image

    pixels = _resize(image, image_size, Image.Resampling.BOX)
    top = (pixels.shape[0] - image_size) // 2
    left = (pixels.shape[1] - image_size) // 2
    return pixels[top : top + image_size, left : left + image_size]


def area_downsample(images, small_size: int):
    """The low-resolution input of an upsampler: images averaged over areas, as published.

    images: floating-point torch tensor [N, C, H, W]; small_size: 1 .. min(H, W).
    Returns [N, C, small_size, small_size] of the same dtype, not rounded to 8 bits.
    """
    import torch.nn.functional as F

    shape = list(getattr(images, "shape", ()))
    if len(shape) != 4 or not images.dtype.is_floating_point:
        raise TypeError(
            f"images must be a float tensor [N, C, H, W], got "
            f"{getattr(images, 'dtype', type(images).__name__)} with shape {shape}"
        )
    if isinstance(small_size, bool) or not isinstance(small_size, int):
        raise TypeError(f"small_size must be an integer, got {small_size!r}")
    if not 1 <= small_size <= min(shape[2:]):
        raise ValueError(
            f"small_size must be an integer from 1 to {min(shape[2:])} (the images are "
            f"{shape[2]}x{shape[3]}), got {small_size}"
        )
    return F.interpolate(images, (small_size, small_size), mode="area")


def _shrink(image, side: int) -> np.ndarray:
    from PIL import Image

    while min(image.size) >= 2 * side:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    return _resize(image, side, Image.Resampling.BICUBIC)


def _resize(image, side: int, resample) -> np.ndarray:
    """uint8 [H, W, 3] whose shorter side is `side`."""
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    if width * height > MAX_RESIZED_PIXELS:
        raise DataError(
            f"the image is {image.size[0]}x{image.size[1]}, too long and thin to bring its shorter "
            f"side to {side} (that would be {width}x{height} pixels)"
        )
    return np.asarray(image.resize((width, height), resample))
