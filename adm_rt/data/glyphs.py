"""Glyphs: an endless, class-conditional set of drawn characters (0-9, A-Z) of any size.

Every image is one character of one of 16 text fonts, in one colour on a solid or gently graded
background, with a small random affine change. Image i of a seed is a pure function of (seed, i):
any slice of the stream is the same whoever draws it, and the same i shows the same scene at every
image size. The fonts are those that come with matplotlib (DejaVu, STIX, Computer Modern), which is
located but never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from adm_rt.data.arguments import check_integer
from adm_rt.data.keyed_random import GLYPH_DRAWS, GLYPH_LABELS, uniform
from adm_rt.errors import MissingExtraError

GLYPH_CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 512

# Text fonts that hold all 36 characters. Monospaced ones are left out: their narrow O is the 0 of
# the others. The order is part of the data set: image i picks a font by its index here.
FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBolIta.ttf",
    "cmr10.ttf",
    "cmb10.ttf",
    "cmss10.ttf",
    "cmti10.ttf",
)

MIN_CONTRAST = 0.35  # luminance between the glyph and every point of its background, in [0, 1]
_GLYPH_EXTENT = 0.82  # height of a capital H (or the width of a wider letter) over the image size
_MAX_ANGLE = np.deg2rad(8.0)
_MAX_SHEAR = 0.12
_MIN_SCALE = 0.8
_MAX_SHIFT = 0.08
_INSIDE = 0.5 - 1 / 32  # shifts keep the inked box within this distance of the centre
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_NUM_DRAWS = 20  # uniforms of one image; its label is drawn apart
_CHUNK_PIXELS = 1 << 16  # pixels composited at a time, so that the temporaries stay in cache
_BANKS: dict[tuple[str, int], _MaskBank] = {}


def font_folder() -> Path:
    """The folder of the fonts that come with matplotlib. MissingExtraError when it is not there."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
        missing = [name for name in FONT_FILES if not (folder / name).is_file()]
        if not missing:
            return folder
        reason = f"matplotlib is installed without its font files ({missing[0]} in {folder})"
    else:
        reason = "matplotlib is not installed"
    raise MissingExtraError(
        f"the glyphs are drawn with the fonts that come with matplotlib, and {reason}: "
        'pip install "adm_rt[data]"'
    )


