"""The kernels' dtypes as NumPy arrays. NumPy only: the sanitized runs import it."""

import numpy as np

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2


def pack(values, dtype):
    """float32 -> the same values in that dtype, as an array of float32 or of 16-bit words."""
    if dtype == FLOAT16:
        return values.astype(np.float16).view(np.uint16)
    if dtype == BFLOAT16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, np.float32)


def unpack(array, dtype):
    """The inverse of pack, in float32."""
    if dtype == FLOAT16:
        return array.view(np.float16).astype(np.float32)
    if dtype == BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
