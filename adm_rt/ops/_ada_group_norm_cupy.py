"""ada_group_norm on CuPy arrays: the CUDA kernels without torch."""

import math

import cupy

from ._library import cuda_extension
from .ada_group_norm import check_shapes

_DTYPES = {"float32": 0, "float16": 2}  # codes of csrc/common/dtype.h


def forward(x, weight, bias, scale_shift, groups, eps, silu):
    """``ada_group_norm`` on CuPy arrays of one device; the documentation is there."""
    _check(x, weight, bias, scale_shift)
    check_shapes(x, weight, bias, scale_shift, groups, eps)
    n, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    module = cuda_extension()
    with x.device:
        order = (0, *range(2, x.ndim), 1)
        by_pixel = not x.flags.c_contiguous and x.transpose(order).flags.c_contiguous
        if by_pixel:
            back = (0, x.ndim - 1, *range(1, x.ndim - 1))
            y = cupy.empty((n, *x.shape[2:], channels), x.dtype).transpose(back)
        else:
            x = cupy.ascontiguousarray(x)
            y = cupy.empty(x.shape, x.dtype)
        weight, bias = cupy.ascontiguousarray(weight), cupy.ascontiguousarray(bias)
        code, address = 0, 0
        if scale_shift is not None:
            scale_shift = cupy.ascontiguousarray(scale_shift)
            code, address = _DTYPES[scale_shift.dtype.name], scale_shift.data.ptr
        shape = n, channels, 0, 1, pixels, groups
        last = by_pixel or pixels == 1  # then both orders are one, and this one is faster
        options = eps, silu, _DTYPES[x.dtype.name], last, 0, code, 2 * channels
        # CuPy's pool hands memory out again on the same stream only.
        workspace = cupy.empty(module.ada_group_norm_workspace(shape, options), "uint8")
        module.ada_group_norm(
            shape,
            options,
            (x.data.ptr, 0, weight.data.ptr, bias.data.ptr, address, 0, 0),
            (y.data.ptr, 0, 0, 0),
            workspace.data.ptr,
            cupy.cuda.get_current_stream().ptr,
        )
    return y


def _check(x, weight, bias, scale_shift):
    allowed = {"x": ("float32", "float16"), "scale_shift": ("float32", "float16")}
    given = {"x": x, "weight": weight, "bias": bias, "scale_shift": scale_shift}
    for name, array in given.items():
        if array is None and name == "scale_shift":
            continue
        if not isinstance(array, cupy.ndarray):
            raise TypeError(f"{name} is {type(array).__name__}; with a CuPy x all are CuPy arrays")
        dtypes = allowed.get(name, ("float32",))
        if array.dtype.name not in dtypes:
            raise TypeError(f"{name} is {array.dtype}; as a CuPy array it is {' or '.join(dtypes)}")
        if array.device.id != x.device.id:
            raise ValueError(
                f"{name} is on CUDA device {array.device.id} and x on {x.device.id}; move one of "
                "them"
            )
