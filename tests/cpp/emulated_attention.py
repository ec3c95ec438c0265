"""qkv_attention's CUDA kernels under the emulator, called as adm_rt._cuda is called, and cases.

NumPy only: the sanitized runs import it where torch is not.
"""

import ctypes
import functools
from typing import NamedTuple

import numpy as np
from emulated_dtypes import BFLOAT16, FLOAT16, FLOAT32, pack, unpack

LEGACY, NEW = 0, 1
CHANNEL_MAJOR, TOKEN_MAJOR = 0, 1
FORWARD, REVERSE, SHUFFLED = SCHEDULES = 0, 1, 2
# One launcher's choice depends on how many multiprocessors there are to fill.
FEW, MANY = 1, 1000


SOURCE = "qkv_attention_emulated.cpp"


@functools.cache
def emulated_cuda(compile_emulated):
    """The kernels, compiled once for all test files; compile_emulated: the fixture."""
    return EmulatedCuda(compile_emulated(SOURCE))


class EmulatedCuda:
    """The functions of adm_rt._cuda on host memory."""

    def __init__(self, library):
        self.library = library if hasattr(library, "run_forward") else ctypes.CDLL(str(library))
        self.library.error_text.restype = ctypes.c_char_p
        self.library.workspace_bytes.restype = ctypes.c_int64

    def device(self, schedule=FORWARD, multiprocessors=FEW):
        self.library.set_device(schedule, ctypes.c_uint(multiprocessors))

    def _check(self, failed):
        if failed:
            raise RuntimeError(self.library.error_text().decode())

    def qkv_attention(self, qkv, out, stats, *sizes_layout_stream):
        *sizes, layout, _stream = sizes_layout_stream
        pointers = map(ctypes.c_uint64, (qkv, out, stats))
        self._check(self.library.run_forward(*pointers, (ctypes.c_int64 * 7)(*sizes), layout))

    def qkv_attention_backward(self, grad, qkv, out, stats, dqkv, workspace, *sizes_layout_stream):
        *sizes, layout, _stream = sizes_layout_stream
        pointers = map(ctypes.c_uint64, (grad, qkv, out, stats, dqkv, workspace))
        self._check(self.library.run_backward(*pointers, (ctypes.c_int64 * 7)(*sizes), layout))

    def qkv_attention_backward_workspace(self, batch, heads, num_queries):
        return self.library.workspace_bytes(
            (ctypes.c_int64 * 7)(batch, heads, 1, 1, num_queries, 0, 0)
        )


class Case(NamedTuple):
    """One call; num_queries 0 is all of them."""

    batch: int
    heads: int
    head_dim: int
    length: int
    num_queries: int = 0
    order: int = NEW
    dtype: int = BFLOAT16
    layout: int = TOKEN_MAJOR
    schedule: int = FORWARD
    multiprocessors: int = FEW

    @property
    def queries(self):
        return self.num_queries or self.length

    def inputs(self):
        """qkv [N, 3*H*d, T] and a gradient [N, H*d, Tq]: float32 values of the dtype."""
        rng = np.random.default_rng(abs(hash(self[:5])))
        width = self.heads * self.head_dim
        qkv = rng.standard_normal((self.batch, 3 * width, self.length), dtype=np.float32)
        grad = rng.standard_normal((self.batch, width, self.queries), dtype=np.float32)
        return rounded(qkv, self.dtype), rounded(grad, self.dtype)

    def sizes(self):
        return *self[:4], self.queries, self.order, self.dtype


def rounded(values, dtype):
    return unpack(pack(values, dtype), dtype)


def unset(shape, dtype, offset=0):
    """An array of NaN, `offset` elements behind a multiple of 16 bytes.

    It ends where its memory ends, so that AddressSanitizer sees an access behind it.
    """
    size = int(np.prod(shape))
    if dtype == FLOAT32:
        buffer = np.full(size + offset, np.nan, np.float32)
    else:
        buffer = np.full(size + offset, 0xFFFF, np.uint16)
    assert buffer.ctypes.data % 16 == 0, "malloc gave an address that is no multiple of 16"
    return buffer[offset:].reshape(shape)


