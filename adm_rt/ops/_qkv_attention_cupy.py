"""qkv_attention on CuPy arrays: the CUDA kernels without torch."""

import cupy

from ._library import cuda_extension
from .qkv_attention import ORDERS, check, sizes

_DTYPES = {"float32": 0, "float16": 2}  # codes of csrc/common/dtype.h


def forward(qkv, num_heads, order, num_queries):
    """``qkv_attention`` on a CuPy array; the documentation is there."""
    if qkv.dtype.name not in _DTYPES:
        raise TypeError(f"qkv is a CuPy array of {qkv.dtype}; give float32 or float16")
    num_queries = check(qkv, num_heads, order, num_queries)
    kernels = cuda_extension()
    n, width = qkv.shape[0], qkv.shape[1] // 3
    with qkv.device:
        token_major = qkv.transpose(0, 2, 1).flags.c_contiguous
        if token_major:
            out = cupy.empty((n, num_queries, width), qkv.dtype).transpose(0, 2, 1)
        else:
            qkv = cupy.ascontiguousarray(qkv)
            out = cupy.empty((n, width, num_queries), qkv.dtype)
        kernels.qkv_attention(
            qkv.data.ptr,
            out.data.ptr,
            0,
            *sizes(qkv, num_heads),
            num_queries,
            ORDERS[order],
            _DTYPES[qkv.dtype.name],
            int(token_major),  # as in csrc/ops/qkv_attention_cuda.h
            cupy.cuda.get_current_stream().ptr,
        )
    return out
