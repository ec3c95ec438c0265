"""``.npz`` files of images, the format that the field's samplers write and its evaluators read."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib

import numpy as np

from adm_rt.data.array import ArrayDataset
from adm_rt.data.dataset import choose_classes
from adm_rt.errors import DataError

# Pixels hardly ever compress more than this; a file that claims it would fill the memory.
_MAX_COMPRESSION = 1000
_CHUNK = 1 << 20
# What zipfile, its decompressors and NumPy raise on bytes that are not what they should be; the
# last is for encryption and unknown compression.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, struct.error, RuntimeError)


class NpzDataset(ArrayDataset):
    """arr_0: uint8 [N, H, W, 3] (or 1 channel); arr_1, if there: integer labels [N].

    Other arrays in the file are not read. The images of an uncompressed file (numpy.savez) stay on
    disk and are mapped; a compressed one is read whole. Pickled objects are never loaded.
    DataError when the file is damaged or holds something else.
    """

    def __init__(self, path, image_size, *, class_cond=None, num_classes=None, **options):
        path = os.fspath(path)
        try:
            images, labels = read_npz(path)
        except DataError:
            raise
        except _DAMAGE as error:
            raise DataError(f"{path} is not a readable .npz file: {error}") from None
        found = None
        if labels is not None and class_cond is not False:
            if labels.min() < 0:
                row = int(np.argmax(labels < 0))
                raise DataError(
                    f"{path}: arr_1 has the label {labels[row]} at {row}; the least is 0"
                )
            found = int(labels.max()) + 1
        hint = "save them as arr_1, integers [N]"
        count = choose_classes(path, found, num_classes, class_cond, hint)
        super().__init__(path, image_size, images, labels, num_classes=count, **options)


def read_npz(path) -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 [N, H, W, 1 or 3], labels int64 [N] or None) of the file, checked."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if "arr_0.npy" not in members:
            names = ", ".join(sorted(name.removesuffix(".npy") for name in members)) or "nothing"
            raise DataError(f"{path} has no arr_0 (uint8 images [N, H, W, 3]); it has {names:.200}")
        shape, dtype = _header(archive, members["arr_0.npy"])
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise DataError(
                f"{path}: arr_0 must be uint8 images [N, H, W, 3], it is {dtype} {list(shape)}"
            )
        labels = None
        if "arr_1.npy" in members:
            label_shape, label_dtype = _header(archive, members["arr_1.npy"])
            if label_dtype.kind not in "iu" or label_shape != shape[:1]:
                raise DataError(
                    f"{path}: arr_1 must be integer labels [{shape[0]}], one per image; it is "
                    f"{label_dtype} {list(label_shape)}"
                )
            labels = _load(path, archive, members["arr_1.npy"]).astype(np.int64)
        return _load(path, archive, members["arr_0.npy"]), labels


def _header(archive, info):
    """(shape, dtype) of a member; ValueError when it is no array or holds objects."""
    if info.file_size > max(_CHUNK, _MAX_COMPRESSION * info.compress_size):
        raise DataError(
            f"{archive.filename}: {info.filename} claims to unpack to {info.file_size:,} bytes "
            f"from {info.compress_size:,}; refused"
        )
    with archive.open(info) as file:
        shape, _, dtype, length = _read_header(file)
    if dtype.hasobject:
        raise DataError(
            f"{archive.filename}: {info.filename} holds pickled Python objects, never loaded here"
        )
    if length + math.prod(shape) * dtype.itemsize != info.file_size:
        raise DataError(
            f"{archive.filename}: {info.filename} is {info.file_size:,} bytes long, too few or too "
            f"many for {dtype} {list(shape)}"
        )
    return shape, dtype


def _read_header(file):
    """(shape, fortran order, dtype, length of the header)"""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"unknown .npy version {version}")
    return *read(file), file.tell()


def _load(path, archive, info):
    """The array of a member: a read-only map when it is stored plainly, else read into memory."""
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    with archive.open(info) as file:
        shape, fortran, dtype, length = _read_header(file)
        while file.read(_CHUNK):  # to the end: the zip file's checksum is compared there
            pass
    with open(path, "rb") as raw:  # the data follow the member's own header
        raw.seek(info.header_offset)
        local = raw.read(30)
        begin = info.header_offset + 30 + int.from_bytes(local[26:28], "little")
        begin += int.from_bytes(local[28:30], "little") + length
    if begin + math.prod(shape) * dtype.itemsize > os.path.getsize(path):
        raise DataError(f"{path}: {info.filename} ends before its {list(shape)} {dtype} do")
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", begin, shape, order)
