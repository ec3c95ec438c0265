"""A folder of image files, with classes by sub-folder or by file name."""

from __future__ import annotations

import os

import numpy as np

from adm_rt.data.arguments import check_flag
from adm_rt.data.dataset import Dataset, choose_classes
from adm_rt.data.image_file import read_image
from adm_rt.errors import DataError

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm")
CLASS_FROM = ("auto", "folder", "prefix")
_HINT = (
    "put the images of each class in a sub-folder of its name, or name the files "
    "<class>_<anything>.png"
)


class ImageFolder(Dataset):
    """Image files below `folder` in the published order: directories sorted by name, depth first.

    Files count as images by their ending (EXTENSIONS, in any case); names that begin with a dot are
    passed over. Classes are numbered in sorted order of their names.

    class_from: "folder": the sub-folder of `folder` an image lies in, at any depth below it;
      "prefix": the file name before its first "_" (the published rule); "auto": by sub-folder when
      no image lies in `folder` itself, else by prefix when every name has one and they differ.
    class_names: number the classes by this list instead; DataError for a class that is not in it.
    """

    def __init__(
        self,
        folder,
        image_size,
        *,
        class_cond=None,
        class_from="auto",
        class_names=None,
        num_classes=None,
        exif_rotation=False,
        **options,
    ):
        if class_from not in CLASS_FROM:
            raise ValueError(f"class_from must be one of {CLASS_FROM}, got {class_from!r}")
        self.folder = os.fspath(folder)
        self.exif_rotation = check_flag("exif_rotation", exif_rotation)
        self.paths = list_images(self.folder)
        if not self.paths:
            raise DataError(
                f"{self.folder}: no images in this folder or below it (files that end in "
                f"{', '.join(EXTENSIONS)})"
            )
        kinds = None if class_cond is False else self._classes(class_from, class_cond)
        names = None if kinds is None else sorted(set(kinds))
        if names is not None and class_names is not None:
            names = self._known(names, class_names)
        found = None if names is None else len(names)
        count = choose_classes(self.folder, found, num_classes, class_cond, _HINT)
        super().__init__(self.folder, image_size, len(self.paths), num_classes=count, **options)
        self._labels = None
        if count is not None:
            number = {name: i for i, name in enumerate(names)}
            self._labels = np.array([number[kind] for kind in kinds], np.int32)
            self.class_names = names if count == found else None

    def _classes(self, class_from, required):
        """The class name of every image, or None when there are no classes to be seen."""
        if class_from != "prefix":
            tops = [path.split(os.sep, 1)[0] for path in self.paths if os.sep in path]
            if len(tops) == len(self.paths):
                return tops
            if class_from == "folder":
                stray = next(path for path in self.paths if os.sep not in path)
                raise DataError(
                    f"{os.path.join(self.folder, stray)}: the image lies in no sub-folder, so with "
                    "class_from='folder' it has no class"
                )
        names = [os.path.basename(path) for path in self.paths]
        without = next((i for i, name in enumerate(names) if "_" not in name), None)
        if without is not None:
            if required or class_from == "prefix":
                raise DataError(
                    f"{os.path.join(self.folder, self.paths[without])}: the name has no '_', so "
                    f"there is no class before it; {_HINT}"
                )
            return None
        prefixes = [name.split("_", 1)[0] for name in names]
        sure = required or class_from == "prefix" or len(set(prefixes)) > 1
        return prefixes if sure else None

    def _known(self, names, class_names):
        """``class_names`` as a list, if all of ``names`` are among them."""
        allowed = list(map(str, class_names))
        other = next((name for name in names if name not in allowed), None)
        if other is not None:
            shown = ", ".join(allowed[:10]) + (", ..." if len(allowed) > 10 else "")
            raise DataError(
                f"{self.folder}: class {other!r} is not one of the model's ({shown}); name the "
                "classes as they were named in training"
            )
        return allowed

    def describe(self):
        return super().describe() | {"exif_rotation": self.exif_rotation}

    def _contents(self):
        for path in self.paths:
            yield path.replace(os.sep, "/").encode("utf-8", "surrogateescape") + b"\n"
        if self._labels is not None:
            yield self._labels.tobytes()

    def _where(self, index):
        return os.path.join(self.folder, self.paths[index])

    def _read(self, index):
        image = read_image(self._where(index), self.exif_rotation)
        return image, None if self._labels is None else self._labels[index]


def list_images(folder) -> list[str]:
    """Paths, relative to `folder`, of the image files in and below it, in the published order.

    Links to folders are followed, but not round a circle. DataError when `folder` is not one.
    """
    found = []

    def walk(path, inside, above):
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except NotADirectoryError:
            raise DataError(f"{path} is not a folder") from None
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such folder") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            relative = os.path.join(inside, entry.name)
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in above:
                    walk(entry.path, relative, above | {real})
            elif entry.name.rpartition(".")[2].lower() in EXTENSIONS and "." in entry.name:
                found.append(relative)

    walk(os.fspath(folder), "", {os.path.realpath(folder)})
    return found
