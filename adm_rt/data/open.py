"""From what the user typed to a data set."""

from __future__ import annotations

import os

from adm_rt.data.arguments import check_flag
from adm_rt.data.dataset import Dataset
from adm_rt.data.digits import DIGIT_SPLITS, Digits
from adm_rt.data.folder import ImageFolder
from adm_rt.data.glyph_dataset import Glyphs
from adm_rt.data.lsun import LsunDatabase, is_database
from adm_rt.data.npz import NpzDataset
from adm_rt.data.torch_dataset import TorchDataset
from adm_rt.errors import DataError

_ALLOWED = (
    "allowed: glyphs, digits (or digits:train, digits:heldout, digits:test), a folder of images, "
    "an .npz file, an LSUN folder (with data.mdb)"
)


def open_dataset(
    spec,
    image_size: int,
    *,
    random_crop: bool = False,
    random_flip: bool = False,
    on_bad: str = "error",
    seed: int = 0,
    class_cond: bool | None = None,
    num_classes: int | None = None,
    class_from: str | None = None,
    exif_rotation: bool | None = None,
    class_names=None,
) -> Dataset:
    """The data set that `spec` names, each image cropped to image_size x image_size.

    spec: "glyphs", "digits" or "digits:<split>", a folder of images, an .npz file, an LSUN folder,
      or a map-style torch Dataset. A folder that is called glyphs is written ./glyphs.
    random_crop, random_flip: as in the published training (classifiers: both; diffusion: the flip).
    on_bad: "error" refuses a damaged image when it is met; "skip" puts the next good one of the
      set in its place, counts it in `bad` and warns.
    seed: of the random crops and flips, and which stream of glyphs.
    class_cond: None takes labels if there are any, True must have them, False leaves them out.
    num_classes: None counts them; a larger number leaves room (for a model with more classes).
    class_from, exif_rotation: for folders, see ImageFolder.
    class_names: the model's classes in their order (None: not known), for a set that need not hold
      all of them; a folder's classes are numbered by it. Labels of other sets are numbers already.

    DataError, ValueError and TypeError name what is wrong with the data or an argument.
    """
    options = {
        "random_crop": random_crop,
        "random_flip": random_flip,
        "on_bad": on_bad,
        "seed": seed,
        "class_cond": class_cond,
        "num_classes": num_classes,
    }
    if class_cond is not None:
        check_flag("class_cond", class_cond)
    kind, arguments = _kind(spec)
    for name, value in (("class_from", class_from), ("exif_rotation", exif_rotation)):
        if value is not None:
            if kind is not ImageFolder:
                raise ValueError(f"{name}={value!r} is for folders of images, not for {spec!r:.80}")
            options[name] = value
    if kind is ImageFolder:
        options["class_names"] = class_names
    return kind(image_size=image_size, **arguments, **options)


def _kind(spec):
    """The class of the data set and what it is told beside the options."""
    if not isinstance(spec, (str, os.PathLike)):
        if hasattr(spec, "__getitem__") and not isinstance(spec, (bytes, dict, list, tuple)):
            return TorchDataset, {"dataset": spec}
        raise TypeError(
            f"data must be a name, a path or a map-style torch Dataset, got {spec!r:.80}"
        )
    path = os.fsdecode(spec)
    if path == "glyphs":
        return Glyphs, {}
    if path == "digits" or path.startswith("digits:"):
        split = path.partition(":")[2] or "all"
        if split not in DIGIT_SPLITS:
            raise ValueError(f"data={path!r}: the splits are {', '.join(DIGIT_SPLITS)}")
        return Digits, {"split": split}
    path = os.path.expanduser(path)
    if not path or not os.path.exists(path):
        raise DataError(f"data={path!r}: there is no such file or folder; {_ALLOWED}")
    if os.path.isdir(path):
        if is_database(path):
            return LsunDatabase, {"folder": path}
        return ImageFolder, {"folder": path}
    if path.lower().endswith(".npz"):
        return NpzDataset, {"path": path}
    raise DataError(f"data={path!r} is a file, but not an .npz file; {_ALLOWED}")
