"""GroupNorm with AdaGN modulation and SiLU in one call: every normalisation of an ADM network."""

import functools
import math
import sys

import numpy as np

from ._backend import reference_forced
from ._library import define, extension

FLOAT32, BFLOAT16 = 0, 1  # codes of csrc/common/dtype.h

_SCHEMA = (
    "ada_group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? scale_shift, int groups, "
    "float eps, bool silu) -> (Tensor y, Tensor mean, Tensor rstd)"
)
_BACKWARD_SCHEMA = (
    "ada_group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor bias, Tensor? scale_shift, int groups, bool silu, bool[4] wanted) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale_shift)"
)


def ada_group_norm(x, weight, bias, scale_shift=None, groups=32, eps=1e-5, silu=True):
    """Normalise x in groups of channels, modulate it, apply SiLU.

    ``h = (x - mean) / sqrt(var + eps) * weight + bias`` with the mean and the biased variance of
    each (image, group); ``h = h * (1 + scale) + shift`` when scale_shift is given; ``silu(h)``
    when silu is true. Group normalisation: Wu & He 2018; its modulation by an embedding, AdaGN:
    Dhariwal & Nichol 2021, section 3.

    Args:
        x: [N, C, *spatial], any number of spatial dimensions. Contiguous, or (4-D) with
            channels_last strides; other strides cost a copy. Torch tensor or NumPy array.
        weight, bias: [C].
        scale_shift: [N, 2C], the scale in the first C columns, or None.
        groups: a divisor of C.
        eps: >= 0, added to the variance.
        silu: False leaves the activation out.

    Returns:
        y with x's shape, dtype and memory format.

    The kernels run on CPU tensors of float32 or bfloat16 and on float32 NumPy arrays; statistics
    and arithmetic are float32, weight, bias and scale_shift are used as float32. A result depends
    neither on the number of threads nor on the other images of the batch. Torch tensors of any
    other dtype or device run ``reference.ada_group_norm``; so does everything inside
    ``use_reference()`` and, in the backward pass, a gradient taken with ``create_graph=True``.
    Only those gradients are computed that somebody asks for.

    Raises:
        ValueError: shapes that do not fit together, groups that do not divide C, a negative eps.
        TypeError: something that is neither a tensor nor an array; NumPy of another dtype.
        ImportError: the extension is not built.
    """
    if isinstance(x, np.ndarray):
        return _numpy_forward(x, weight, bias, scale_shift, groups, eps, silu)
    if "torch" not in sys.modules:
        raise TypeError(f"x is {type(x).__name__}; give a torch tensor or a NumPy array")
    return _torch_forward(x, weight, bias, scale_shift, groups, eps, silu)


def _check(x, weight, bias, scale_shift, groups, eps):
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
    _check(x, weight, bias, scale_shift, groups, eps)
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
    moments = np.empty((2, n, groups), np.float32)
    extension().ada_group_norm(
        x.ctypes.data,
        weight.ctypes.data,
        bias.ctypes.data,
        0 if scale_shift is None else scale_shift.ctypes.data,
        2 * channels,
        y.ctypes.data,
        moments[0].ctypes.data,
        moments[1].ctypes.data,
        n,
        channels,
        math.prod(x.shape[2:]),
        groups,
        eps,
        silu,
        FLOAT32,
        by_pixel,
    )
    return y


@functools.cache
def _torch_side():
    """(forward op, autograd.Function, reference.ada_group_norm), made on the first call."""
    import torch

    from . import reference

    operator = define(_SCHEMA, cpu=_cpu, fake=_fake)
    backward_operator = define(_BACKWARD_SCHEMA, cpu=_cpu_backward, fake=_fake_backward)

    class AdaGroupNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, scale_shift, groups, eps, silu):
            y, mean, rstd = operator(x, weight, bias, scale_shift, groups, eps, silu)
            ctx.save_for_backward(x, weight, bias, scale_shift, mean, rstd)
            ctx.options = groups, eps, silu
            return y

        @staticmethod
        def backward(ctx, grad):
            x, weight, bias, scale_shift, mean, rstd = ctx.saved_tensors
            groups, eps, silu = ctx.options
            wanted = ctx.needs_input_grad[:4]
            if torch.is_grad_enabled():  # create_graph=True: stay differentiable
                inputs = (x, weight, bias, scale_shift)
                y = reference.ada_group_norm(*inputs, groups, eps, silu)
                asked = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
                found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
                return (*(next(found) if want else None for want in wanted), None, None, None)
            found = backward_operator(
                grad, x, mean, rstd, weight, bias, scale_shift, groups, silu, wanted
            )
            return (
                *(g if want else None for g, want in zip(found, wanted, strict=True)),
                None,
                None,
                None,
            )

    return operator, AdaGroupNorm, reference.ada_group_norm


