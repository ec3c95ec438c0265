"""SampleResult: images with their labels, seeds and everything needed to make them again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

PNG_KEY = "adm_rt"  # the PNG text chunk and the .npz array that hold the metadata
MAX_GRID = 1024  # images in one PNG; more belong in a folder or an .npz


@dataclasses.dataclass
class SampleResult:
    """Finished samples.

    images: uint8 [N, H, W, 3]. labels: int64 [N], or None for a model without classes. seeds:
    int64 [N], the Philox seed of each image: giving one back as ``seeds=[...]`` makes that image
    again. metadata: a JSON-ready dict of every parameter, the timestep grid included.
    """

    images: np.ndarray
    labels: np.ndarray | None
    seeds: np.ndarray
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        images = np.asarray(self.images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}"
            )
        self.images = images
        self.seeds = np.asarray(self.seeds, dtype=np.int64)
        if self.labels is not None:
            labels = np.asarray(self.labels)
            if labels.dtype.kind not in "iu" and labels.size:
                raise ValueError(f"labels must be integers, not {labels.dtype}")
            self.labels = labels.astype(np.int64)
        for name, values in (("labels", self.labels), ("seeds", self.seeds)):
            if values is not None and values.shape != (len(images),):
                raise ValueError(f"{name} has shape {list(values.shape)} for {len(images)} images")

    def __len__(self):
        return len(self.images)

    def __repr__(self):
        n, h, w, _ = self.images.shape
        return f"SampleResult({n} images {h}x{w}, model={self.metadata.get('model')!r})"

    def grid(self, columns=None, padding=2):
        """All images as one near-square PIL image, row by row in order, ``padding`` px apart."""
        from PIL import Image

        count, height, width, _ = self.images.shape
        if not 1 <= count <= MAX_GRID:
            raise ValueError(f"a grid holds 1 to {MAX_GRID} images, not {count}")
        if columns is None:
            columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, 3)
        canvas = np.full(shape, 255, dtype=np.uint8)
        for index, image in enumerate(self.images):
            top = padding + index // columns * (height + padding)
            left = padding + index % columns * (width + padding)
            canvas[top : top + height, left : left + width] = image
        return Image.fromarray(canvas)

    def save(self, path):
        """Write the samples; returns the path.

        - ``name.npz``: ``arr_0`` uint8 [N, H, W, 3] and ``arr_1`` int64 labels, as the field's
          evaluators read them, plus ``seeds`` and ``adm_rt`` (the metadata as a JSON string),
          which they ignore.
        - ``name.png``: one grid; its ``adm_rt`` text chunk holds the metadata.
        - a folder (a name without a suffix): one PNG per image, seed and label in its name, and
          ``metadata.json``. A folder that already holds files is refused.

        The files appear whole or not at all. Raises ValueError for an unknown suffix or a path
        that cannot be written, OSError when the disk fails.
        """
        path = check_output(path, len(self))
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = output_kind(path)
        if kind == "npz":
            _write_atomically(path, self._write_npz)
        elif kind == "png":
            grid = self.grid()
            _write_atomically(path, lambda file: _save_png(grid, file, self._describe()))
        else:
            self._write_folder(path)
        return path

    def _describe(self, index=None):
        """The metadata with labels and seeds, of all images or of one."""
        rows = slice(None) if index is None else slice(index, index + 1)
        return {
            **self.metadata,
            "labels": None if self.labels is None else self.labels[rows].tolist(),
            "seeds": self.seeds[rows].tolist(),
        }

    def _write_npz(self, file):
        arrays = {"arr_0": self.images}
        if self.labels is not None:
            arrays["arr_1"] = self.labels
        text = np.array(json.dumps(self.metadata, sort_keys=True))
        np.savez(file, **arrays, seeds=self.seeds, **{PNG_KEY: text})

    def _write_folder(self, path):
        from PIL import Image

        scratch = Path(tempfile.mkdtemp(prefix=_scratch_prefix(path), dir=path.parent))
        try:
            digits = max(5, len(str(len(self.images))))
            for index, image in enumerate(self.images):
                label = "" if self.labels is None else f"_class{self.labels[index]}"
                name = f"{index:0{digits}d}_seed{self.seeds[index]}{label}.png"
                with open(scratch / name, "xb") as file:
                    _save_png(Image.fromarray(image), file, self._describe(index))
            (scratch / "metadata.json").write_text(json.dumps(self._describe(), indent=2) + "\n")
            scratch.chmod(0o777 & ~_umask())
            os.replace(scratch, path)  # replaces an empty folder, refuses one with files
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    @classmethod
    def load(cls, path):
        """Read back an ``.npz`` written by ``save`` or by guided-diffusion's scripts."""
        with _open_npz(path) as arrays:
            if "arr_0" not in arrays:
                raise ValueError(f"{path}: no array 'arr_0'; it holds {sorted(arrays)}")
            try:
                images = arrays["arr_0"]
                labels = arrays["arr_1"] if "arr_1" in arrays else None
                seeds = arrays["seeds"] if "seeds" in arrays else np.arange(len(images))
                metadata = json.loads(str(arrays[PNG_KEY])) if PNG_KEY in arrays else {}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{path}: cannot be read ({error})") from error
        return cls(images, labels, seeds, metadata)


