"""The torch side of ada_group_norm: registration, autograd, which tensors the kernels take."""

import math

import torch

from . import reference
from ._backend import reference_forced
from ._library import cuda_extension, cuda_stream, define, extension
from .ada_group_norm import check_shapes

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor bias, Tensor? scale_shift, int groups, float eps, bool silu"
)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # codes of csrc/common/dtype.h
_CPU_DTYPES = (torch.float32, torch.bfloat16)


def kernels_take(x):
    """Whether a tensor of x's dtype and device goes to the kernels."""
    if x.device.type == "cuda":
        return x.dtype in _DTYPES and not reference_forced()
    return x.device.type in ("cpu", "meta") and x.dtype in _CPU_DTYPES and not reference_forced()


def forward(x, weight, bias, scale_shift, groups, eps, silu):
    """``ada_group_norm`` on tensors; the documentation is there."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{name} is {type(tensor).__name__}; give torch tensors or NumPy arrays"
            )
    if scale_shift is not None and not isinstance(scale_shift, torch.Tensor):
        raise TypeError(f"scale_shift is {type(scale_shift).__name__}; give a tensor or None")
    check_shapes(x, weight, bias, scale_shift, groups, eps)
    if not kernels_take(x):
        if not x.dtype.is_floating_point:
            raise TypeError(f"x is {x.dtype}; it must be of a floating-point dtype")
        return reference.ada_group_norm(x, weight, bias, scale_shift, groups, eps, silu)
    if weight.dtype != torch.float32 or bias.dtype != torch.float32:
        weight, bias = weight.float(), bias.float()
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or bias.requires_grad
        or (scale_shift is not None and scale_shift.requires_grad)
    )
    if scale_shift is not None and scale_shift.dtype != torch.float32:
        # The CUDA kernels read it as it is; gradients of all parameters are float32 everywhere.
        if differentiable or x.device.type != "cuda" or scale_shift.dtype not in _DTYPES:
            scale_shift = scale_shift.float()
    if differentiable:
        return _AdaGroupNorm.apply(x, weight, bias, scale_shift, groups, eps, silu)
    return _operator(x, weight, bias, scale_shift, groups, eps, silu)


class _AdaGroupNorm(torch.autograd.Function):
    """Keeps x, mean and rstd; makes only the gradients that are needed."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale_shift, groups, eps, silu):
        y, mean, rstd = _moments_operator(x, weight, bias, scale_shift, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, scale_shift, mean, rstd)
        ctx.options = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx, grad):
        *inputs, mean, rstd = ctx.saved_tensors
        x, weight, bias, scale_shift = inputs
        groups, eps, silu = ctx.options
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph=True: stay differentiable
            y = reference.ada_group_norm(*inputs, groups, eps, silu)
            asked = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
            made = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
            found = [next(made) if want else None for want in wanted]
        else:
            found = _backward_operator(
                grad, x, mean, rstd, weight, bias, scale_shift, groups, silu, wanted
            )
            found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return (*found, None, None, None)


def _dense(x):
    """(x, whether channels come last): x itself when it is dense in either order, else a copy."""
    if x.is_contiguous():
        return x, False
    if x.dim() > 2 and x.stride(1) == 1 and x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


def _in_order(grad, by_pixel):
    """grad, dense in the order that _dense found for x."""
    return grad.movedim(1, -1).contiguous().movedim(-1, 1) if by_pixel else grad.contiguous()


def _rows(scale_shift):
    """(tensor, address, floats between its rows) with dense rows; (None, 0, 0) for None."""
    if scale_shift is None:
        return None, 0, 0
    width = scale_shift.shape[1]
    if scale_shift.stride(1) != 1 or scale_shift.stride(0) < width:
        scale_shift = scale_shift.contiguous()
    return scale_shift, scale_shift.data_ptr(), max(scale_shift.stride(0), width)


def _cpu(x, weight, bias, scale_shift, groups, eps, silu):
    return _run_forward(x, weight, bias, scale_shift, groups, eps, silu, None, None)


