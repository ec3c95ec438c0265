"""ada_group_norm on what a residual block of ADM feeds it: a skip connection joined to the input,
and the result, like the input itself, resampled by 2. Torch only."""

import torch
import torch.nn.functional as F

from . import _ada_group_norm_torch as torch_side
from ._ada_group_norm_torch import _DTYPES, _check_same_device, _dense, _in_order, _rows
from ._library import cuda_extension, cuda_stream
from .ada_group_norm import ada_group_norm, check_shapes

RESAMPLES = {None: 0, "down": 1, "up": 2}  # codes of csrc/ops/ada_group_norm_cuda.h


def ada_group_norm_resample(
    x,
    weight,
    bias,
    scale_shift=None,
    groups=32,
    eps=1e-5,
    silu=True,
    *,
    skip=None,
    resample=None,
):
    """``resample(ada_group_norm(joined))`` and ``resample(joined)``, joined = cat([x, skip], 1).

    One or two CUDA kernels that read x and skip once or twice and write only the two results; on
    other devices, for other dtypes and inside ``use_reference()`` the same from ``ada_group_norm``
    and torch's operations. Differentiable in all tensors; on CUDA once. BigGAN's resampling in a
    residual block: Dhariwal & Nichol 2021, section 3.

    Args:
        x: [N, C1, H, W], contiguous or channels_last (the fast order on CUDA).
        weight, bias: [C1 + C2].
        scale_shift: [N, 2 (C1 + C2)] or None; with groups, eps and silu as in ``ada_group_norm``.
        skip: [N, C2, H, W] of x's dtype, or None.
        resample: "down": means of 2x2 pixels, H and W even; "up": every pixel four times; None.

    Returns:
        (y, joined and resampled), both [N, C1 + C2, H', W'] in x's dtype and memory order.

    Raises:
        ValueError, TypeError: what does not fit, by name; ImportError: adm_rt._cuda is not built.
    """
    _check(x, weight, bias, scale_shift, groups, eps, skip, resample)
    if skip is None and resample is None:
        return ada_group_norm(x, weight, bias, scale_shift, groups, eps, silu), x
    if not kernels_take(x):
        joined = x if skip is None else torch.cat([x, skip], 1)
        y = ada_group_norm(joined, weight, bias, scale_shift, groups, eps, silu)
        return resampled(y, resample), resampled(joined, resample)
    weight, bias = weight.float(), bias.float()
    if scale_shift is not None and scale_shift.dtype not in _DTYPES:
        scale_shift = scale_shift.float()
    arguments = x, skip, weight, bias, scale_shift, groups, eps, silu, RESAMPLES[resample]
    tensors = [t for t in arguments[:5] if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Resample.apply(*arguments)
    return forward(*arguments)[:2]


def kernels_take(x):
    """Whether a tensor of x's dtype and device goes to the kernels; there are none on the CPU."""
    return _on_device(x) and torch_side.kernels_take(x)


def _on_device(x):
    return x.device.type == "cuda"


def _check(x, weight, bias, scale_shift, groups, eps, skip, resample):
    for name, tensor in (("x", x), ("skip", skip), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and (name != "skip" or tensor is not None):
            raise TypeError(f"{name} is {type(tensor).__name__}; give torch tensors")
    if scale_shift is not None and not isinstance(scale_shift, torch.Tensor):
        raise TypeError(f"scale_shift is {type(scale_shift).__name__}; give a tensor or None")
    if resample not in RESAMPLES:
        allowed = ", ".join(map(repr, RESAMPLES))
        raise ValueError(f"resample={resample!r} is not one of {allowed}")
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [N, C, H, W]")
    joined = list(x.shape)
    if skip is not None:
        if skip.dim() != 4 or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"skip has shape {tuple(skip.shape)}; beside x of shape {tuple(x.shape)} it may "
                "differ in the channels only"
            )
        if skip.dtype != x.dtype:
            raise TypeError(f"skip is {skip.dtype} and x {x.dtype}; convert one of them")
        joined[1] += skip.shape[1]
    if resample == "down" and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"resample='down' needs an even height and width; x is {tuple(x.shape)}")
    check_shapes(torch.empty(joined, device="meta"), weight, bias, scale_shift, groups, eps)