def output_kind(path):
    """ "npz" | "png" | "folder" by the suffix; ValueError for another suffix."""
    suffix = Path(path).suffix.lower()
    if suffix in (".npz", ".png"):
        return suffix[1:]
    if suffix and not Path(path).is_dir():
        raise ValueError(
            f"output {str(path)!r}: unknown suffix {suffix!r}; use .npz, .png (a grid), or a name "
            "without a suffix for a folder of PNGs"
        )
    return "folder"


def check_output(path, count=1):
    """The path, resolved, if ``save`` could write ``count`` images there now; nothing is created.

    Meant to be called before hours of sampling. Raises ValueError naming what stands in the way.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"output={path!r} must be a path: name.npz, name.png or a folder")
    given = os.fspath(path)
    if not given:
        raise ValueError("output '': the path is empty; use name.npz, name.png or a folder")
    try:
        return _checked(given, Path(os.path.abspath(os.path.expanduser(given))), count)
    except OSError as error:  # a name too long, a folder that may not be searched, ...
        shown = given if len(given) < 80 else given[:77] + "..."
        raise ValueError(
            f"output {shown!r} cannot be written: {error.strerror}; choose another name or folder"
        ) from error


def _checked(given, path, count):
    if "\0" in given:
        raise ValueError(f"output {given!r}: a path cannot hold a NUL character")
    kind = output_kind(path)
    if kind == "png" and count > MAX_GRID:
        raise ValueError(
            f"output {given!r}: a grid holds at most {MAX_GRID} images, not {count}; use .npz or a "
            "folder"
        )
    if kind == "folder":
        if path.is_file():
            raise ValueError(f"output {given!r} is a file; name a folder, .npz or .png")
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"output {given!r}: the folder is not empty; name a new one")
    elif path.is_dir():
        raise ValueError(f"output {given!r} is a folder; a file is needed for {path.suffix}")
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"output {given!r} cannot be written: {parent} is not a folder")
    try:  # asking the file system beats os.access: root, read-only mounts, quotas
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(
            f"output {given!r} cannot be written: no file can be made in {parent} "
            f"({error.strerror}); choose a folder you can write to"
        ) from error
    return path


def _open_npz(path):
    try:
        arrays = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        # numpy takes whatever is no array file for a pickle, which its message would recommend
        why = getattr(error, "strerror", None) or "it is not an .npz archive, or a damaged one"
        raise ValueError(f"{path}: cannot be read ({why})") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: cannot be read (it is one .npy array, not an .npz archive)")
    return arrays


def _save_png(image, file, description):
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PNG_KEY, json.dumps(description, sort_keys=True))
    image.save(file, format="PNG", pnginfo=chunks)


def _write_atomically(path, write):
    """``write(file)`` into a temporary neighbour, then rename: never a half-written ``path``."""
    descriptor, scratch = tempfile.mkstemp(prefix=_scratch_prefix(path), dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


def _scratch_prefix(path):
    return f".{path.name[:40]}."  # cut: with the suffix it must not be longer than a name may be


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
