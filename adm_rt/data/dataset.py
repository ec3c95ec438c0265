"""What every data set is: numbered images, each cropped to one size, with a label or without."""

from __future__ import annotations

import hashlib
import threading
import warnings

import numpy as np

from adm_rt.data.arguments import check_flag, check_integer
from adm_rt.data.crop import center_crop, random_crop
from adm_rt.data.keyed_random import CROP_DRAWS, uniform
from adm_rt.errors import DataError

ON_BAD = ("error", "skip")
_MAX_BAD_IN_A_ROW = 1000
_MAX_WARNINGS = 10


class Dataset:
    """Base of all data sets; a subclass gives `_read` and, for messages, `_where`.

    name: as the user gave it.   image_size: side of the images `get` returns.   channels: 3.
    num_images: their number, None when there is no end (`len` then fails).
    num_classes: None when there are no labels, else labels are in 0 .. num_classes - 1.
    class_names: a list of num_classes names, or None.
    bad: {where: reason} of the images that were skipped so far, under on_bad="skip".
    """

    channels = 3
    can_flip = True

    def __init__(
        self,
        name,
        image_size,
        num_images,
        *,
        num_classes=None,
        class_names=None,
        random_crop=False,
        random_flip=False,
        on_bad="error",
        seed=0,
    ):
        self.name = str(name)
        self.image_size = check_integer("image_size", image_size, 1, 1 << 14)
        self.num_images = num_images
        self.num_classes = num_classes
        self.class_names = class_names
        self.random_crop = check_flag("random_crop", random_crop)
        self.random_flip = check_flag("random_flip", random_flip)
        if self.random_flip and not self.can_flip:
            raise ValueError(f"random_flip: {self.name} are characters; mirrored they are others")
        if on_bad not in ON_BAD:
            raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        self.on_bad = on_bad
        self.seed = check_integer("seed", seed, 0, 2**63 - 1)
        self.bad: dict[str, str] = {}
        self._lock = threading.Lock()
        self._digest = None

    def __len__(self):
        return self.num_images

    def __bool__(self):
        return True  # or bool() would ask an endless set for its length

    def __repr__(self):
        count = "endless" if self.num_images is None else f"{self.num_images:,} images"
        kinds = "no labels" if self.num_classes is None else f"{self.num_classes} classes"
        return f"<{type(self).__name__} {self.name}: {count}, {kinds}, {self.image_size} px>"

    def get(self, index: int, draw: int = 0) -> tuple[np.ndarray, int]:
        """Image `index`: (uint8 [image_size, image_size, 3], its label, or -1 without labels).

        draw: the number of this visit, 0 .. 2**63 - 1. Crop and flip are a pure function of (the
        set's seed, draw). A bad image raises DataError, or, under on_bad="skip", is replaced by the
        next good one in the set's order, always the same.
        """
        last = 2**63 - 1 if self.num_images is None else self.num_images - 1
        index = check_integer("index", index, 0, last)
        draw = check_integer("draw", draw, 0, 2**63 - 1)
        for tried in range(_MAX_BAD_IN_A_ROW if self.on_bad == "skip" else 1):
            found = index + tried if self.num_images is None else (index + tried) % self.num_images
            try:
                image, label = self._read(found)
                return self._finish(image, draw), self._check_label(label)
            except DataError as error:
                where = self._where(found)
                if self.on_bad == "error":
                    raise DataError(
                        f"{where}: {error}. Repair or remove it, or let on_bad='skip' put the next "
                        "image in its place"
                    ) from error.__cause__
                self._report(where, str(error))
                if len(self.bad) == self.num_images:
                    break
        raise DataError(
            f"{self.name}: none of {tried + 1:,} images in a row from {self._where(index)} on "
            f"can be read (the last: {self.bad[where]})"
        )

    def get_many(self, indices, draws) -> tuple[np.ndarray, np.ndarray]:
        """`get` of several: (uint8 [N, image_size, image_size, 3], int64 [N])."""
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        labels = np.empty(len(indices), np.int64)
        for row, (index, draw) in enumerate(zip(indices, draws)):
            images[row], labels[row] = self.get(int(index), int(draw))
        return images, labels

    def describe(self) -> dict:
        """What the images depend on, for JSON: equal for two sets that give the same for all draws.

        "contents" stands for the images in their order: the arrays of an .npz file, elsewhere the
        names and labels only. Where the set lies does not matter.
        """
        settings = ("image_size", "num_images", "num_classes", "random_crop", "random_flip")
        described = {name: getattr(self, name) for name in (*settings, "on_bad", "seed")}
        if self._digest is None:  # once: an .npz file may be large
            contents = hashlib.sha256()
            for part in self._contents():
                contents.update(part)
            self._digest = contents.hexdigest()[:32]
        return {"kind": type(self).__name__, "contents": self._digest, **described}

    def _contents(self):
        """Bytes that tell this set from others of its kind."""
        return ()

    def _read(self, index):
        """(PIL image in mode RGB or uint8 [H, W, 3], label or None); DataError if it is bad."""
        raise NotImplementedError

    def _where(self, index) -> str:
        return f"{self.name}, image {index}"

    def _center_crop(self, image) -> np.ndarray:
        return center_crop(image, self.image_size)

    def _finish(self, image, draw: int) -> np.ndarray:
        """Crop and flip."""
        draws = None
        if self.random_crop or self.random_flip:
            draws = uniform(self.seed, np.array([draw], np.uint64), 4, CROP_DRAWS)[0]
        if isinstance(image, np.ndarray):
            if not self.random_crop and image.shape[:2] == (self.image_size, self.image_size):
                pixels = image  # what the published crop does to images of this size
            else:
                from PIL import Image

                pixels = self._crop(Image.fromarray(image), draws)
        else:
            pixels = self._crop(image, draws)
        if self.random_flip and draws[3] < 0.5:
            pixels = pixels[:, ::-1]
        return np.array(pixels, order="C")  # the caller's own, not a view of the set

    def _crop(self, image, draws):
        if self.random_crop:
            return random_crop(image, self.image_size, draws)
        return self._center_crop(image)

    def _check_label(self, label) -> int:
        if self.num_classes is None:
            return -1
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise DataError(f"its label must be an integer, got {label!r:.60}")
        if not 0 <= int(label) < self.num_classes:
            raise DataError(f"its label is {int(label)}; allowed: 0 to {self.num_classes - 1}")
        return int(label)

    def _report(self, where, reason):
        with self._lock:
            if where in self.bad:
                return
            self.bad[where] = reason
            count = len(self.bad)
        if count <= _MAX_WARNINGS:
            more = "; further ones are only counted" if count == _MAX_WARNINGS else ""
            warnings.warn(f"skipped {where}: {reason}{more}", RuntimeWarning, stacklevel=2)


def choose_classes(name, found, num_classes, class_cond, hint):
    """The number of classes to use, or None for no labels.

    found: classes seen in the data, None without labels; num_classes: asked for, None: as found;
    class_cond: True must have labels, False leaves them out, None takes them if they are there.
    """
    if num_classes is not None:
        num_classes = check_integer("num_classes", num_classes, 1, 2**31 - 1)
    if class_cond is False:
        return None
    if found is None:
        if class_cond or num_classes is not None:
            asked = "class_cond=True" if class_cond else f"num_classes={num_classes}"
            raise DataError(f"{name} has no labels, and {asked} needs them: {hint}")
        return None
    if num_classes is not None and num_classes < found:
        raise DataError(
            f"{name} has labels up to {found - 1}; num_classes={num_classes} allows 0 to "
            f"{num_classes - 1}"
        )
    return found if num_classes is None else num_classes
