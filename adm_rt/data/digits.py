"""scikit-learn's handwritten digits: 1797 real 8x8 images of 10 classes, with no download."""

from __future__ import annotations

import numpy as np

from adm_rt.data.array import ArrayDataset
from adm_rt.data.dataset import choose_classes
from adm_rt.data.keyed_random import DIGIT_SPLIT, shuffled
from adm_rt.errors import MissingExtraError

DIGIT_SPLITS = {"all": (0, 1797), "train": (0, 899), "heldout": (899, 1348), "test": (1348, 1797)}


def digits(split: str = "all") -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 8, 8, 3], labels int64 [N]), the grey 0 .. 16 scaled to 0 .. 255, thrice.

    split: "all" in the set's own order, or a part of one fixed shuffle: "train" (899 images),
    "heldout" (449), "test" (449). MissingExtraError without scikit-learn.
    """
    if split not in DIGIT_SPLITS:
        raise ValueError(f"split must be one of {', '.join(DIGIT_SPLITS)}, got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError(
            'the digits come with scikit-learn, which is not installed: pip install "adm_rt[data]"'
        ) from None
    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    labels = found.target.astype(np.int64)
    if split != "all":
        first, last = DIGIT_SPLITS[split]
        rows = shuffled(np.arange(first, last), len(images), 0, 0, DIGIT_SPLIT)
        images, labels = images[rows], labels[rows]
    return images, labels


class Digits(ArrayDataset):
    """The digits, or one part of them; at other sizes than 8 by the published crop (bicubic)."""

    can_flip = False

    def __init__(self, image_size=8, split="all", *, class_cond=None, num_classes=None, **options):
        images, labels = digits(split)
        count = choose_classes("digits", 10, num_classes, class_cond, "")
        name = "digits" if split == "all" else f"digits:{split}"
        names = [str(k) for k in range(10)] if count == 10 else None
        super().__init__(
            name, image_size, images, labels, num_classes=count, class_names=names, **options
        )
