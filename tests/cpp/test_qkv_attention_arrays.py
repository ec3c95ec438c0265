"""What leads from torch, CuPy and DLPack arrays to the CUDA kernels of qkv_attention.

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
from emulated_attention import emulated_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from adm_rt import ops
from adm_rt.ops import _library, input_gradients, reference

torch_side = importlib.import_module("adm_rt.ops._qkv_attention_torch")
op_module = importlib.import_module("adm_rt.ops.qkv_attention")


@pytest.fixture
def kernels(compile_emulated):
    module = emulated_cuda(compile_emulated)
    module.device()
    return module


@pytest.fixture
def cuda(kernels, monkeypatch):
    """Host memory counts as the device, and CPU tensors go the way of CUDA tensors; yields the list
    of devices whose stream was asked for."""
    asked = []

    @contextlib.contextmanager
    def stream_of(tensor):
        asked.append(tensor.device)
        yield 0

    monkeypatch.setattr(torch_side, "cuda_extension", lambda: kernels)
    monkeypatch.setattr(torch_side, "cuda_stream", stream_of)
    monkeypatch.setattr(torch_side, "kernels_take", lambda x, _: x.dtype in torch_side._CUDA_DTYPES)
    monkeypatch.setattr(torch_side, "_operator", torch_side._cuda)
    monkeypatch.setattr(torch_side, "_stats_operator", torch_side._cuda_with_stats)
    monkeypatch.setattr(torch_side, "_backward_operator", torch_side._cuda_backward)
    return asked


def make_qkv(dtype=torch.float32, token_major=True, shape=(2, 96, 20)):
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    return qkv.transpose(1, 2).contiguous().transpose(1, 2) if token_major else qkv


@pytest.mark.parametrize("token_major", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors(cuda, dtype, token_major):
    """Results and gradients keep the order of memory of qkv, whatever that of the gradient."""
    limit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    leaf = make_qkv(dtype, token_major).requires_grad_()
    out = ops.qkv_attention(leaf, 2, "legacy", 5)
    assert out.shape == (2, 32, 5) and out.dtype == dtype
    assert torch_side._is_token_major(out) == token_major
    with torch.no_grad():
        assert torch.equal(out, ops.qkv_attention(leaf, 2, "legacy", 5))
    wide = leaf.detach().double().requires_grad_()
    exact = reference.qkv_attention(wide, 2, "legacy", 5)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=limit)
    dense = make_qkv(dtype, False, out.shape)
    for grad in (dense, make_qkv(dtype, True, out.shape), dense[:, :1].expand_as(dense)):
        (dqkv,) = torch.autograd.grad(out, leaf, grad, retain_graph=True)
        assert dqkv.stride() == leaf.stride() and dqkv.dtype == dtype
        (expected,) = torch.autograd.grad(exact, wide, grad.double(), retain_graph=True)
        torch.testing.assert_close(dqkv.double(), expected, rtol=0, atol=4 * limit)
    assert cuda and all(device == torch.device("cpu") for device in cuda)


def test_strides(cuda):
    """Slices give what their dense copies give; a single token lies in both orders at once."""
    qkv = make_qkv()
    wide = torch.zeros(2, 96, 40)
    wide[..., ::2] = qkv
    expected = ops.qkv_attention(qkv, 2)
    for strided in (wide[..., ::2], wide.transpose(0, 1)[..., ::2].contiguous().transpose(0, 1)):
        assert torch.equal(ops.qkv_attention(strided, 2), expected)
    one = make_qkv(shape=(2, 96, 1))
    assert torch.equal(ops.qkv_attention(one, 2, "new"), one[:, 64:])


def test_refuses(cuda):
    with pytest.raises(TypeError, match="float64; the kernels take float32, bfloat16, float16"):
        torch_side._cuda(torch.zeros(1, 6, 4).double(), 1, "new", 4)
    with pytest.raises(RuntimeError, match="head_dim=257"):
        torch_side._cuda(torch.zeros(1, 771, 4), 1, "new", 4)
    assert torch_side._cuda(torch.zeros(0, 6, 4), 1, "new", 4).shape == (0, 2, 4)


def test_cuda_tensors_are_taken_by_the_kernels():
    """Shapes and strides of CUDA tensors without data: the op is registered for that device."""
    op_module.register()
    for name in ("qkv_attention", "qkv_attention_with_stats", "qkv_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adm_rt::{name}", "CUDA")
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            by_token = torch.empty(2, 20, 96, device="cuda", dtype=dtype).transpose(1, 2)
            for qkv in (by_token, torch.empty(2, 96, 20, device="cuda", dtype=dtype)):
                token_major = qkv is by_token
                assert torch_side.kernels_take(qkv, 2)
                out, stats = torch.ops.adm_rt.qkv_attention_with_stats(qkv, 2, "new", 20)
                assert ops.qkv_attention(qkv, 2).stride() == out.stride()
                assert torch_side._is_token_major(out) == token_major
                assert stats.dtype == torch.float32 and stats.shape == (2, 2, 2, 20)
                dqkv = torch.ops.adm_rt.qkv_attention_backward(out, qkv, out, stats, 2, "new")
                assert dqkv.stride() == qkv.stride()
                out, saved = input_gradients.qkv_attention_forward(qkv, 2, "new")
                assert len(saved) == 3, "the classifier's gradient ran plain torch"
        with ops.use_reference():
            assert not torch_side.kernels_take(by_token, 2)
        assert not torch_side.kernels_take(torch.empty(1, device="cuda", dtype=torch.float64), 1)
        assert not torch_side.kernels_take(torch.empty(1, 771, 1, device="cuda"), 1)


def test_without_the_cuda_module(monkeypatch):
    """An error with the reason and the way out, not another implementation."""
    monkeypatch.setitem(sys.modules, "adm_rt._cuda", None)  # makes the import fail
    _library.cuda_extension.cache_clear()
    try:
        with pytest.raises(ImportError, match="ADM_RT_CUDA=on pip install"):
            torch_side._cuda(make_qkv(), 2, "new", 20)
    finally:
        monkeypatch.undo()
        _library.cuda_extension.cache_clear()


# ---- CuPy ----


class StandInArray:
    """Of a cupy.ndarray what the op uses, over a NumPy array."""

    __module__ = "cupy"

    def __init__(self, array):
        self.array, self.device = array, contextlib.nullcontext()
        self.shape, self.dtype, self.flags = array.shape, array.dtype, array.flags
        self.data = types.SimpleNamespace(ptr=array.ctypes.data)

    def transpose(self, *order):
        return StandInArray(self.array.transpose(*order))

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


@pytest.fixture
def cupy(kernels, monkeypatch):
    """A module `cupy` over host memory, with the kernels of the emulator."""
    module = types.SimpleNamespace(
        empty=lambda shape, dtype: StandInArray(np.empty(shape, dtype)),
        ascontiguousarray=lambda a: StandInArray(np.ascontiguousarray(a.array)),
        cuda=types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=0)),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delitem(sys.modules, "adm_rt.ops._qkv_attention_cupy", raising=False)
    op_module._cupy_side.cache_clear()
    monkeypatch.setattr(op_module._cupy_side(), "cuda_extension", lambda: kernels)
    yield
    op_module._cupy_side.cache_clear()


def test_cupy_arrays(cupy):
    for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        for token_major in (True, False):
            qkv = make_qkv(dtype, token_major)
            out = ops.qkv_attention(StandInArray(qkv.numpy()), 2, "new", 5)
            exact = reference.qkv_attention(qkv.double(), 2, "new", 5)
            assert type(out) is StandInArray and out.array.dtype == qkv.numpy().dtype
            got = torch.from_numpy(out.array)
            assert torch_side._is_token_major(got) == token_major
            torch.testing.assert_close(got.double(), exact, rtol=0, atol=limit)
    sliced = StandInArray(make_qkv(token_major=False, shape=(2, 96, 40)).numpy()[..., ::2])
    dense = StandInArray(np.ascontiguousarray(sliced.array))
    assert np.array_equal(ops.qkv_attention(sliced, 2).array, ops.qkv_attention(dense, 2).array)


def test_cupy_refuses(cupy):
    with pytest.raises(TypeError, match="CuPy array of float64; give float32 or float16"):
        ops.qkv_attention(StandInArray(np.zeros((1, 6, 4))), 1)
    with pytest.raises(ValueError, match="13 channels"):
        ops.qkv_attention(StandInArray(np.zeros((1, 13, 4), np.float32)), 1)


# ---- DLPack ----


class Foreign:
    """An array of a library that nobody here knows."""

    def __init__(self, array, device_type=1):
        self.array, self.device_type = array, device_type

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device_type, 0

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda a: Foreign(np.from_dlpack(a)))


def test_dlpack_arrays(monkeypatch):
    array = make_qkv(token_major=False).numpy()
    expected = ops.qkv_attention(array, 2, "new", 5)
    got = ops.qkv_attention(Foreign(array), 2, "new", 5)
    assert isinstance(got, Foreign) and np.array_equal(got.array, expected)
    # What says that it is on CUDA goes to torch, whatever torch then makes of it.
    monkeypatch.setattr(torch, "from_dlpack", lambda a: torch.from_numpy(a.array))
    got = ops.qkv_attention(Foreign(array, device_type=2), 2, "new", 5)
    assert isinstance(got, Foreign) and np.array_equal(got.array, expected)
    with pytest.raises(ValueError, match="DLPack device type 10"):
        ops.qkv_attention(Foreign(array, device_type=10), 2)
