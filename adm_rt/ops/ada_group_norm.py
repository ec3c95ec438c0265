"""GroupNorm with AdaGN modulation and SiLU in one call: every normalisation of an ADM network."""

import functools
import importlib
import math
import sys

import numpy as np

from ._arrays import is_cupy, is_dlpack, through_dlpack
from ._backend import reference_forced
from ._library import extension

_FLOAT32 = 0  # code of csrc/common/dtype.h


def ada_group_norm(x, weight, bias, scale_shift=None, groups=32, eps=1e-5, silu=True):
    """Normalise x in groups of channels, modulate it, apply SiLU.

    ``h = (x - mean) / sqrt(var + eps) * weight + bias`` with the mean and the biased variance of
    each (image, group); ``h = h * (1 + scale) + shift`` when scale_shift is given; ``silu(h)``
    when silu is true. Group normalisation: Wu & He 2018; its modulation by an embedding, AdaGN:
    Dhariwal & Nichol 2021, section 3.

    Args:
        x: [N, C, *spatial], any number of spatial dimensions. Contiguous, or with channels_last
            strides, which are the fast ones on CUDA; other strides cost a copy. Torch tensor, NumPy
            or CuPy array, or an array that speaks DLPack; all arguments are of one kind.
        weight, bias: [C].
        scale_shift: [N, 2C], the scale in the first C columns, or None.
        groups: a divisor of C.
        eps: >= 0, added to the variance.
        silu: False leaves the activation out.

    Returns:
        y with x's shape, dtype and memory format.

    The kernels run on CPU tensors of float32 or bfloat16, on CUDA tensors of float32, bfloat16 or
    float16 (on torch's current stream), on float32 NumPy arrays and on CuPy arrays of float32 or
    float16 (on CuPy's current stream); statistics and arithmetic are float32, weight, bias and
    scale_shift are used as float32. A result depends neither on the number of threads nor on the
    other images of the batch. Torch tensors of any other dtype or device run
    ``reference.ada_group_norm``; so does everything inside ``use_reference()`` and, in the backward
    pass, a gradient taken with ``create_graph=True``. Only those gradients are computed that
    somebody asks for. The CUDA kernels have run under an emulator; on a GPU they are not measured.

    Raises:
        ValueError: shapes that do not fit together, groups that do not divide C, a negative eps,
            arguments on different devices.
        TypeError: something that is neither a tensor nor an array; an array of another dtype.
        ImportError: the extension is not built; for CUDA, adm_rt._cuda.
    """
    if isinstance(x, np.ndarray):
        return _numpy_forward(x, weight, bias, scale_shift, groups, eps, silu)
    if is_cupy(x) and not reference_forced():
        return _cupy_side().forward(x, weight, bias, scale_shift, groups, eps, silu)
    if is_cupy(x) or is_dlpack(x):
        if is_cupy(x):
            importlib.import_module("torch")  # reference.py is torch: view the arrays with that
        arrays = {"x": x, "weight": weight, "bias": bias, "scale_shift": scale_shift}
        return through_dlpack(ada_group_norm, arrays, groups=groups, eps=eps, silu=silu)
    if "torch" not in sys.modules:
        raise TypeError(f"x is {type(x).__name__}; give a torch tensor or a NumPy array")
    return _torch_side().forward(x, weight, bias, scale_shift, groups, eps, silu)


def check_shapes(x, weight, bias, scale_shift, groups, eps):
    """Shapes only; x, weight, bias, scale_shift are all tensors or all arrays."""
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"x has shape {tuple(shape)}; it must be [N, C, *spatial]")
    channels = shape[1]
    if groups <= 0 or channels % groups:
        raise ValueError(f"groups={groups} does not divide the {channels} channels of x")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; x of shape {tuple(shape)} needs "
                f"({channels},)"
            )
    if scale_shift is not None and scale_shift.shape != (shape[0], 2 * channels):
        raise ValueError(
            f"scale_shift has shape {tuple(scale_shift.shape)}; x of shape {tuple(shape)} needs "
            f"({shape[0]}, {2 * channels}): the scales of all channels, then the shifts"
        )
    if not eps >= 0:
        raise ValueError(f"eps={eps} must not be negative")


def _numpy_forward(x, weight, bias, scale_shift, groups, eps, silu):
    given = {"x": x, "weight": weight, "bias": bias, "scale_shift": scale_shift}
    for name, array in given.items():
        if array is None and name == "scale_shift":
            continue
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            what = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"{name} is {what}; with a NumPy x everything is a float32 array")
    check_shapes(x, weight, bias, scale_shift, groups, eps)
    if reference_forced():
        import torch

        from . import reference

        arrays = [None if a is None else torch.from_numpy(a) for a in given.values()]
        with torch.no_grad():
            return reference.ada_group_norm(*arrays, groups, eps, silu).numpy()
    n, channels = x.shape[:2]
    by_pixel = x.ndim == 4 and not x.flags.c_contiguous
    by_pixel = by_pixel and x.transpose(0, 2, 3, 1).flags.c_contiguous
    if by_pixel:
        y = np.empty((n, *x.shape[2:], channels), np.float32).transpose(0, 3, 1, 2)
    else:
        x = np.ascontiguousarray(x)
        y = np.empty_like(x)
    weight, bias = np.ascontiguousarray(weight), np.ascontiguousarray(bias)
    scale_shift = None if scale_shift is None else np.ascontiguousarray(scale_shift)
    extension().ada_group_norm(
        x.ctypes.data,
        weight.ctypes.data,
        bias.ctypes.data,
        0 if scale_shift is None else scale_shift.ctypes.data,
        2 * channels,
        y.ctypes.data,
        0,
        0,
        n,
        channels,
        math.prod(x.shape[2:]),
        groups,
        eps,
        silu,
        _FLOAT32,
        by_pixel,
    )
    return y


@functools.cache
def _torch_side():
    return importlib.import_module("adm_rt.ops._ada_group_norm_torch")


@functools.cache
def _cupy_side():
    return importlib.import_module("adm_rt.ops._ada_group_norm_cupy")


def register():
    """Define ``torch.ops.adm_rt.ada_group_norm`` and what belongs to it (idempotent)."""
    _torch_side()
