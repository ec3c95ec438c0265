"""What leads from torch, CuPy and DLPack arrays to the CUDA kernels of ada_group_norm.

There need not be a GPU: the kernels run under the emulator on host memory, which CPU tensors and a
stand-in for CuPy lend them.
"""

import contextlib
import importlib
import sys
import types

import numpy as np
import pytest
import torch
from emulated_norm import emulated_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from adm_rt import ops, testing
from adm_rt.benchmarking import cuda_ops
from adm_rt.ops import _library, input_gradients, reference

torch_side = importlib.import_module("adm_rt.ops._ada_group_norm_torch")
resample_side = importlib.import_module("adm_rt.ops._ada_group_norm_resample")
op_module = importlib.import_module("adm_rt.ops.ada_group_norm")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def cuda(compile_emulated, monkeypatch):
    """Host memory counts as the device; yields the list of streams that were used."""
    streams = []

    @contextlib.contextmanager
    def stream_of(tensor):
        streams.append(tensor.device)
        yield 0

    module = emulated_cuda(compile_emulated)
    monkeypatch.setattr(torch_side, "cuda_extension", lambda: module)
    monkeypatch.setattr(torch_side, "cuda_stream", stream_of)
    return streams


@pytest.fixture
def resample_on_cuda(cuda, monkeypatch):
    """ada_group_norm_resample takes CPU tensors for CUDA tensors."""
    monkeypatch.setattr(torch_side, "kernels_take", lambda x: x.dtype in torch_side._DTYPES)
    monkeypatch.setattr(resample_side, "_on_device", lambda x: True)
    for name in ("cuda_extension", "cuda_stream"):
        monkeypatch.setattr(resample_side, name, getattr(torch_side, name))


@pytest.fixture
def autograd_on_cuda(cuda, monkeypatch):
    """CPU tensors go the way of CUDA tensors, gradients too."""
    monkeypatch.setattr(torch_side, "kernels_take", lambda x: x.dtype in torch_side._DTYPES)
    monkeypatch.setattr(torch_side, "_operator", torch_side._cuda)
    monkeypatch.setattr(torch_side, "_moments_operator", torch_side._cuda_moments)
    monkeypatch.setattr(torch_side, "_backward_operator", torch_side._cuda_backward)
    return cuda