def register():
    """Define ``torch.ops.adm_rt.ada_group_norm`` and its backward (idempotent)."""
    _torch_side()


def _torch_forward(x, weight, bias, scale_shift, groups, eps, silu):
    import torch

    given = {"x": x, "weight": weight, "bias": bias, "scale_shift": scale_shift}
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name != "scale_shift"):
            raise TypeError(
                f"{name} is {type(tensor).__name__}; give torch tensors or NumPy arrays"
            )
    if not x.dtype.is_floating_point:
        raise TypeError(f"x is {x.dtype}; it must be of a floating-point dtype")
    _check(x, weight, bias, scale_shift, groups, eps)
    operator, function, reference = _torch_side()
    if (
        reference_forced()
        or x.dtype not in (torch.float32, torch.bfloat16)
        or x.device.type not in ("cpu", "meta")
    ):
        return reference(x, weight, bias, scale_shift, groups, eps, silu)
    if weight.dtype != torch.float32 or bias.dtype != torch.float32:
        weight, bias = weight.float(), bias.float()
    if scale_shift is not None and scale_shift.dtype != torch.float32:
        scale_shift = scale_shift.float()
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or bias.requires_grad
        or (scale_shift is not None and scale_shift.requires_grad)
    ):
        return function.apply(x, weight, bias, scale_shift, groups, eps, silu)
    return operator(x, weight, bias, scale_shift, groups, eps, silu)[0]


def _dense(x):
    """(x, whether it is channels_last): x itself when it is dense in either order, else a copy."""
    if x.is_contiguous():
        return x, False
    import torch

    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def _like(tensor, x, by_pixel):
    """tensor with the memory order of x."""
    import torch

    order = torch.channels_last if by_pixel else torch.contiguous_format
    return tensor.contiguous(memory_format=order)


def _rows(scale_shift):
    """(tensor, address, floats between its rows) with dense rows; (None, 0, 0) for None."""
    if scale_shift is None:
        return None, 0, 0
    if scale_shift.stride(1) != 1 or scale_shift.stride(0) < scale_shift.shape[1]:
        scale_shift = scale_shift.contiguous()
    return scale_shift, scale_shift.data_ptr(), max(scale_shift.stride(0), scale_shift.shape[1])


def _code(x):
    import torch

    return FLOAT32 if x.dtype == torch.float32 else BFLOAT16


def _cpu(x, weight, bias, scale_shift, groups, eps, silu):
    import torch

    x, by_pixel = _dense(x)
    n, channels = x.shape[0], x.shape[1]
    y = torch.empty_like(x)
    mean = torch.empty((n, groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_shift, address, stride = _rows(scale_shift)
    extension().ada_group_norm(
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        address,
        stride,
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        n,
        channels,
        math.prod(x.shape[2:]),
        groups,
        eps,
        silu,
        _code(x),
        by_pixel,
    )
    return y, mean, rstd


def _fake(x, weight, bias, scale_shift, groups, eps, silu):
    import torch

    moments = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(_dense(x)[0]), moments, torch.empty_like(moments)


def _cpu_backward(grad, x, mean, rstd, weight, bias, scale_shift, groups, silu, wanted):
    x, by_pixel = _dense(x)
    grad = _like(grad, x, by_pixel)
    n, channels = x.shape[0], x.shape[1]
    results = _gradients(x, weight, scale_shift, wanted)
    dx, dweight, dbias, dscale_shift = (
        tensor.data_ptr() if want else 0 for tensor, want in zip(results, wanted, strict=True)
    )
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_shift, address, stride = _rows(scale_shift)
    extension().ada_group_norm_backward(
        grad.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        address,
        stride,
        dx,
        dweight,
        dbias,
        dscale_shift,
        n,
        channels,
        math.prod(x.shape[2:]),
        groups,
        silu,
        _code(x),
        by_pixel,
    )
    return results


def _gradients(x, weight, scale_shift, wanted):
    """Empty results of the backward op; those that nobody wants have no elements."""
    import torch

    width = 2 * x.shape[1]
    wanted = [*wanted[:3], wanted[3] and scale_shift is not None]
    return (
        torch.empty_like(x) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight) if wanted[1] else weight.new_empty(0),
        torch.empty_like(weight) if wanted[2] else weight.new_empty(0),
        weight.new_empty((x.shape[0], width)) if wanted[3] else weight.new_empty(0),
    )


def _fake_backward(grad, x, mean, rstd, weight, bias, scale_shift, groups, silu, wanted):
    return _gradients(_dense(x)[0], weight, scale_shift, wanted)
