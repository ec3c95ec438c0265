"""Multi-head self-attention on the output of one fused qkv projection, in both published orders."""

import functools
import importlib
import sys

import numpy as np

from ._arrays import is_cupy, is_dlpack, through_dlpack
from ._backend import reference_forced
from ._library import extension

_FLOAT32 = 0  # code of csrc/common/dtype.h
ORDERS = {"legacy": 0, "new": 1}  # codes of csrc/ops/qkv_attention.h


def qkv_attention(qkv, num_heads, order="legacy", num_queries=None):
    """``softmax(q^T k / sqrt(d)) v`` per image and head.

    Scaled dot-product attention: Vaswani et al. 2017, section 3.2.1; its place in the network:
    Dhariwal & Nichol 2021, section 3. The published code scales q and k by d^-1/4 each, which is
    the same up to rounding.

    Args:
        qkv: [N, 3*H*d, T]. Torch tensor, NumPy or CuPy array, or an array that speaks DLPack. On
            the CPU channel-major, as a 1-D convolution gives it; other strides cost a copy. On CUDA
            as [N, T, 3*H*d] lies in memory (the transposed view of it: pixels of a channels_last
            image), which is faster, or channel-major; any other strides cost a copy.
        num_heads: H, such that 3*H divides the channels.
        order: where q, k and v lie. "legacy": channel ``h*3d + {q,k,v}*d + i``; "new": channel
            ``{q,k,v}*H*d + h*d + i``. A released checkpoint does not say which: its flag
            use_new_attention_order does.
        num_queries: only the first num_queries positions ask (1 for the classifier's attention
            pool); None: all T of them.

    Returns:
        [N, H*d, num_queries or T], channel ``h*d + i`` in both orders, dtype of qkv; on CUDA in the
        same order of memory.

    The kernels run on CPU tensors of float32 or bfloat16, on float32 NumPy arrays, on CUDA tensors
    of float32, bfloat16 or float16 with d up to 256 (on torch's current stream) and on CuPy arrays
    of float32 or float16 (on CuPy's). Arithmetic is float32, except that the products of 16-bit
    types on CUDA take 16-bit operands (probabilities and their gradients are rounded on the way).
    A result depends neither on the number of threads nor on the other images of the batch. Memory
    grows with T, not with its square, in the backward pass too (probabilities are recomputed from
    the saved maxima and sums). Torch tensors of any other floating dtype, size or device run
    ``reference.qkv_attention``; so does everything inside ``use_reference()`` and, in the backward
    pass, a gradient taken with ``create_graph=True``. The CUDA kernels have run under an emulator;
    on a GPU they are not measured.

    Raises:
        ValueError: a rank other than 3, channels that 3*num_heads does not divide, an unknown
            order, num_queries outside [1, T].
        TypeError: something that is neither a tensor nor an array; a dtype that is not floating;
            an array of another dtype.
        ImportError: the extension is not built; for CUDA tensors, ``adm_rt._cuda``.
    """
    if isinstance(qkv, np.ndarray):
        num_queries = check(qkv, num_heads, order, num_queries)
        return _numpy_forward(qkv, num_heads, order, num_queries)
    if is_cupy(qkv) and not reference_forced():
        return _cupy_side().forward(qkv, num_heads, order, num_queries)
    if is_cupy(qkv) or is_dlpack(qkv):
        if is_cupy(qkv):
            importlib.import_module("torch")  # reference.py is torch: view the array with that
        options = {"num_heads": num_heads, "order": order, "num_queries": num_queries}
        return through_dlpack(qkv_attention, {"qkv": qkv}, **options)
    if "torch" not in sys.modules:
        raise TypeError(f"qkv is {type(qkv).__name__}; give a torch tensor or a NumPy array")
    return _torch_side().forward(qkv, num_heads, order, num_queries)


def check(qkv, num_heads, order, num_queries):
    """The shape and the options; returns the number of queries."""
    shape = qkv.shape
    if len(shape) != 3:
        raise ValueError(
            f"qkv has shape {tuple(shape)}; it must be [N, 3*H*d, T]: flatten the pixels into T"
        )
    if num_heads < 1 or shape[1] == 0 or shape[1] % (3 * num_heads):
        raise ValueError(
            f"qkv has {shape[1]} channels, which num_heads={num_heads} heads of q, k and v cannot "
            f"share: they must be a positive multiple of 3 * num_heads"
        )
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {', '.join(map(repr, ORDERS))}")
    length = shape[2]
    if length == 0:
        raise ValueError(f"qkv has shape {tuple(shape)}; T must be at least 1")
    if num_queries is None:
        return length
    if not 1 <= num_queries <= length:
        raise ValueError(
            f"num_queries={num_queries} is not in [1, T={length}]; None computes all of them"
        )
    return num_queries


def sizes(qkv, num_heads):
    """batch, heads, head_dim, length: the order in which the extension takes them."""
    n, channels, length = qkv.shape
    return n, num_heads, channels // (3 * num_heads), length


def _numpy_forward(qkv, num_heads, order, num_queries):
    if qkv.dtype != np.float32:
        raise TypeError(f"qkv is a NumPy array of {qkv.dtype}; only float32 arrays are taken")
    if reference_forced():
        import torch

        from . import reference

        with torch.no_grad():
            tensor = torch.from_numpy(np.ascontiguousarray(qkv))
            return reference.qkv_attention(tensor, num_heads, order, num_queries).numpy()
    qkv = np.ascontiguousarray(qkv)
    out = np.empty((qkv.shape[0], qkv.shape[1] // 3, num_queries), np.float32)
    extension().qkv_attention(
        qkv.ctypes.data,
        out.ctypes.data,
        0,
        *sizes(qkv, num_heads),
        num_queries,
        ORDERS[order],
        _FLOAT32,
    )
    return out


@functools.cache
def _torch_side():
    return importlib.import_module("adm_rt.ops._qkv_attention_torch")


@functools.cache
def _cupy_side():
    return importlib.import_module("adm_rt.ops._qkv_attention_cupy")


def register():
    """Define ``torch.ops.adm_rt.qkv_attention`` and its companions (idempotent)."""
    _torch_side()