def inputs(shape, dtype=torch.float32, by_pixel=True, seed=0):
    """x, weight, bias, scale_shift."""
    g = torch.Generator().manual_seed(seed)
    n, channels = shape[:2]
    x = (torch.randn(shape, generator=g) + 1).to(dtype)
    if by_pixel:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = 1 + 0.2 * torch.randn(channels, generator=g)
    bias = 0.3 * torch.randn(channels, generator=g)
    return x, weight, bias, 0.3 * torch.randn(n, 2 * channels, generator=g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_shape(cuda, dtype):
    for shape in ((1, 64, 4, 6), (2, 64, 5), (3, 96), (1, 64, 1, 1), (1, 36, 2, 3, 2)):
        for by_pixel in (True, False) if len(shape) > 2 else (False,):
            x, weight, bias, rows = inputs(shape, dtype, by_pixel)
            groups = 32 if shape[1] % 32 == 0 else 12
            modulations = (None, rows, rows.to(dtype)) if by_pixel else (rows,)
            for modulation in modulations:
                args = (x, weight, bias, modulation)
                doubles = [None if t is None else t.double() for t in args]
                exact = reference.ada_group_norm(*doubles, groups)
                plain = reference.ada_group_norm(*args, groups)
                y, mean, rstd = torch_side._cuda_moments(*args, groups, 1e-5, True)
                assert y.dtype == dtype and y.stride() == x.stride()
                testing.assert_as_good_as(y, plain, exact, what=f"{shape} {by_pixel=}")
                assert torch.equal(torch_side._cuda(*args, groups, 1e-5, True), y)
                values = x.double().reshape(shape[0], groups, -1)
                assert testing.max_error(mean, values.mean(2)) < 1e-6
                exact = (values.var(2, correction=0) + 1e-5).rsqrt()
                assert testing.max_error(rstd / exact, torch.ones_like(exact)) < 1e-6
    assert cuda and all(device == torch.device("cpu") for device in cuda)


def test_strides(cuda):
    """Slices and transposed inputs give what their dense copies give."""
    x, weight, bias, rows = inputs((2, 64, 6, 10))
    expected = torch_side._cuda(x, weight, bias, rows, 32, 1e-5, True)
    wide = torch.zeros(2, 64, 6, 20)
    wide[..., ::2] = x
    joined = torch.cat([torch.ones(2, 7), rows, torch.ones(2, 3)], dim=1)
    parameters = torch.stack([weight, bias], dim=1)
    for args in (
        (wide[..., ::2], weight, bias, rows),
        (x, weight, bias, joined[:, 7:-3]),
        (x, weight, bias, rows.t().contiguous().t()),
        (x, parameters[:, 0], parameters[:, 1], rows),
    ):
        torch.testing.assert_close(torch_side._cuda(*args, 32, 1e-5, True), expected)
    row = rows[:1].expand(2, -1)
    got = torch_side._cuda(x, weight, bias, row, 32, 1e-5, True)
    assert torch.equal(got, torch_side._cuda(x, weight, bias, row.clone(), 32, 1e-5, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(autograd_on_cuda, dtype):
    for shape, by_pixel in (((2, 64, 4, 6), True), ((2, 96, 5), True), ((2, 32, 3, 3), False)):
        tensors = inputs(shape, dtype, by_pixel)
        grad = inputs(shape, dtype, not by_pixel, seed=1)[0]

        def gradients(function, tensors, grad):
            leaves = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(function(*leaves), leaves, grad)

        exact = gradients(reference.ada_group_norm, [t.double() for t in tensors], grad.double())
        plain = gradients(reference.ada_group_norm, tensors, grad)
        found = gradients(ops.ada_group_norm, tensors, grad)
        for name, f, p, e in zip("x weight bias rows".split(), found, plain, exact, strict=True):
            assert f.dtype == p.dtype
            testing.assert_as_good_as(f, p, e, floor=3e-6, what=f"{name} {shape}")
        assert found[0].stride() == tensors[0].stride()
        low = (*tensors[:3], tensors[3].to(dtype))  # a modulation in x's type: so is its gradient
        assert gradients(ops.ada_group_norm, low, grad)[3].dtype == dtype


def test_the_input_gradient_alone(autograd_on_cuda, monkeypatch):
    """The classifier's gradient asks for dx only: no address of a parameter's gradient is given."""
    module, given = torch_side.cuda_extension(), []
    spy = types.SimpleNamespace(
        ada_group_norm=module.ada_group_norm,
        ada_group_norm_workspace=module.ada_group_norm_workspace,
        ada_group_norm_backward_workspace=module.ada_group_norm_backward_workspace,
        ada_group_norm_backward=lambda *args: (
            given.append([address != 0 for address in args[3]]),
            module.ada_group_norm_backward(*args),
        ),
    )
    monkeypatch.setattr(torch_side, "cuda_extension", lambda: spy)
    x, weight, bias, rows = inputs((2, 64, 4, 6), torch.float16)
    leaf = x.detach().requires_grad_()
    y = ops.ada_group_norm(leaf, weight, bias, rows)
    torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert given == [[True, False, False, False, False]]


def composed(x, skip, weight, bias, rows, resample, norm=reference.ada_group_norm):
    joined = x if skip is None else torch.cat([x, skip], 1)
    y = norm(joined, weight, bias, rows)
    return tuple(resample_side.resampled(t, resample) for t in (y, joined))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resample(resample_on_cuda, dtype):
    """Joined and resampled, results and gradients; low: the modulation in x's type."""
    for resample, own, by_pixel, low in (
        ("down", 96, True, False), ("up", 64, True, True), (None, 32, True, False),
        ("up", 32, False, False),
    ):  # fmt: skip
        channels = 64 if resample is None or not by_pixel else 96
        joined, weight, bias, rows = inputs((2, channels, 4, 6), dtype, by_pixel)
        x = joined[:, :own].clone(memory_format=torch.preserve_format)
        x = x.contiguous(memory_format=torch.channels_last) if by_pixel else x.contiguous()
        skip = joined[:, own:].contiguous() if own < channels else None  # in another order
        tensors = [x, skip, weight, bias, rows.to(dtype) if low else rows]
        y, x_out = ops.ada_group_norm_resample(
            x, weight, bias, tensors[4], skip=skip, resample=resample
        )
        grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]

        def gradients(function, convert, tensors=tensors, grads=grads):
            leaves = [None if t is None else convert(t).requires_grad_() for t in tensors]
            results = function(*leaves)
            asked = [t for t in leaves if t is not None]
            upstream = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
            return (*results, *torch.autograd.grad(results, asked, upstream))

        def ours(x, skip, weight, bias, rows, resample=resample):
            return ops.ada_group_norm_resample(x, weight, bias, rows, skip=skip, resample=resample)

        def plain(*leaves, resample=resample):
            return composed(*leaves, resample)

        found = gradients(ours, lambda t: t.detach().clone())
        assert torch.equal(found[0], y) and torch.equal(found[1], x_out)
        exact = gradients(plain, lambda t: t.detach().double())
        other = gradients(plain, lambda t: t.detach().clone())
        for index, (f, p, e) in enumerate(zip(found, other, exact, strict=True)):
            assert f.dtype == p.dtype, index
            what = f"{index} of {resample} {dtype}"
            testing.assert_as_good_as(f.detach(), p, e, floor=3e-6, what=what)
        order = torch.channels_last if by_pixel else torch.contiguous_format
        assert y.is_contiguous(memory_format=order) and found[2].stride() == x.stride()


def test_resample_where_one_result_is_used(resample_on_cuda):
    x, weight, bias, rows = inputs((1, 64, 4, 6))
    for index in (0, 1):
        leaf, other = x.detach().requires_grad_(), x.detach().requires_grad_()
        got = ops.ada_group_norm_resample(leaf, weight, bias, rows, resample="down")[index]
        expected = composed(other, None, weight, bias, rows, "down")[index]
        grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
        (found,), (exact,) = (
            torch.autograd.grad(r, t, grad) for r, t in ((got, leaf), (expected, other))
        )
        torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-5)


def test_resample_elsewhere():
    """On the CPU and in float64: the op and torch's operations."""
    x, weight, bias, rows = inputs((2, 64, 4, 6))
    for resample in ("down", "up", None):
        got = ops.ada_group_norm_resample(x, weight, bias, rows, resample=resample)
        expected = composed(x, None, weight, bias, rows, resample, ops.ada_group_norm)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    doubles = [t.double() for t in (x, weight, bias, rows)]
    y, _ = ops.ada_group_norm_resample(*doubles, skip=None, resample="up")
    assert y.dtype == torch.float64


def test_resample_refuses():
    x, weight, bias, rows = inputs((2, 64, 4, 6))
    for error, text, options in (
        (ValueError, "resample='half' is not one of None, 'down', 'up'", dict(resample="half")),
        (ValueError, r"skip has shape \(2, 64, 4, 5\)", dict(skip=x[..., :5])),
        (TypeError, "skip is torch.float16 and x torch.float32", dict(skip=x.half())),
        (TypeError, "skip is int", dict(skip=3)),
        (ValueError, r"weight has shape \(64,\); x of shape \(2, 128, 4, 6\)", dict(skip=x)),
    ):
        with pytest.raises(error, match=text):
            ops.ada_group_norm_resample(x, weight, bias, **options)
    with pytest.raises(ValueError, match="even height and width"):
        ops.ada_group_norm_resample(x[..., :5], weight, bias, resample="down")
    with pytest.raises(ValueError, match=r"must be \[N, C, H, W\]"):
        ops.ada_group_norm_resample(x[..., 0], weight, bias, resample="down")


def test_cuda_tensors_are_taken_by_the_kernels():
    """Shapes and strides of CUDA tensors without data: the op is registered for that device."""
    op_module.register()
    for name in ("ada_group_norm", "ada_group_norm_with_moments", "ada_group_norm_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adm_rt::{name}", "CUDA")
    with FakeTensorMode():
        for dtype in DTYPES:
            x = torch.empty(2, 64, 4, 6, dtype=dtype, device="cuda")
            x = x.to(memory_format=torch.channels_last)
            parameter = torch.empty(64, device="cuda")
            assert torch_side.kernels_take(x) and input_gradients._norm_kernels_take(x)
            y = ops.ada_group_norm(x, parameter, parameter)
            assert (y.device, y.dtype, y.stride()) == (x.device, dtype, x.stride())
        with ops.use_reference():
            assert not torch_side.kernels_take(x)
        assert not torch_side.kernels_take(torch.empty(1, device="cuda", dtype=torch.float64))


def test_tensors_on_two_devices(cuda):
    x, weight, bias, rows = inputs((1, 64, 2, 2))
    elsewhere = torch.empty(64, device="meta")
    with pytest.raises(ValueError, match="bias is on meta and x on cpu"):
        torch_side._cuda(x, weight, elsewhere, rows, 32, 1e-5, True)
    with pytest.raises(ValueError, match="weight is on meta and x on cpu"):
        moments = torch.empty(1, 32)
        torch_side._cuda_backward(
            x, x, moments, moments, elsewhere, bias, rows, 32, True, (True,) * 4
        )


def test_without_the_cuda_module(monkeypatch):
    """An error with the reason and the way out, not another implementation."""
    monkeypatch.setitem(sys.modules, "adm_rt._cuda", None)  # makes the import fail
    _library.cuda_extension.cache_clear()
    try:
        with pytest.raises(ImportError, match="ADM_RT_CUDA=on pip install"):
            torch_side._cuda(*inputs((1, 64, 2, 2)), 32, 1e-5, True)
    finally:
        monkeypatch.undo()
        _library.cuda_extension.cache_clear()


# ---- CuPy ----


class StandInArray:
    """Of a cupy.ndarray what the op uses, over a NumPy array."""

    __module__ = "cupy"
    device = None  # the StandInDevice of all arrays

    def __init__(self, array):
        self.array = array
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype
        self.flags, self.strides = array.flags, array.strides
        self.data = types.SimpleNamespace(ptr=array.ctypes.data)

    def transpose(self, order):
        return StandInArray(self.array.transpose(order))

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


class StandInDevice:
    def __init__(self, index):
        self.id, self.entered = index, 0

    def __enter__(self):
        self.entered += 1

    def __exit__(self, *_):
        pass


@pytest.fixture
def cupy(compile_emulated, monkeypatch):
    """A module `cupy` over host memory, with the kernels of the emulator."""

    monkeypatch.setattr(StandInArray, "device", StandInDevice(0))
    stream = types.SimpleNamespace(ptr=0)
    module = types.SimpleNamespace(
        ndarray=StandInArray,
        empty=lambda shape, dtype: StandInArray(np.empty(shape, dtype)),
        ascontiguousarray=lambda a: StandInArray(np.ascontiguousarray(a.array)),
        cuda=types.SimpleNamespace(get_current_stream=lambda: stream),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delitem(sys.modules, "adm_rt.ops._ada_group_norm_cupy", raising=False)
    op_module._cupy_side.cache_clear()
    side = op_module._cupy_side()
    monkeypatch.setattr(side, "cuda_extension", lambda: emulated_cuda(compile_emulated))
    yield module
    op_module._cupy_side.cache_clear()


def test_cupy_arrays(cupy):
    for dtype in (np.float32, np.float16):
        for shape, by_pixel in (((2, 64, 4, 6), True), ((2, 64, 4, 6), False), ((1, 96, 5), False)):
            tensors = inputs(shape, torch.float32, by_pixel)
            arrays = [StandInArray(t.numpy()) for t in tensors]
            arrays[0] = StandInArray(tensors[0].numpy().astype(dtype, order="K"))
            exact = reference.ada_group_norm(
                torch.from_numpy(arrays[0].array.astype(np.float64)),
                *(t.double() for t in tensors[1:]),
            )
            y = ops.ada_group_norm(*arrays)
            assert type(y) is StandInArray and y.dtype == dtype and y.strides == arrays[0].strides
            error = testing.max_error(torch.from_numpy(y.array.astype(np.float64)), exact)
            assert error < (1e-6 if dtype == np.float32 else 2e-3)
    assert StandInArray.device.entered > 0


def test_cupy_refuses(cupy):
    tensors = [t.numpy() for t in inputs((2, 64, 4, 6))]
    x, weight, bias, rows = map(StandInArray, tensors)
    with pytest.raises(TypeError, match="x is float64"):
        ops.ada_group_norm(StandInArray(tensors[0].astype(np.float64)), weight, bias)
    with pytest.raises(TypeError, match="bias is ndarray; with a CuPy x"):
        ops.ada_group_norm(x, weight, tensors[2])
    with pytest.raises(TypeError, match="weight is float16; as a CuPy array it is float32"):
        ops.ada_group_norm(x, StandInArray(tensors[1].astype(np.float16)), bias)
    with pytest.raises(ValueError, match=r"scale_shift has shape \(2, 64\)"):
        ops.ada_group_norm(x, weight, bias, StandInArray(tensors[3][:, :64]))
    rows.device = StandInDevice(1)
    with pytest.raises(ValueError, match="scale_shift is on CUDA device 1 and x on 0"):
        ops.ada_group_norm(x, weight, bias, rows)


# ---- DLPack ----


class Foreign:
    """An array of a library that nobody here knows."""

    device_type = 1

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device_type, 0

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda a: Foreign(np.from_dlpack(a)))


def test_dlpack_arrays():
    tensors = [t.numpy() for t in inputs((2, 64, 4, 6), by_pixel=False)]
    got = ops.ada_group_norm(*map(Foreign, tensors))
    assert isinstance(got, Foreign)
    assert np.array_equal(got.array, ops.ada_group_norm(*tensors))
    x, weight, bias, _ = map(Foreign, tensors)
    with pytest.raises(TypeError, match="weight is list and x an array of"):
        ops.ada_group_norm(x, [1.0], bias)
    bias.device_type = 2
    with pytest.raises(ValueError, match=r"bias is on DLPack device \(2, 0\) and x on \(1, 0\)"):
        ops.ada_group_norm(x, weight, bias)
    for array in (x, weight, bias):
        array.device_type = 10
    with pytest.raises(ValueError, match="DLPack device type 10"):
        ops.ada_group_norm(x, weight, bias)


def test_dlpack_arrays_on_cuda_are_viewed_as_tensors(monkeypatch):
    """What says that it is on CUDA goes to torch, whatever torch then makes of it."""
    seen = []
    monkeypatch.setattr(torch, "from_dlpack", lambda a: seen.append(a) or torch.from_numpy(a.array))
    tensors = [t.numpy() for t in inputs((2, 64, 4, 6), by_pixel=False)]
    arrays = [Foreign(t) for t in tensors]
    for array in arrays:
        array.device_type = 2
    got = ops.ada_group_norm(*arrays)
    assert seen == arrays and np.array_equal(got.array, ops.ada_group_norm(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (48, 40)])  # in shared memory; in chunks
def test_with_the_moments_at_hand_it_is_the_same(cuda, monkeypatch, size, dtype):
    """What the GPU benchmark times as the last kernel alone, and its baseline."""
    for name in ("cuda_extension", "cuda_stream"):
        monkeypatch.setattr(cuda_ops, name, getattr(torch_side, name))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 96, *size, generator=generator).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 96, generator=generator)
    scale_shift = torch.randn(2, 192, generator=generator).to(dtype)
    tensors = x, weight, bias, scale_shift
    exact = reference.ada_group_norm(*(t.double() for t in tensors))
    call, plain = cuda_ops.with_moments(*tensors), cuda_ops.folded(*tensors)()
    for _ in range(2):
        testing.assert_as_good_as(call(), plain, exact, what="with moments")
    assert testing.max_error(plain, exact) <= {2: 2e-2, 4: 1e-5}[x.element_size()]
