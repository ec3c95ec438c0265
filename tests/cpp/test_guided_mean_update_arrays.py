"""What leads from torch, CuPy and DLPack arrays to the CUDA kernels of guided_mean_update.

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
from emulated_update import ROW, EmulatedCuda
from torch._subclasses.fake_tensor import FakeTensorMode

from adm_rt import ops
from adm_rt.ops import StepCoefficients
from adm_rt.ops.philox import image_seeds

cuda_side = importlib.import_module("adm_rt.ops._guided_mean_update_cuda")
op_module = importlib.import_module("adm_rt.ops.guided_mean_update")


@pytest.fixture
def kernels(compile_emulated, monkeypatch):
    module = EmulatedCuda(compile_emulated("guided_mean_update_emulated.cpp"))
    monkeypatch.setattr(cuda_side, "cuda_extension", lambda: module)
    monkeypatch.setattr(cuda_side, "cuda_stream", lambda x: contextlib.nullcontext(0))
    return module


def make(dtype=torch.float32, layout=torch.contiguous_format, size=6):
    generator = torch.Generator().manual_seed(3)

    def normal(channels, dtype=torch.float32, layout=torch.contiguous_format):
        values = torch.randn(2, channels, size, size, generator=generator)
        return values.to(dtype).contiguous(memory_format=layout)

    x, history = normal(3), [normal(3), normal(3)]
    networks = [normal(c, dtype, layout) for c in (6, 6, 3)]
    return x, networks, history, torch.from_numpy(image_seeds(7, 2))


def by_kernels(x, networks, history, seeds, row=ROW, clip="static", noise=None):
    """The registered CUDA implementation, as the dispatcher calls it."""
    out, uncond, gradient = networks
    arguments = (list(row), gradient, uncond, history, noise, seeds, 5, True, clip, 0.9)
    return cuda_side.torch_op(x, out, *arguments)


def on_the_cpu(x, networks, history, seeds, row=ROW, clip="static", noise=None):
    out, uncond, gradient = networks
    return ops.guided_mean_update(
        x, out, row, gradient=gradient, uncond_output=uncond, history=history, noise=noise,
        seeds=seeds, step=5, learned_variance=True, clip=clip, quantile=0.9,
    )  # fmt: skip


def assert_same_bits(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("clip", ["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_networks_are_read_as_they_lie(kernels, dtype, layout, clip):
    inputs = make(dtype, layout)
    assert_same_bits(by_kernels(*inputs, clip=clip), on_the_cpu(*inputs, clip=clip))
    code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
    by_pixels = layout == torch.channels_last
    assert kernels.calls == [((code, code), (by_pixels, by_pixels))]


def test_what_differs_is_copied(kernels):
    x, networks, history, seeds = make(torch.bfloat16, torch.channels_last)
    networks[1] = networks[1].contiguous()  # another layout than the conditional prediction
    networks[2] = networks[2].half()
    inputs = (x, networks, history, seeds)
    assert_same_bits(by_kernels(*inputs), on_the_cpu(*inputs))
    assert kernels.calls.pop() == ((1, 2), (False, True))
    networks[1] = networks[1].float()  # another type
    networks[2] = networks[2].double()  # one that no kernel reads
    inputs = (x.transpose(2, 3), networks, [h.transpose(2, 3) for h in history], seeds)
    assert_same_bits(by_kernels(*inputs), on_the_cpu(*inputs))
    assert kernels.calls.pop() == ((0, 0), (False, False))


def test_nothing_optional_and_many_channels(kernels):
    row = StepCoefficients(x0_x=1.5, x0_out=-0.5, next_x=0.5, next_x0=0.5)
    x, networks, _, _ = make()
    inputs = (x, [networks[0], None, None], [], None, row)
    x_next, x0, state = by_kernels(*inputs)
    assert state.numel() == 0
    assert_same_bits((x_next, x0), on_the_cpu(*inputs)[:2])
    wide = torch.randn(1, 5, 4, 4)  # more channels than the kernels take by pixels
    out = torch.randn(1, 10, 4, 4).contiguous(memory_format=torch.channels_last)
    inputs = (wide, [out, None, None], [], None, row)
    assert_same_bits(by_kernels(*inputs)[:2], on_the_cpu(*inputs)[:2])
    assert kernels.calls[-1][1] == (False, False)
    noise = torch.randn(2, 3, 6, 6).transpose(2, 3)
    inputs = (x, networks, [], None, ROW, "none", noise)
    assert_same_bits(by_kernels(*inputs), on_the_cpu(*inputs))


def test_the_op_is_registered_for_cuda():
    op_module.register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("adm_rt::guided_mean_update", "CUDA")
    with FakeTensorMode():
        x, out = (torch.empty(2, c, 4, 4, device="cuda") for c in (3, 6))
        x_next, x0, state = ops.guided_mean_update(x, out, ROW._replace(noise=0.0))
        assert x_next.device.type == "cuda" and x_next.shape == x0.shape == state.shape == x.shape


# ---- CuPy ----


class StandInArray:
    """Of a cupy.ndarray what the op uses, over a NumPy array."""

    __module__ = "cupy"

    def __init__(self, array):
        self.array, self.device = array, contextlib.nullcontext()
        self.shape, self.dtype, self.flags = array.shape, array.dtype, array.flags
        self.ndim = array.ndim
        self.data = types.SimpleNamespace(ptr=array.ctypes.data)

    def transpose(self, *order):
        return StandInArray(self.array.transpose(*order))

    def get(self):
        return self.array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return 1, 0


@pytest.fixture
def cupy(kernels, monkeypatch):
    """A module `cupy` over host memory, with the kernels of the emulator."""
    module = types.SimpleNamespace(
        empty=lambda shape, dtype: StandInArray(np.empty(shape, dtype)),
        asarray=lambda a: StandInArray(np.asarray(a)),
        ascontiguousarray=lambda a, dtype: StandInArray(np.ascontiguousarray(a.array, dtype)),
        from_dlpack=lambda a: StandInArray(np.from_dlpack(a)),
        cuda=types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=0)),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    shared = contextlib.nullcontext()  # one device
    monkeypatch.setattr(
        StandInArray, "device", property(lambda s: shared, lambda s, v: None), False
    )
    return kernels


def cupy_call(x, networks, history, seeds, **options):
    out, uncond, gradient = (StandInArray(a.numpy()) for a in networks)
    results = ops.guided_mean_update(
        StandInArray(x.numpy()), out, ROW, gradient=gradient, uncond_output=uncond,
        history=[StandInArray(h.numpy()) for h in history], seeds=seeds, step=5,
        learned_variance=True, quantile=0.9, **options,
    )  # fmt: skip
    assert all(type(result) is StandInArray for result in results)
    return [torch.from_numpy(result.array) for result in results]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cupy_arrays(cupy, dtype, layout):
    inputs = make(dtype, layout)
    expected = on_the_cpu(*inputs)
    x, networks, history, seeds = inputs
    for given in (seeds.numpy(), StandInArray(seeds.numpy()), seeds.tolist()):
        assert_same_bits(cupy_call(x, networks, history, given), expected)
    assert cupy.calls[0][1] == (layout == torch.channels_last,) * 2
    with ops.use_reference():
        for got, best in zip(cupy_call(*inputs), expected, strict=True):
            torch.testing.assert_close(got, best, rtol=1e-5, atol=1e-5)


def test_cupy_refuses(cupy):
    x, networks, _, _ = make()
    arrays = [StandInArray(a.numpy()) for a in (x, networks[0])]
    row = ROW._replace(noise=0.0)
    with pytest.raises(TypeError, match="CuPy array of float64; give float32"):
        ops.guided_mean_update(StandInArray(x.double().numpy()), arrays[1], row)
    with pytest.raises(TypeError, match="model_output is a ndarray and x a StandInArray"):
        ops.guided_mean_update(arrays[0], networks[0].numpy(), row)
    with pytest.raises(TypeError, match="model_output is a StandInArray and x a ndarray"):
        ops.guided_mean_update(x.numpy(), arrays[1], row)


# ---- DLPack ----


class Foreign:
    """An array of a library that nobody here knows."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return 1, 0

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda a: Foreign(np.from_dlpack(a)))


def test_dlpack_arrays():
    x, networks, history, seeds = make()
    expected = on_the_cpu(x, networks, history, seeds)
    out, uncond, gradient = (Foreign(a.numpy()) for a in networks)
    for given in (seeds.numpy(), Foreign(seeds.numpy())):
        results = ops.guided_mean_update(
            Foreign(x.numpy()), out, ROW, gradient=gradient, uncond_output=uncond,
            history=[Foreign(h.numpy()) for h in history], seeds=given, step=5,
            learned_variance=True, quantile=0.9,
        )  # fmt: skip
        assert all(isinstance(result, Foreign) for result in results)
        assert_same_bits([torch.from_numpy(result.array) for result in results], expected)
    row = StepCoefficients(next_x=1.0)
    assert ops.guided_mean_update(Foreign(x.numpy()), out, row)[2] is None
    with pytest.raises(TypeError, match="model_output is list"):
        ops.guided_mean_update(Foreign(x.numpy()), [1.0], row)
