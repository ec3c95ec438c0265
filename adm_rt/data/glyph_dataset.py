"""The endless glyphs as a data set."""

from __future__ import annotations

import numpy as np

from adm_rt.data.dataset import Dataset, choose_classes
from adm_rt.data.glyphs import GLYPH_CLASSES, glyphs


class Glyphs(Dataset):
    """Image i of the stream of `seed` (see `glyphs`), drawn at its size, not cropped or flipped."""

    can_flip = False

    def __init__(self, image_size=32, *, class_cond=None, num_classes=None, **options):
        count = choose_classes("glyphs", len(GLYPH_CLASSES), num_classes, class_cond, "")
        names = list(GLYPH_CLASSES) if count == len(GLYPH_CLASSES) else None
        super().__init__(
            "glyphs", image_size, None, num_classes=count, class_names=names, **options
        )
        if self.random_crop:
            raise ValueError("random_crop: glyphs are drawn at their size, there is nothing to cut")
        glyphs(1, self.image_size)  # the size is allowed and the fonts are there

    def get(self, index, draw=0):
        images, labels = self.get_many([index], [draw])
        return images[0], int(labels[0])

    def get_many(self, indices, draws):
        indices = np.asarray(indices)
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        labels = np.full(len(indices), -1, np.int64)
        # Neighbours are drawn together, which is several times as fast.
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        for rows in np.split(np.arange(len(indices)), breaks):
            if len(rows):
                first = int(indices[rows[0]])
                images[rows], drawn = glyphs(len(rows), self.image_size, self.seed, first=first)
                if self.num_classes is not None:
                    labels[rows] = drawn
        return images, labels
