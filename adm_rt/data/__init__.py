"""Data sets, and the stream of batches that training takes from them (see open_dataset).

`glyphs` and `digits` need no download: functions to (images uint8 [N, H, W, 3], labels [N]).
"""

from adm_rt.data.crop import area_downsample, center_crop, lsun_crop, random_crop
from adm_rt.data.dataset import Dataset
from adm_rt.data.digits import digits
from adm_rt.data.glyphs import GLYPH_CLASSES, glyphs
from adm_rt.data.open import open_dataset
from adm_rt.data.stream import BatchStream

__all__ = [
    "GLYPH_CLASSES",
    "BatchStream",
    "Dataset",
    "area_downsample",
    "center_crop",
    "digits",
    "glyphs",
    "lsun_crop",
    "open_dataset",
    "random_crop",
]