def _cpu_moments(x, weight, bias, scale_shift, groups, eps, silu):
    mean = torch.empty((x.shape[0], groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    y = _run_forward(x, weight, bias, scale_shift, groups, eps, silu, mean, rstd)
    return y, mean, rstd


def _run_forward(x, weight, bias, scale_shift, groups, eps, silu, mean, rstd):
    x, by_pixel = _dense(x)
    shape = x.shape
    y = torch.empty_like(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_shift, address, stride = _rows(scale_shift)
    extension().ada_group_norm(
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        address,
        stride,
        y.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
        shape[0],
        shape[1],
        math.prod(shape[2:]),
        groups,
        eps,
        silu,
        _DTYPES[x.dtype],
        by_pixel,
    )
    return y


def _cpu_backward(grad, x, mean, rstd, weight, bias, scale_shift, groups, silu, wanted):
    x, by_pixel = _dense(x)
    grad = _in_order(grad, by_pixel)
    shape = x.shape
    results = _gradients(x, weight, scale_shift, wanted)
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
        *(tensor.data_ptr() for tensor in results),  # 0 for those without elements
        shape[0],
        shape[1],
        math.prod(shape[2:]),
        groups,
        silu,
        _DTYPES[x.dtype],
        by_pixel,
    )
    return results


def _gradients(x, weight, scale_shift, wanted):
    """Empty results of the backward op; those that nobody wants have no elements."""
    n, channels = x.shape[:2]
    return (
        torch.empty_like(x) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight) if wanted[1] else weight.new_empty(0),
        torch.empty_like(weight) if wanted[2] else weight.new_empty(0),
        weight.new_empty((n, 2 * channels) if wanted[3] and scale_shift is not None else 0),
    )


# ---- CUDA ----


def _cuda(x, weight, bias, scale_shift, groups, eps, silu):
    return _run_cuda(x, weight, bias, scale_shift, groups, eps, silu, None, None)


def _cuda_moments(x, weight, bias, scale_shift, groups, eps, silu):
    mean = torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    y = _run_cuda(x, weight, bias, scale_shift, groups, eps, silu, mean, rstd)
    return y, mean, rstd


def _run_cuda(x, weight, bias, scale_shift, groups, eps, silu, mean, rstd):
    module = cuda_extension()
    _check_same_device(x, weight=weight, bias=bias, scale_shift=scale_shift)
    x, by_pixel = _dense(x)
    y = torch.empty_like(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_shift, address, stride = _rows(scale_shift)
    shape, options = _cuda_call(x, scale_shift, stride, groups, eps, silu, by_pixel)
    inputs = (x.data_ptr(), 0, weight.data_ptr(), bias.data_ptr(), address, 0, 0)
    outputs = (y.data_ptr(), 0, *(0 if t is None else t.data_ptr() for t in (mean, rstd)))
    with cuda_stream(x) as stream:
        # The caching allocator orders the reuse of its memory by stream.
        size = module.ada_group_norm_workspace(shape, options)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        module.ada_group_norm(shape, options, inputs, outputs, workspace.data_ptr(), stream)
    return y


def _cuda_backward(grad, x, mean, rstd, weight, bias, scale_shift, groups, silu, wanted):
    module = cuda_extension()
    parameters = {"weight": weight, "bias": bias, "scale_shift": scale_shift}
    _check_same_device(x, grad=grad, mean=mean, rstd=rstd, **parameters)
    x, by_pixel = _dense(x)
    grad = _in_order(grad, by_pixel)
    results = _gradients(x, weight, scale_shift, wanted)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_shift, address, stride = _rows(scale_shift)
    shape, options = _cuda_call(x, scale_shift, stride, groups, 0.0, silu, by_pixel)
    tensors = grad.data_ptr(), 0, x.data_ptr(), 0, mean.data_ptr(), rstd.data_ptr()
    inputs = (*tensors, weight.data_ptr(), bias.data_ptr(), address)
    dx, *others = (t.data_ptr() if t.numel() else 0 for t in results)
    with cuda_stream(x) as stream:
        size = module.ada_group_norm_backward_workspace(shape, options)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        module.ada_group_norm_backward(
            shape, options, inputs, (dx, 0, *others), workspace.data_ptr(), stream
        )
    return results


def _cuda_call(x, scale_shift, stride, groups, eps, silu, by_pixel):
    """The shape and options that adm_rt._cuda takes; see csrc/ops/ada_group_norm_cuda.h."""
    pixels = math.prod(x.shape[2:])
    by_pixel = by_pixel or pixels == 1  # then both orders are one, and this one is faster
    code = 0 if scale_shift is None else _DTYPES[scale_shift.dtype]
    shape = (x.shape[0], x.shape[1], 0, 1, pixels, groups)
    return shape, (eps, silu, _DTYPES[x.dtype], by_pixel, 0, code, stride)


def _check_same_device(x, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them")


# ---- Shapes, dtypes and strides only ----


def _fake(x, weight, bias, scale_shift, groups, eps, silu):
    return torch.empty_like(_dense(x)[0])


def _fake_moments(x, weight, bias, scale_shift, groups, eps, silu):
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(_dense(x)[0]), mean, torch.empty_like(mean)


def _fake_backward(grad, x, mean, rstd, weight, bias, scale_shift, groups, silu, wanted):
    return _gradients(_dense(x)[0], weight, scale_shift, wanted)


_operator = define(f"ada_group_norm({_ARGUMENTS}) -> Tensor", cpu=_cpu, cuda=_cuda, fake=_fake)
_moments_operator = define(
    f"ada_group_norm_with_moments({_ARGUMENTS}) -> (Tensor y, Tensor mean, Tensor rstd)",
    cpu=_cpu_moments,
    cuda=_cuda_moments,
    fake=_fake_moments,
)
_backward_operator = define(
    "ada_group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor bias, Tensor? scale_shift, int groups, bool silu, bool[4] wanted) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale_shift)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