def resampled(x, resample):
    """The resampling alone, by torch."""
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if resample == "up" else x


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        y, x_out, mean, rstd = forward(*arguments)
        ctx.save_for_backward(*arguments[:5], mean, rstd)
        ctx.options = arguments[5:]
        ctx.set_materialize_grads(False)
        return y, x_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_x_out):
        *tensors, mean, rstd = ctx.saved_tensors
        groups, _, silu, code = ctx.options
        wanted = ctx.needs_input_grad[:5]
        if grad is None:  # only the second result was used
            grad = torch.zeros_like(grad_x_out)
        found = backward(grad, grad_x_out, *tensors, mean, rstd, groups, silu, code, wanted)
        return (*found, None, None, None, None)


def _call(x, skip, scale_shift, stride, groups, eps, silu, by_pixel, resample):
    n, channels, height, width = x.shape
    more = 0 if skip is None else skip.shape[1]
    code = 0 if scale_shift is None else _DTYPES[scale_shift.dtype]
    shape = n, channels + more, more, height, width, groups
    return shape, (eps, silu, _DTYPES[x.dtype], by_pixel, resample, code, stride)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def forward(x, skip, weight, bias, scale_shift, groups, eps, silu, resample):
    """(y, joined and resampled, mean, rstd) by the kernels; resample: a code, checked arguments."""
    module = cuda_extension()
    _check_same_device(x, skip=skip, weight=weight, bias=bias, scale_shift=scale_shift)
    x, by_pixel = _dense(x)
    skip = None if skip is None else _in_order(skip, by_pixel)
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_shift, modulation, stride = _rows(scale_shift)
    shape, options = _call(x, skip, scale_shift, stride, groups, eps, silu, by_pixel, resample)
    n, channels, _, height, width, _ = shape
    if resample:
        height, width = (height // 2, width // 2) if resample == 1 else (2 * height, 2 * width)
    order = torch.channels_last if by_pixel else torch.contiguous_format
    y, x_out = (
        torch.empty(
            (n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=order
        )
        for _ in range(2)
    )
    mean = torch.empty((n, groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    inputs = (x.data_ptr(), _address(skip), weight.data_ptr(), bias.data_ptr(), modulation, 0, 0)
    outputs = tuple(t.data_ptr() for t in (y, x_out, mean, rstd))
    with cuda_stream(x) as stream:
        size = module.ada_group_norm_workspace(shape, options)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        module.ada_group_norm(shape, options, inputs, outputs, workspace.data_ptr(), stream)
    return y, x_out, mean, rstd


def backward(
    grad, grad_x_out, x, skip, weight, bias, scale_shift, mean, rstd, groups, silu, resample, wanted
):
    """Gradients of (x, skip, weight, bias, scale_shift) by the kernels, None where not wanted."""
    module = cuda_extension()
    x, by_pixel = _dense(x)
    skip = None if skip is None else _in_order(skip, by_pixel)
    grad = _in_order(grad, by_pixel)
    grad_x_out = None if grad_x_out is None else _in_order(grad_x_out, by_pixel)
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_shift, modulation, stride = _rows(scale_shift)
    shape, options = _call(x, skip, scale_shift, stride, groups, 0.0, silu, by_pixel, resample)
    inputs = (grad, grad_x_out, x, skip, mean, rstd, weight, bias)
    inputs = (*map(_address, inputs), modulation)
    either = wanted[0] or wanted[1]  # the kernels write both or none
    outputs = (
        torch.empty_like(x) if either else None,
        torch.empty_like(skip) if either and skip is not None else None,
        torch.empty_like(weight) if wanted[2] else None,
        torch.empty_like(weight) if wanted[3] else None,
        weight.new_empty(shape[0], 2 * shape[1]) if wanted[4] else None,
    )
    with cuda_stream(x) as stream:
        size = module.ada_group_norm_backward_workspace(shape, options)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        addresses = tuple(map(_address, outputs))
        module.ada_group_norm_backward(
            shape, options, inputs, addresses, workspace.data_ptr(), stream
        )
    results = [found if want else None for found, want in zip(outputs, wanted, strict=True)]
    if results[4] is not None:
        results[4] = results[4].to(scale_shift.dtype)
    return results
