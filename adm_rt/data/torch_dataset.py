"""Any map-style torch Dataset as one of ours."""

from __future__ import annotations

import threading

import numpy as np

from adm_rt.data.dataset import Dataset, choose_classes
from adm_rt.data.image_file import to_rgb
from adm_rt.errors import DataError

_ALLOWED = (
    "a PIL image, a NumPy uint8 array [H, W] or [H, W, 1 or 3], a torch uint8 tensor "
    "[1 or 3, H, W], or a torch float tensor [1 or 3, H, W] in [0, 1]"
)


class TorchDataset(Dataset):
    """Wraps `dataset[i]` -> image, or (image, label, ...), with `len(dataset)`.

    An image is a PIL image, a NumPy uint8 array [H, W] or [H, W, 1 or 3], a torch uint8 tensor
    [1 or 3, H, W], or a torch float tensor [1 or 3, H, W] in [0, 1] (rounded to 8 bits). Labels
    are integers; their number is num_classes, else the length of the set's `classes`. The set is
    asked from one thread at a time. It must give the same image for the same index for runs to be
    repeatable: leave random crops and flips to this class.
    """

    def __init__(self, dataset, image_size, *, class_cond=None, num_classes=None, **options):
        name = type(dataset).__name__
        try:
            count = len(dataset)
        except TypeError:
            raise TypeError(
                f"{name} has no length: give a map-style Dataset, with __len__ and __getitem__"
            ) from None
        if not hasattr(dataset, "__getitem__"):
            raise TypeError(f"{name} is not map-style: it has no __getitem__")
        if count < 1:
            raise DataError(f"{name} is empty")
        names = getattr(dataset, "classes", None)
        names = list(map(str, names)) if isinstance(names, (list, tuple)) and names else None
        found = len(names) if names else None
        if found is None and num_classes is not None and class_cond is not False:
            found = 1  # labels are there, says the caller
        hint = "give num_classes, or the set a list of names, `classes`"
        classes = choose_classes(name, found, num_classes, class_cond, hint)
        names = names if names and len(names) == classes else None
        super().__init__(name, image_size, count, num_classes=classes, class_names=names, **options)
        self._dataset = dataset
        self._one_at_a_time = threading.Lock()

    def _contents(self):
        yield self.name.encode()

    def _read(self, index):
        try:
            with self._one_at_a_time:
                item = self._dataset[index]
        except OSError as error:
            if error.errno is not None:
                raise
            raise DataError(f"the image is damaged ({error})") from error  # what Pillow raises
        image, label = item, None
        if isinstance(item, (tuple, list)):
            if not item:
                raise DataError("the item is empty")
            image, label = item[0], item[1] if len(item) > 1 else None
        if label is not None and getattr(label, "ndim", None) == 0:
            label = label.item()
        return _to_pixels(image), label


def _to_pixels(image):
    """A PIL image in mode RGB, or uint8 [H, W, 3]."""
    if hasattr(image, "convert") and hasattr(image, "mode"):
        return to_rgb(image)
    if hasattr(image, "detach"):
        pixels = image.detach().cpu()
        if pixels.dtype.is_floating_point and pixels.numel():
            low, high = float(pixels.min()), float(pixels.max())
            if not (low >= 0 and high <= 1):
                raise DataError(f"a float image must lie in [0, 1], this one in [{low}, {high}]")
            pixels = (pixels.double() * 255).round().byte()
        pixels = pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels
        shape, dtype = pixels.shape, str(image.dtype)
    else:
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        shape, dtype = pixels.shape, str(pixels.dtype)
    if "uint8" not in str(pixels.dtype) or len(shape) != 3 or shape[2] not in (1, 3) or 0 in shape:
        raise DataError(
            f"an image is {type(image).__name__} {dtype} {list(getattr(image, 'shape', shape))}; "
            f"allowed: {_ALLOWED}"
        )
    return np.ascontiguousarray(np.broadcast_to(np.asarray(pixels), (*shape[:2], 3)))
