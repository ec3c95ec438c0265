"""Reading one image: every format and mode Pillow knows, to 8-bit RGB, or one kind of error."""

from __future__ import annotations

import numpy as np

from adm_rt.errors import DataError


def read_image(file, exif_rotation: bool = False):
    """A PIL image in mode RGB from a path or a binary file object.

    As published: the first frame of an animation, an alpha channel dropped, grey repeated, CMYK by
    Pillow's formula, and the rotation in a photo's EXIF data ignored unless `exif_rotation`. Grey
    images of 16 bits are scaled to 8 (the published conversion would clip them to white).

    DataError when the bytes are no image, are cut off, or hold more pixels than Pillow allows;
    OSError when the file cannot be read at all.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            image.load()
            if exif_rotation:
                image = ImageOps.exif_transpose(image)
            return to_rgb(image)
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{error} Make the image smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except Image.UnidentifiedImageError:
        raise DataError("not an image (of a format that Pillow reads)") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the image's: another try may well succeed
        raise DataError(f"the image is damaged ({_reason(error)})") from None


def to_rgb(image):
    """The PIL image in mode RGB; DataError when its values have no known range."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(
            f"its pixels are {'32-bit integers' if image.mode == 'I' else 'floats'} of unknown "
            "range; convert it to 8 or 16 bits"
        )
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
