"""The published crop, against its rules written again, with NumPy's arithmetic and Pillow's."""

import math

import numpy as np
import pytest
import torch
from data_files import noise_image
from PIL import Image

from adm_rt.data import area_downsample, center_crop, lsun_crop, random_crop
from adm_rt.data.keyed_random import CROP_DRAWS, uniform
from adm_rt.errors import DataError

# (width, height, image_size): odd sizes, several halvings, none, enlarging, exact powers, strips
SIZES = [
    (64, 64, 64),
    (65, 97, 32),
    (127, 63, 32),
    (128, 64, 32),
    (257, 131, 16),
    (500, 375, 64),
    (40, 33, 64),
    (7, 5, 24),
    (300, 20, 16),
    (1, 1, 8),
]


def weights(size_in, size_out, kernel, reach):
    """[size_out, size_in]: a resampling filter, widened when it makes the image smaller."""
    scale = size_in / size_out
    widened = max(scale, 1.0)
    matrix = np.zeros((size_out, size_in))
    for row in range(size_out):
        centre = (row + 0.5) * scale
        first = max(0, int(centre - reach * widened + 0.5))
        last = min(size_in, int(centre + reach * widened + 0.5))
        for column in range(first, last):
            matrix[row, column] = kernel((column + 0.5 - centre) / widened)
        matrix[row] /= matrix[row].sum()
    return matrix


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def box(x):
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def resampled(pixels, width, height, kernel, reach):
    """Rows, then columns, each rounded to 8 bits."""
    for axis, size in ((1, width), (0, height)):
        if size != pixels.shape[axis]:
            matrix = weights(pixels.shape[axis], size, kernel, reach)
            moved = np.tensordot(matrix, pixels.astype(float), (1, axis))
            pixels = np.moveaxis(np.clip(np.floor(moved + 0.5), 0, 255).astype(np.uint8), 0, axis)
    return pixels


def restated(image, side, resize):
    """Halvings and one bicubic step to a shorter side of `side`; resize(image, (w, h), filter)."""
    width, height = image.size
    shorter = min(width, height)
    halvings = 0
    while shorter >> halvings >= 2 * side:
        halvings += 1
    for k in range(1, halvings + 1):
        image = resize(image, (width >> k, height >> k), "box")
    width, height = width >> halvings, height >> halvings
    if width < height:
        final = (side, round(height * (side / width)))
    else:
        final = (round(width * (side / height)), side)
    return resize(image, final, "bicubic")


def by_pillow(image, size, name):
    return image.resize(size, {"box": Image.BOX, "bicubic": Image.BICUBIC}[name])


class Pixels:
    """Just enough of an image for `restated`, resampled by NumPy in float64."""

    def __init__(self, array):
        self.array = array
        self.size = array.shape[1], array.shape[0]


def by_numpy(image, size, name):
    return Pixels(resampled(image.array, *size, *((box, 0.5) if name == "box" else (cubic, 2.0))))


def middle(array, size):
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top:, left:][:size, :size]


@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_centre_crop_is_the_published_one(width, height, size):
    image = noise_image(width, height)
    found = center_crop(image, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert np.array_equal(found, middle(np.asarray(restated(image, size, by_pillow)), size))


@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_the_filters_are_box_and_bicubic(width, height, size):
    # In float64; Pillow's own arithmetic has 22 bits or so, and every pass may round the other way.
    image = noise_image(width, height)
    expected = middle(restated(Pixels(np.asarray(image)), size, by_numpy).array, size)
    difference = np.abs(center_crop(image, size).astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_random_crop_is_the_published_one(width, height, size):
    image = noise_image(width, height)
    smallest, largest = size, math.ceil(size / 0.8)
    for draw in range(6):
        u = uniform(3, np.array([draw], np.uint64), 4, CROP_DRAWS)[0]
        side = list(range(smallest, largest + 1))[int(u[0] * (largest - smallest + 1))]
        whole = np.asarray(restated(image, side, by_pillow))
        top = int(u[1] * (whole.shape[0] - size + 1))
        left = int(u[2] * (whole.shape[1] - size + 1))
        expected = whole[top : top + size, left : left + size]
        assert np.array_equal(random_crop(image, size, u), expected), (draw, u)


def test_random_crops_reach_the_ends_of_their_range():
    # A ramp tells where a pixel came from: the first value gives the column of the cut.
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 4, (40, 40, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    edge = 1 - 2**-53
    assert np.array_equal(random_crop(image, 40, (0, 0, 0)), ramp)  # the least scale: no resampling
    right = random_crop(image, 32, (edge, edge, edge))  # ceil(32 / 0.8) = 40: none either
    assert np.array_equal(right, ramp[8:, 8:])


def test_lsun_crop_is_one_box_resampling():
    image = noise_image(341, 256)
    for size in (64, 100, 256, 300):
        scaled = image.resize((round(341 * size / 256), size), Image.BOX)
        assert np.array_equal(lsun_crop(image, size), middle(np.asarray(scaled), size))
    assert not np.array_equal(lsun_crop(image, 100), center_crop(image, 100))


def test_strips_that_would_fill_the_memory_are_refused():
    strip = Image.new("RGB", (60000, 1))
    assert center_crop(strip, 32).shape == (32, 32, 3)
    with pytest.raises(DataError, match="60000x1, too long and thin"):
        center_crop(strip, 64)


def test_area_downsample_averages_areas():
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = area_downsample(images, 4)
    assert torch.allclose(small, images.reshape(2, 3, 4, 3, 4, 3).mean((3, 5)), atol=1e-6)
    assert small.dtype == torch.float32
    assert torch.equal(area_downsample(images, 12), images)
    uneven = area_downsample(images, 5)  # areas that overlap: rows floor(12k/5) .. ceil(12(k+1)/5)
    assert torch.allclose(uneven[0, 0, 1, 2], images[0, 0, 2:5, 4:8].mean())
    assert area_downsample(images.double(), 3).dtype == torch.float64


@pytest.mark.parametrize(
    ("images", "small_size", "error", "words"),
    [
        (torch.zeros(1, 3, 8, 8), 0, ValueError, "from 1 to 8"),
        (torch.zeros(1, 3, 8, 8), 9, ValueError, "got 9"),
        (torch.zeros(1, 3, 8, 8), 4.0, TypeError, "small_size"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4, TypeError, "torch.uint8"),
        (torch.zeros(3, 8, 8), 4, TypeError, r"shape \[3, 8, 8\]"),
        (None, 4, TypeError, "NoneType"),
    ],
)
def test_area_downsample_names_bad_input(images, small_size, error, words):
    with pytest.raises(error, match=words):
        area_downsample(images, small_size)
