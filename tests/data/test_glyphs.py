"""The glyph stream: a pure function of (seed, index), balanced, legible, and strict about input."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from adm_rt.data import GLYPH_CLASSES, glyphs, keyed_random
from adm_rt.errors import MissingExtraError

module = sys.modules["adm_rt.data.glyphs"]
LUMA = np.array([0.299, 0.587, 0.114])

STORED_TEXT = "M4EZO6M1H79X"
STORED_DRAWS = [
    [0.6713318653097871, 0.7502117402695158],
    [0.560119785268433, 0.2229327856199117],
    [0.6355585493569542, 0.8894490517204151],
]
STORED_MEANS = [
    [166.61, 133.83, 180.69],
    [126.22, 157.96, 172.25],
    [48.14, 82.65, 17.1],
    [228.31, 201.52, 222.25],
]


def test_shapes_dtypes_and_classes():
    images, labels = glyphs(5, image_size=16)
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert labels.shape == (5,) and labels.dtype == np.int64
    assert GLYPH_CLASSES == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def test_any_slice_of_a_stream_is_the_same():
    # 150 images of 32 px are several internal chunks; the slices start inside them.
    images, labels = glyphs(150, seed=3)
    again, _ = glyphs(150, seed=3)
    assert np.array_equal(images, again)
    for first, count in ((0, 1), (1, 1), (63, 3), (149, 1), (17, 100)):
        part, part_labels = glyphs(count, seed=3, first=first)
        assert np.array_equal(part, images[first : first + count])
        assert np.array_equal(part_labels, labels[first : first + count])


def test_seeds_are_disjoint_streams():
    a, _ = glyphs(64, seed=0)
    b, _ = glyphs(64, seed=1)
    shifted, _ = glyphs(64, seed=0, first=1)
    for other in (b, shifted):
        assert not (a == other).all(axis=(1, 2, 3)).any()


def test_draws_are_the_published_generator():
    # SplitMix64 from state 0: first outputs of the reference implementation (Steele et al. 2014).
    state = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert keyed_random.mix(state).tolist() == expected


def test_stream_is_stable_across_versions():
    # What a training seed means must not change: labels and draws of fixed places, and the colours.
    _, labels = glyphs(12, seed=7)
    assert "".join(GLYPH_CLASSES[k] for k in labels) == STORED_TEXT
    draws = keyed_random.uniform(7, np.array([0, 1, 2**40], np.uint64), 20, purpose=0)
    np.testing.assert_allclose(draws[:, [0, 19]], STORED_DRAWS, rtol=0, atol=1e-12)
    images, _ = glyphs(4, seed=7)
    # Pixels may move a little with the FreeType in Pillow; the average colour must not.
    np.testing.assert_allclose(images.mean((1, 2)), STORED_MEANS, atol=1.5)


def test_labels_are_uniform():
    _, labels = glyphs(20000, image_size=8, seed=11)
    counts = np.bincount(labels, minlength=36)
    assert len(counts) == 36
    expected = 20000 / 36
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 66.6  # 35 degrees of freedom, p = 0.001


def test_draws_are_uniform_and_uncorrelated():
    draws = keyed_random.uniform(5, np.arange(20000, dtype=np.uint64), 20, purpose=0)
    assert 0 <= draws.min() and draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01
    correlation = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], 1).T) - np.eye(40)
    assert np.abs(correlation).max() < 0.035  # 5 sigma


def test_given_labels_replace_the_class_only():
    images, labels = glyphs(40, seed=2)
    same, same_labels = glyphs(40, seed=2, labels=labels)
    assert np.array_equal(images, same) and np.array_equal(labels, same_labels)
    ones, one_labels = glyphs(40, seed=2, labels=1)
    assert (one_labels == 1).all()
    assert np.array_equal(ones[:, 0, 0], images[:, 0, 0])  # the corner is background
    assert not np.array_equal(ones, images)
    listed, _ = glyphs(40, seed=2, labels=[1] * 40)
    assert np.array_equal(listed, ones)


@pytest.mark.parametrize("size", [8, 9, 31, 32, 64, 100, 256])
def test_every_size_is_the_area_average_of_the_same_scene(size):
    images, labels = glyphs(12, image_size=size, seed=4)
    large, large_labels = glyphs(12, image_size=512, seed=4)
    assert np.array_equal(labels, large_labels)
    for small, big in zip(images, large, strict=True):
        area = Image.fromarray(big).resize((size, size), Image.Resampling.BOX)
        error = np.abs(np.asarray(area, float) - small).mean()
        assert error < (4 if size < 16 else 3), (size, error)


def test_contrast_is_guaranteed():
    u = np.random.default_rng(0).random((50000, 13))
    start, end, ink = module._colours(u)
    for colour in (start, end, ink):
        assert colour.min() >= 0 and colour.max() <= 1
    for ground in (start, end):
        assert (np.abs(ground @ LUMA - ink @ LUMA) > module.MIN_CONTRAST - 1e-5).all()
    # between the ends too: the ink is on one side of both
    assert (((start - ink) @ LUMA > 0) == ((end - ink) @ LUMA > 0)).all()
    assert 0.45 < (start == end).all(1).mean() < 0.55


def test_every_font_has_every_class_and_no_two_look_alike():
    bank = module._mask_bank(32)
    count = len(bank.fonts) * 36
    bank.prepare(np.arange(count))
    masks = bank.masks.reshape(len(bank.fonts), 36, -1) / 255.0
    assert (masks.sum(-1) > 300).all()  # none is empty
    for name, font in zip(module.FONT_FILES, masks, strict=True):
        norms = (font**2).sum(1)
        distance = (norms[:, None] + norms - 2 * font @ font.T) / font.sum(1)[:, None]
        np.fill_diagonal(distance, 1)
        a, b = np.unravel_index(distance.argmin(), distance.shape)
        assert distance[a, b] > 0.07, (name, GLYPH_CLASSES[a], GLYPH_CLASSES[b])
        zero, letter_o = bank.half_size[bank.fonts.index(module.font_folder() / name) * 36 :][
            [0, 24]
        ]
        assert letter_o[0] / letter_o[1] > 1.2 * zero[0] / zero[1], name  # O is rounder than 0


def test_the_glyph_stays_inside_and_fills_the_image():
    bank = module._mask_bank(32)
    count = len(bank.fonts) * 36
    ids = np.repeat(np.arange(count), 4)
    bank.prepare(ids)
    corner = np.tile([[1, 1, 1], [-1, -1, 1], [1, -1, 0.8], [-1, 1, 0.8]], (count, 1))
    angle, shear = corner[:, 0] * module._MAX_ANGLE, corner[:, 1] * module._MAX_SHEAR
    shift = corner[:, :2].astype(float)
    coverage = module._sample(bank, ids, angle, shear, corner[:, 2], shift)
    edge = np.concatenate(
        [coverage[:, 0], coverage[:, -1], coverage[:, :, 0], coverage[:, :, -1]], 1
    )
    assert edge.max() < 0.6  # at worst a soft edge reaches the border
    assert coverage.max() <= 1 and coverage.min() >= 0
    height = (coverage.max(2) > 0.3).sum(1)
    assert height.max() <= 32 and np.median(height) / 32 > 0.7


@pytest.mark.parametrize("axis", [0, 1])
def test_masks_are_sampled_bilinearly_under_the_affine_map(axis):
    # A mask that is linear in one coordinate is reproduced exactly at fractional places.
    side, size, oversample = 63, 10, 3
    mask = np.broadcast_to(np.arange(side, dtype=np.uint8) * 4, (side, side))
    mask = mask if axis == 0 else mask.T
    bank = SimpleNamespace(side=side, image_size=size, oversample=oversample)
    bank.masks, bank.half_size = np.ascontiguousarray(mask)[None], np.zeros((1, 2))
    angle, shear, scale = np.array([0.1]), np.array([-0.07]), np.array([0.85])
    shift = np.array([[0.3, -0.6]])
    found = module._sample(bank, np.array([0]), angle, shear, scale, shift)[0]
    rotation = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    forward = 0.85 * np.array(rotation) @ [[1, -0.07], [0, 1]]
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    moved = np.stack([x, y], -1) - module._MAX_SHIFT * size * shift[0]
    inside_mask = moved @ np.linalg.inv(forward).T * oversample + (side - 1) / 2
    np.testing.assert_allclose(found * 255, 4 * inside_mask[..., axis], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_images": 0}, ValueError, "num_images"),
        ({"num_images": 2.5}, TypeError, "num_images"),
        ({"num_images": True}, ValueError, "num_images"),
        ({"image_size": 7}, ValueError, "8 to 512"),
        ({"image_size": 513}, ValueError, "image_size"),
        ({"image_size": "32"}, TypeError, "image_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": None}, TypeError, "seed"),
        ({"first": -1}, ValueError, "first"),
        ({"first": 2**63}, ValueError, "first"),
        ({"labels": 36}, ValueError, "0 .. 35"),
        ({"labels": [0, -1]}, ValueError, "-1 at index 1"),
        ({"labels": [0, 1, 2]}, ValueError, r"shape \(3,\)"),
        ({"labels": "AB"}, TypeError, "labels"),
        ({"labels": [0.0, 1.0]}, TypeError, "labels"),
    ],
)
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        glyphs(**{"num_images": 2, **arguments})


def test_missing_fonts_name_the_extra(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    with pytest.raises(MissingExtraError, match=r'pip install "adm_rt\[data\]"'):
        glyphs(1)
    hollow = importlib.util.spec_from_file_location("matplotlib", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: hollow)
    with pytest.raises(MissingExtraError, match="without its font files"):
        glyphs(1)


def test_drawing_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys; from adm_rt.data import glyphs; glyphs(2); "
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
