"""Small image files and data sets for the tests of adm_rt.data."""

import io

import numpy as np
from PIL import Image


def noise_image(width, height, seed=0, mode="RGB"):
    """A PIL image of smooth colour with noise on it: no two alike, no symmetry."""
    rng = np.random.default_rng([seed, width, height])
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 200 / width, y * 200 / height, (x + y) * 100 / (width + height)], -1)
    pixels = (base + rng.integers(0, 56, base.shape)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="png", **options):
    """The bytes of the image in a file format."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_folder(folder, names, size=(12, 10)):
    """PNG files `names` (paths below folder), image i made with seed i; returns the folder."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise_image(*size, seed)))
    return folder
