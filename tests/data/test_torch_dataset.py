"""torch datasets of other people, and the built-in sets, behind the same interface."""

import sys

import numpy as np
import pytest
import torch
from data_files import noise_image
from PIL import Image

from adm_rt.data import GLYPH_CLASSES, center_crop, digits, glyphs, open_dataset
from adm_rt.errors import DataError, MissingExtraError

PICTURE = noise_image(12, 9)
PIXELS = np.asarray(PICTURE)


class Items(torch.utils.data.Dataset):
    """A map-style dataset of the given items."""

    def __init__(self, *items, classes=None):
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


@pytest.mark.parametrize(
    "image",
    [
        PICTURE,
        PIXELS,
        torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
        torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255,
        (torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255).double(),
    ],
    ids=["pil", "numpy", "uint8 tensor", "float tensor", "double tensor"],
)
def test_every_allowed_kind_of_image(image):
    for item in (image, (image,), [image, 3], (image, torch.tensor(3)), (image, np.int64(3), "x")):
        data = open_dataset(Items(item), 6)
        assert np.array_equal(data.get(0)[0], center_crop(PICTURE, 6))
        assert data.get(0)[1] == -1 and data.num_classes is None
    labelled = open_dataset(Items((image, np.int64(3))), 6, num_classes=4)
    assert labelled.get(0)[1] == 3 and labelled.num_classes == 4


def test_grey_images():
    grey = PICTURE.convert("L")
    pixels = np.asarray(grey)
    expected = center_crop(grey.convert("RGB"), 6)
    for image in (grey, pixels, pixels[..., None], torch.from_numpy(pixels.copy())[None]):
        assert np.array_equal(open_dataset(Items(image), 6).get(0)[0], expected)


def test_classes_are_taken_from_the_set():
    data = open_dataset(Items((PICTURE, 1), classes=["a", "b"]), 6)
    assert data.num_classes == 2 and data.class_names == ["a", "b"] and data.get(0)[1] == 1
    assert open_dataset(Items((PICTURE, 1), classes=["a"]), 6, class_cond=False).num_classes is None


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (PIXELS.astype(np.float32), "ndarray float32.*allowed: a PIL image"),
        (PIXELS.transpose(2, 0, 1), r"uint8 \[3, 9, 12\]"),
        (torch.full((3, 4, 4), 1.5), r"must lie in \[0, 1\]"),
        (torch.full((3, 4, 4), float("nan")), r"must lie in \[0, 1\]"),
        (torch.zeros(3, 4, 4) - 0.1, r"must lie in \[0, 1\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
        (torch.zeros(3, 0, 4), r"float32 \[3, 0, 4\]"),
        ({"image": PIXELS}, "dict"),
        (None, "NoneType"),
        ((), "empty"),
        ((PICTURE, 4), "its label is 4; allowed: 0 to 3"),
        ((PICTURE, -1), "its label is -1"),
        ((PICTURE, 2.0), "must be an integer, got 2.0"),
        ((PICTURE, None), "must be an integer, got None"),
        (PICTURE, "must be an integer, got None"),
        (OSError("image file is truncated (3 bytes not processed)"), "truncated"),
    ],
)
def test_bad_items_are_named_or_skipped(item, words):
    items = Items((PICTURE, 0), item)
    with pytest.raises(DataError, match=f"Items, image 1: .*({words})"):
        open_dataset(items, 6, num_classes=4).get(1)
    data = open_dataset(items, 6, num_classes=4, on_bad="skip")
    with pytest.warns(RuntimeWarning, match="Items, image 1"):
        assert data.get(1)[1] == 0


def test_other_peoples_errors_stay_theirs():
    for error in (KeyError("x"), FileNotFoundError(2, "no such file", "a.png")):
        with pytest.raises(type(error)):
            open_dataset(Items(error), 6, on_bad="skip").get(0)


def test_what_is_no_map_style_dataset():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    for spec in (Endless(), 7, None, ["a.png"], {"a": 1}, iter([])):
        with pytest.raises(TypeError, match="map-style|data must be"):
            open_dataset(spec, 8)
    with pytest.raises(DataError, match="Items is empty"):
        open_dataset(Items(), 8)
    with pytest.raises(DataError, match="give num_classes"):
        open_dataset(Items(PICTURE), 8, class_cond=True)
    with pytest.raises(ValueError, match="class_from='prefix' is for folders"):
        open_dataset(Items(PICTURE), 8, class_from="prefix")


def test_glyphs_as_a_data_set():
    data = open_dataset("glyphs", 16, seed=3)
    images, labels = glyphs(40, 16, seed=3)
    assert data.num_images is None and data.class_names == list(GLYPH_CLASSES)
    for order in (np.arange(40), np.array([5, 6, 7, 30, 2, 2, 39]), np.array([], int)):
        found, kinds = data.get_many(order, order)
        assert np.array_equal(found, images[order]) and np.array_equal(kinds, labels[order])
    assert np.array_equal(data.get(17, 99)[0], images[17]) and data.get(17)[1] == labels[17]
    assert bool(data) and "endless" in repr(data)
    assert open_dataset("glyphs", 16, class_cond=False).get(0)[1] == -1
    for options in ({"random_flip": True}, {"random_crop": True}, {"num_classes": 35}):
        with pytest.raises(ValueError, match=next(iter(options))):
            open_dataset("glyphs", 16, **options)
    with pytest.raises(ValueError, match="image_size"):
        open_dataset("glyphs", 7)


def test_digits():
    images, labels = digits()
    assert images.shape == (1797, 8, 8, 3) and images.dtype == np.uint8
    assert (images[..., 0] == images[..., 2]).all()
    assert images.min() == 0 and images.max() == 255 and len(np.unique(images)) == 17
    assert (np.bincount(labels) > 170).all() and labels.dtype == np.int64
    data = open_dataset("digits", 8)
    assert (data.num_images, data.num_classes) == (1797, 10)
    assert np.array_equal(data.get(7)[0], images[7]) and data.get(7)[1] == labels[7]
    large = open_dataset("digits", 28)
    bicubic = Image.fromarray(images[7]).resize((28, 28), Image.BICUBIC)
    assert np.array_equal(large.get(7)[0], bicubic)
    with pytest.raises(ValueError, match="mirrored"):
        open_dataset("digits", 8, random_flip=True)
    with pytest.raises(ValueError, match="digits:none.*the splits are all, train"):
        open_dataset("digits:none", 8)
    with pytest.raises(ValueError, match="split must be one of"):
        digits("dev")


def test_the_splits_of_the_digits_are_a_partition_of_all_classes():
    parts = [digits(split) for split in ("train", "heldout", "test")]
    assert [len(images) for images, _ in parts] == [899, 449, 449]
    rows = sorted(image.tobytes() for images, _ in parts for image in images)
    assert rows == sorted(image.tobytes() for image in digits()[0])
    for _, labels in parts:
        assert (np.bincount(labels, minlength=10) > 0.06 * len(labels)).all()
    assert open_dataset("digits:heldout", 8).num_images == 449
    assert "".join(map(str, parts[2][1][:20])) == STORED_LABELS


STORED_LABELS = "02468155837543662442"


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "adm_rt\[data\]"'):
        open_dataset("digits", 8)
