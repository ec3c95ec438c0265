"""Weights in a safetensors file, read and written with NumPy alone.

The safetensors package checks a file's structure (header, offsets, no holes or overlaps, size). The
payload is read here, because NumPy has no bfloat16 for the package to return.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adm_rt.errors import CheckpointError
from adm_rt.models.parameter_shapes import Shapes, compare_shapes

# Storage type -> (name in the file's header, NumPy type of the stored bytes).
DTYPES = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}
_STORED = {tag: np.dtype(kind) for tag, kind in DTYPES.values()}


def read_safetensors(path: str | os.PathLike, expected: Shapes) -> dict[str, np.ndarray]:
    """float32 arrays of a file that must hold exactly the names and shapes of ``expected``.

    Nothing is allocated before names, shapes and sizes have been compared. Raises CheckpointError
    naming the file: damaged, other weights, an unreadable type, or a value that is not finite.
    """
    path = Path(path)
    header, start = _read_header(path)
    difference = compare_shapes(expected, {k: tuple(v["shape"]) for k, v in header.items()})
    if difference:
        raise CheckpointError(f"{path} does not fit its config: {difference}.")
    weights = {}
    try:
        with open(path, "rb") as file:
            for name in expected:
                entry = header[name]
                array = np.empty(entry["shape"], _STORED[entry["dtype"]])
                file.seek(start + entry["data_offsets"][0])
                if file.readinto(memoryview(array).cast("B")) != array.nbytes:
                    raise CheckpointError(f"{path} is truncated. Fetch or convert the model again.")
                weights[name] = _to_float32(array, entry["dtype"])
                if not np.isfinite(weights[name]).all():
                    raise CheckpointError(
                        f"{path}: weight {name!r} has NaN or infinite values; the model is not "
                        "usable."
                    )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    return weights


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray], dtype: str) -> None:
    """Stream ``weights`` into a safetensors file as ``dtype``, one converted array at a time.

    Raises CheckpointError for a value that is not finite or that ``dtype`` cannot hold.
    """
    tag, kind = DTYPES[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in weights.items():
        end = offset + array.size * np.dtype(kind).itemsize
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, array in weights.items():
            file.write(memoryview(stored_array(name, array, dtype)).cast("B"))


def stored_array(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """``array`` in the bytes of ``dtype``: <f4, <f2, or <u2 holding bfloat16."""
    array = np.ascontiguousarray(array, dtype="<f4")
    if not np.isfinite(array).all():
        raise CheckpointError(f"cannot save weight {name!r}: it has NaN or infinite values.")
    if dtype == "float32":
        return array
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = array.astype("<f2")
        if not np.isfinite(half).all():
            raise CheckpointError(
                f"cannot save weight {name!r} as float16: it has values beyond 65504. Use "
                "dtype='bfloat16' or 'float32'."
            )
        return half
    bits = array.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise CheckpointError(
            f"cannot save weight {name!r} as bfloat16: it has values beyond 3.39e38. Use "
            "dtype='float32'."
        )
    return rounded.astype("<u2")


def _to_float32(array: np.ndarray, tag: str) -> np.ndarray:
    if tag == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _read_header(path: Path) -> tuple[dict[str, dict], int]:
    """Header entries by name, and where the payload starts."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # opening checks the structure
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # the package raises its own error type, and others
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({str(error)[:200]}). Fetch or convert the "
            "model again."
        ) from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _STORED:
            raise CheckpointError(
                f"{path}: weight {name[:80]!r} is stored as {entry['dtype']}; readable: "
                f"{', '.join(_STORED)}."
            )
    return header, 8 + length