class Run:
    """Forward and backward pass of a case; results as float32 in channel-major order."""

    def __init__(self, cuda, case, qkv=None, grad=None, *, offset=0):
        self.case, self.offset = case, offset
        drawn = case.inputs()
        qkv = drawn[0] if qkv is None else qkv
        grad = drawn[1] if grad is None else grad
        cuda.device(case.schedule, case.multiprocessors)
        width, sizes = case.heads * case.head_dim, (*case.sizes(), case.layout, 0)
        memory = self._place(qkv)
        out = self._empty(width, case.queries)
        stats = unset((case.batch, case.heads, 2, case.queries), FLOAT32)
        cuda.qkv_attention(memory.ctypes.data, out.ctypes.data, stats.ctypes.data, *sizes)
        self.out, self.stats = self._values(out), stats
        dqkv = self._empty(3 * width, case.length)
        size = cuda.qkv_attention_backward_workspace(case.batch, case.heads, case.queries)
        workspace = unset((size // 4,), FLOAT32)
        grad = self._place(grad)
        arrays = (grad, memory, out, stats, dqkv, workspace)
        cuda.qkv_attention_backward(*(array.ctypes.data for array in arrays), *sizes)
        self.dqkv = self._values(dqkv)

    def _empty(self, channels, tokens):
        token_major = self.case.layout == TOKEN_MAJOR
        last = (tokens, channels) if token_major else (channels, tokens)
        return unset((self.case.batch, *last), self.case.dtype, self.offset)

    def _place(self, values):
        array = self._empty(*values.shape[1:])
        if self.case.layout == TOKEN_MAJOR:
            values = values.transpose(0, 2, 1)
        array[...] = pack(values, self.case.dtype)
        return array

    def _values(self, array):
        values = unpack(array, self.case.dtype)
        return values.transpose(0, 2, 1) if self.case.layout == TOKEN_MAJOR else values


def exact(case, qkv, grad):
    """out and dqkv in float64: adm_rt.ops.reference without torch."""
    n, heads, d, length, queries = *case[:4], case.queries
    split = (n, heads, 3, d, length) if case.order == LEGACY else (n, 3, heads, d, length)
    parts = np.moveaxis(qkv.astype(np.float64).reshape(split), 2 if case.order == LEGACY else 1, 0)
    q, k, v = parts[0][..., :queries], parts[1], parts[2]
    logits = np.einsum("nhdq,nhdk->nhqk", q, k) / np.sqrt(d)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("nhqk,nhdk->nhdq", p, v)
    grad = grad.astype(np.float64).reshape(out.shape)
    dp = np.einsum("nhdq,nhdk->nhqk", grad, v)
    ds = p * (dp - (grad * out).sum(2)[..., None]) / np.sqrt(d)
    gradients = np.zeros_like(parts)
    gradients[0][..., :queries] = np.einsum("nhqk,nhdk->nhdq", ds, k)
    gradients[1] = np.einsum("nhqk,nhdq->nhdk", ds, q)
    gradients[2] = np.einsum("nhqk,nhdq->nhdk", p, grad)
    gradients = np.moveaxis(gradients, 0, 2 if case.order == LEGACY else 1)
    return out.reshape(n, heads * d, queries), gradients.reshape(qkv.shape)


# Every kernel, dtype, layout and order; lengths that end inside a tile; the pooling head.
CASES = [
    Case(1, 1, 64, 256, schedule=SHUFFLED),
    Case(1, 1, 64, 256, dtype=FLOAT16, schedule=REVERSE, multiprocessors=MANY),
    Case(2, 2, 64, 64, dtype=FLOAT16, order=LEGACY),
    Case(1, 1, 64, 150, layout=CHANNEL_MAJOR, schedule=SHUFFLED),
    Case(1, 2, 64, 65, num_queries=1, schedule=REVERSE),
    Case(1, 1, 64, 65, num_queries=1, dtype=FLOAT16, layout=CHANNEL_MAJOR, schedule=SHUFFLED),
    Case(1, 1, 64, 70, num_queries=66, order=LEGACY, schedule=SHUFFLED),
    Case(1, 2, 96, 33, dtype=FLOAT16, order=LEGACY, schedule=SHUFFLED),
    Case(1, 1, 128, 100, schedule=REVERSE),
    Case(1, 1, 128, 65, num_queries=1, dtype=FLOAT16),
    Case(1, 1, 192, 65, order=LEGACY, schedule=SHUFFLED),
    Case(1, 1, 192, 70, dtype=FLOAT16, layout=CHANNEL_MAJOR),
    Case(1, 1, 256, 64, schedule=REVERSE),
    Case(1, 1, 256, 70, dtype=FLOAT16, order=LEGACY, schedule=SHUFFLED),
    Case(1, 1, 40, 100, schedule=SHUFFLED),
    Case(2, 2, 7, 20, dtype=FLOAT16, order=LEGACY),
    Case(1, 1, 130, 35, layout=CHANNEL_MAJOR, schedule=SHUFFLED),
    Case(1, 2, 64, 100, dtype=FLOAT32, schedule=SHUFFLED),
    Case(1, 1, 64, 65, num_queries=1, dtype=FLOAT32, schedule=REVERSE),
    Case(1, 1, 96, 40, dtype=FLOAT32, order=LEGACY, layout=CHANNEL_MAJOR, schedule=REVERSE),
    Case(2, 1, 128, 33, dtype=FLOAT32, schedule=SHUFFLED),
    Case(1, 1, 192, 40, num_queries=17, dtype=FLOAT32, order=LEGACY),
    Case(1, 1, 256, 40, dtype=FLOAT32, schedule=SHUFFLED),
    Case(1, 3, 6, 33, dtype=FLOAT32, order=LEGACY, schedule=REVERSE),
    Case(1, 1, 64, 1, order=LEGACY),
]
# What one rounding of inputs, probabilities and results may cost at most, for the sanitized runs.
LIMITS = {FLOAT32: 1e-5, BFLOAT16: 4e-2, FLOAT16: 5e-3}


def check_roughly(cuda, case):
    """Within LIMITS of exact arithmetic."""
    qkv, grad = case.inputs()
    run = Run(cuda, case)
    for got, expected in zip((run.out, run.dqkv), exact(case, qkv, grad), strict=True):
        error = np.abs(got - expected).max()
        assert error <= LIMITS[case.dtype] * max(1, np.abs(expected).max()), (case, error)