def glyphs(
    num_images: int,
    image_size: int = 32,
    seed: int = 0,
    labels=None,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws images first .. first + num_images - 1 of the stream that belongs to `seed`.

    num_images: at least 1.   image_size: 8 .. 512.   seed, first: 0 .. 2**63 - 1.
    labels: None (uniform over the 36 classes, from the seed), one class 0 .. 35, or num_images of
      them. Giving labels changes which character image i shows, not its font, colours or pose.

    Returns (images uint8 [N, H, W, 3], labels int64 [N]); `GLYPH_CLASSES[label]` is the character.
    Held-out data are another seed. ValueError and TypeError name the bad argument;
    MissingExtraError when the fonts are not there.
    """
    num_images = check_integer("num_images", num_images, 1, 2**40)
    image_size = check_integer("image_size", image_size, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE)
    seed = check_integer("seed", seed, 0, 2**63 - 1)
    first = check_integer("first", first, 0, 2**63 - 1 - num_images)
    if labels is not None:
        labels = _check_labels(labels, num_images)
    bank = _mask_bank(image_size)
    images = np.empty((num_images, image_size, image_size, 3), np.uint8)
    all_labels = np.empty(num_images, np.int64)
    chunk = max(1, _CHUNK_PIXELS // image_size**2)
    for start in range(0, num_images, chunk):
        rows = slice(start, min(start + chunk, num_images))
        index = np.arange(first + rows.start, first + rows.stop, dtype=np.uint64)
        if labels is None:
            drawn = uniform(seed, index, 1, GLYPH_LABELS)[:, 0] * len(GLYPH_CLASSES)
            all_labels[rows] = drawn.astype(np.int64)
        else:
            all_labels[rows] = labels[rows]
        draws = uniform(seed, index, _NUM_DRAWS, GLYPH_DRAWS)
        images[rows] = _draw(bank, all_labels[rows], draws)
    return images, all_labels


class _MaskBank:
    """Grey masks [font * 36 + class, M, M] of one image size, each rendered when first used.

    A mask has `oversample` cells per image pixel and is box-filtered over one image pixel, so a
    single bilinear sample of it is the area average of the fine rendering.
    """

    def __init__(self, folder: Path, image_size: int):
        self.image_size = image_size
        self.oversample = max(1, min(4, MAX_IMAGE_SIZE // image_size), -(-128 // image_size))
        # The border holds the filter's tail and, outermost, the zeros that stand for "outside".
        border = self.oversample + 2
        self.side = int(np.ceil(_GLYPH_EXTENT * 1.35 * image_size * self.oversample)) + 2 * border
        self.fonts = [folder / name for name in FONT_FILES]
        count = len(self.fonts) * len(GLYPH_CLASSES)
        self.masks = np.zeros((count, self.side, self.side), np.uint8)
        self.half_size = np.zeros((count, 2))  # of the inked box (width, height) over image size
        self.ready = np.zeros(count, bool)

    def prepare(self, ids: np.ndarray) -> None:
        """Renders the masks among `ids` [N] that are not there yet."""
        for i in np.unique(ids[~self.ready[ids]]).tolist():
            self._render(i)

    def _render(self, i: int) -> None:
        from PIL import Image, ImageDraw, ImageFilter, ImageFont

        path = str(self.fonts[i // len(GLYPH_CLASSES)])
        character = GLYPH_CLASSES[i % len(GLYPH_CLASSES)]
        basic = ImageFont.Layout.BASIC
        extent = _GLYPH_EXTENT * self.image_size * self.oversample
        probe = ImageFont.truetype(path, 1000, layout_engine=basic)
        _, top, _, bottom = probe.getbbox("H")
        left, upper, right, lower = probe.getbbox(character)
        # One size for all capitals and digits of a font, less where a letter is too wide or deep.
        unit = max(bottom - top, right - left, (lower - upper) * 0.95)
        font = ImageFont.truetype(path, round(1000 * extent / unit), layout_engine=basic)
        left, upper, right, lower = font.getbbox(character)
        canvas = Image.new("L", (self.side, self.side), 0)
        corner = (
            (self.side - (right - left)) // 2 - left,
            (self.side - (lower - upper)) // 2 - upper,
        )
        ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font)
        canvas = canvas.filter(ImageFilter.BoxBlur((self.oversample - 1) / 2))
        mask = np.array(canvas)
        mask[[0, -1]] = 0
        mask[:, [0, -1]] = 0
        self.masks[i] = mask
        span = 2 * self.image_size * self.oversample
        self.half_size[i] = (right - left) / span, (lower - upper) / span
        self.ready[i] = True


def _mask_bank(image_size: int) -> _MaskBank:
    folder = font_folder()
    key = (str(folder), image_size)
    if key not in _BANKS:
        _BANKS[key] = _MaskBank(folder, image_size)
    return _BANKS[key]


def _draw(bank: _MaskBank, labels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """labels int64 [N], draws float64 [N, 20] in [0, 1) -> uint8 [N, H, W, 3]."""
    u = iter(draws.T)
    font = (next(u) * len(bank.fonts)).astype(np.int64)
    ids = font * len(GLYPH_CLASSES) + labels
    bank.prepare(ids)
    angle = (2 * next(u) - 1) * _MAX_ANGLE
    shear = (2 * next(u) - 1) * _MAX_SHEAR
    scale = _MIN_SCALE + (1 - _MIN_SCALE) * next(u)
    shift = np.stack([2 * next(u) - 1, 2 * next(u) - 1], 1)
    coverage = _sample(bank, ids, angle, shear, scale, shift)
    start, end, ink = _colours(np.stack([next(u) for _ in range(13)], 1))
    ramp = _ramp(next(u) * 2 * np.pi, bank.image_size)
    start, end, ink = (255 * c.astype(np.float32)[:, None, None, :] for c in (start, end, ink))
    images = ramp[..., None] * (end - start)
    images += start
    images += coverage[..., None] * (ink - images)
    images += 0.5
    return images.astype(np.uint8)


def _sample(bank, ids, angle, shear, scale, shift) -> np.ndarray:
    """Coverage float32 [N, H, W] in [0, 1] of the masks under rotation @ shear * scale + shift."""
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    forward = np.empty((len(ids), 2, 2))
    forward[:, 0, 0], forward[:, 0, 1] = cos, shear * cos - sin
    forward[:, 1, 0], forward[:, 1, 1] = sin, shear * sin + cos
    reach = np.einsum("nij,nj->ni", np.abs(forward), bank.half_size[ids])
    shift = shift * np.clip(_INSIDE - reach, 0, _MAX_SHIFT)
    inverse = np.linalg.inv(forward)
    centre = (bank.side - 1) / 2
    offset = centre - np.einsum("nij,nj->ni", inverse, shift) * bank.image_size * bank.oversample
    pixels = (np.arange(bank.image_size) - (bank.image_size - 1) / 2) * bank.oversample

    def position(axis):
        along_x = inverse[:, axis, 0, None] * pixels + offset[:, axis, None]
        along_y = inverse[:, axis, 1, None] * pixels
        where = along_x.astype(np.float32)[:, None, :] + along_y.astype(np.float32)[:, :, None]
        np.clip(where, 0, bank.side - 1.001, out=where)
        cell = where.astype(np.int32)
        where -= cell
        return cell, where

    (x, fx), (y, fy) = position(0), position(1)
    y *= bank.side
    y += x
    y = y + (ids * bank.side**2)[:, None, None]
    flat = bank.masks.reshape(-1)
    upper = flat[y].astype(np.float32)
    upper += fx * (flat[y + 1] - upper)
    y += bank.side
    lower = flat[y].astype(np.float32)
    lower += fx * (flat[y + 1] - lower)
    lower -= upper
    lower *= fy
    upper += lower
    upper *= 1 / 255
    return upper


def _colours(u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u [N, 13] in [0, 1) -> RGB [N, 3] in [0, 1]: background start, background end, ink.

    The ink's luminance is at least MIN_CONTRAST from that of both ends. Half the backgrounds are
    solid.
    """
    first = u[:, 0]
    graded = u[:, 1] < 0.5
    second = np.clip(first + np.where(graded, 0.4 * (u[:, 2] - 0.5), 0), 0, 1)
    below = np.maximum(np.minimum(first, second) - MIN_CONTRAST, 0)
    above = np.maximum(1 - np.maximum(first, second) - MIN_CONTRAST, 0)
    room = below + above  # > 0, since the two ends are at most 0.2 apart
    place = u[:, 3] * room
    ink_luma = np.where(place < below, place, 1 - (place - below))
    start = _with_luma(u[:, 4:7], first)
    tint = np.clip(u[:, 4:7] + 0.5 * (u[:, 7:10] - 0.5), 0, 1)
    end = np.where(graded[:, None], _with_luma(tint, second), start)
    return start, end, _with_luma(u[:, 10:13], ink_luma)


def _with_luma(rgb: np.ndarray, luma: np.ndarray) -> np.ndarray:
    """Mixes rgb [N, 3] with white or black until its luminance is luma [N]."""
    own = np.clip(rgb @ _LUMA, 1e-6, 1 - 1e-6)
    lighter = np.clip((luma - own) / (1 - own), 0, 1)[:, None]
    darker = np.clip(luma / own, 0, 1)[:, None]
    return (rgb + (1 - rgb) * lighter) * darker


def _ramp(angle: np.ndarray, size: int) -> np.ndarray:
    """float32 [N, H, W]: 0 at one corner or edge to 1 at the opposite one, along angle [N]."""
    along = (np.arange(size) + 0.5) / size - 0.5
    reach = np.abs(np.cos(angle)) + np.abs(np.sin(angle))
    x = ((np.cos(angle) / reach)[:, None] * along).astype(np.float32)
    y = ((np.sin(angle) / reach)[:, None] * along + 0.5).astype(np.float32)
    return x[:, None, :] + y[:, :, None]


def _check_labels(labels, num_images: int) -> np.ndarray:
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {array.dtype} ({labels!r:.60})")
    if array.ndim == 0:
        array = np.full(num_images, array)
    if array.shape != (num_images,):
        raise ValueError(
            f"labels must be one class or num_images={num_images} of them, got shape {array.shape}"
        )
    bad = (array < 0) | (array >= len(GLYPH_CLASSES))
    if bad.any():
        raise ValueError(
            f"labels must be in 0 .. {len(GLYPH_CLASSES) - 1} (characters {GLYPH_CLASSES}), "
            f"got {array[bad][0]} at index {int(np.flatnonzero(bad)[0])}"
        )
    return array.astype(np.int64)
