"""Images that lie in one uint8 array: ``.npz`` files and the small built-in sets."""

from __future__ import annotations

import numpy as np

from adm_rt.data.dataset import Dataset

_ROWS = 256  # hashed at a time


class ArrayDataset(Dataset):
    """images uint8 [N, H, W, 1 or 3], labels int64 [N] or None, cropped when they are asked for."""

    def __init__(self, name, image_size, images, labels, **options):
        super().__init__(name, image_size, len(images), **options)
        self._images = images
        self._labels = labels

    def _contents(self):
        yield str(self._images.shape).encode()
        for first in range(0, len(self._images), _ROWS):
            yield np.ascontiguousarray(self._images[first : first + _ROWS])
        if self.num_classes is not None:
            yield np.ascontiguousarray(self._labels)

    def _read(self, index):
        image = np.asarray(self._images[index])
        if image.shape[2] == 1:
            image = np.repeat(image, 3, axis=2)
        return image, None if self.num_classes is None else int(self._labels[index])
