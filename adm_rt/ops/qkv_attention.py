"""Multi-head self-attention on the output of one fused qkv projection, in both published orders."""

import functools
import sys

import numpy as np

from ._backend import reference_forced
from ._library import define, extension

FLOAT32, BFLOAT16 = 0, 1  # codes of csrc/common/dtype.h
ORDERS = {"legacy": 0, "new": 1}  # codes of csrc/ops/qkv_attention.h

_ARGUMENTS = "Tensor qkv, int num_heads, str order, int num_queries"
_SCHEMA = f"qkv_attention({_ARGUMENTS}) -> Tensor"
_STATS_SCHEMA = f"qkv_attention_with_stats({_ARGUMENTS}) -> (Tensor out, Tensor stats)"
_BACKWARD_SCHEMA = (
    "qkv_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor stats, int num_heads, "
    "str order) -> Tensor"
)


def qkv_attention(qkv, num_heads, order="legacy", num_queries=None):
    """``softmax(q^T k / sqrt(d)) v`` per image and head.

    Scaled dot-product attention: Vaswani et al. 2017, section 3.2.1; its place in the network:
    Dhariwal & Nichol 2021, section 3. The published code scales q and k by d^-1/4 each, which is
    the same up to rounding.

    Args:
        qkv: [N, 3*H*d, T], channel-major as a 1-D convolution gives it; other strides cost a copy.
            Torch tensor or NumPy array.
        num_heads: H, such that 3*H divides the channels.
        order: where q, k and v lie. "legacy": channel ``h*3d + {q,k,v}*d + i``; "new": channel
            ``{q,k,v}*H*d + h*d + i``. A released checkpoint does not say which: its flag
            use_new_attention_order does.
        num_queries: only the first num_queries positions ask (1 for the classifier's attention
            pool); None: all T of them.

    Returns:
        [N, H*d, num_queries or T], channel ``h*d + i`` in both orders, dtype of qkv.

    The kernels run on CPU tensors of float32 or bfloat16 and on float32 NumPy arrays; arithmetic
    is float32. A result depends neither on the number of threads nor on the other images of the
    batch. Memory grows with T, not with its square, in the backward pass too (probabilities are
    recomputed from the saved maxima and sums). Torch tensors of any other floating dtype or device
    run ``reference.qkv_attention``; so does everything inside ``use_reference()`` and, in the
    backward pass, a gradient taken with ``create_graph=True``.

    Raises:
        ValueError: a rank other than 3, channels that 3*num_heads does not divide, an unknown
            order, num_queries outside [1, T].
        TypeError: something that is neither a tensor nor an array; a dtype that is not floating;
            NumPy of another dtype than float32.
        ImportError: the extension is not built.
    """
    if isinstance(qkv, np.ndarray):
        num_queries = _check(qkv, num_heads, order, num_queries)
        return _numpy_forward(qkv, num_heads, order, num_queries)
    if "torch" not in sys.modules:
        raise TypeError(f"qkv is {type(qkv).__name__}; give a torch tensor or a NumPy array")
    return _torch_forward(qkv, num_heads, order, num_queries)


def _check(qkv, num_heads, order, num_queries):
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


def _sizes(qkv, num_heads):
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
        *_sizes(qkv, num_heads),
        num_queries,
        ORDERS[order],
        FLOAT32,
    )
    return out


@functools.cache
def _torch_side():
    """(forward op, autograd.Function, reference.qkv_attention), made on the first call."""
    import torch

    from . import reference

    operator = define(_SCHEMA, cpu=_cpu, fake=_fake)
    operator_with_stats = define(_STATS_SCHEMA, cpu=_cpu_with_stats, fake=_fake_with_stats)
    backward_operator = define(_BACKWARD_SCHEMA, cpu=_cpu_backward, fake=_fake_backward)

    class QkvAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, num_heads, order, num_queries):
            out, stats = operator_with_stats(qkv, num_heads, order, num_queries)
            ctx.save_for_backward(qkv, out, stats)
            ctx.options = num_heads, order
            return out

        @staticmethod
        def backward(ctx, grad):
            qkv, out, stats = ctx.saved_tensors
            num_heads, order = ctx.options
            if torch.is_grad_enabled():  # create_graph=True: stay differentiable
                again = reference.qkv_attention(qkv, num_heads, order, stats.shape[3])
                (dqkv,) = torch.autograd.grad(again, qkv, grad, create_graph=True)
            else:
                dqkv = backward_operator(grad, qkv, out, stats, num_heads, order)
            return dqkv, None, None, None

    return operator, QkvAttention, reference.qkv_attention


def register():
    """Define ``torch.ops.adm_rt.qkv_attention`` and its companions (idempotent)."""
    _torch_side()


def _torch_forward(qkv, num_heads, order, num_queries):
    import torch

    if not isinstance(qkv, torch.Tensor):
        raise TypeError(f"qkv is {type(qkv).__name__}; give a torch tensor or a NumPy array")
    if not qkv.is_floating_point():
        raise TypeError(f"qkv is a tensor of {qkv.dtype}; give a floating dtype")
    num_queries = _check(qkv, num_heads, order, num_queries)
    operator, function, reference = _torch_side()
    if (
        reference_forced()
        or qkv.dtype not in (torch.float32, torch.bfloat16)
        or qkv.device.type not in ("cpu", "meta")
    ):
        return reference(qkv, num_heads, order, num_queries)
    if qkv.requires_grad and torch.is_grad_enabled():
        return function.apply(qkv, num_heads, order, num_queries)
    return operator(qkv, num_heads, order, num_queries)


def _code(qkv):
    import torch

    codes = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
    if qkv.dtype not in codes:
        raise TypeError(f"qkv is a tensor of {qkv.dtype}; the kernels take float32 and bfloat16")
    return codes[qkv.dtype]


def _empty_out(qkv, num_queries):
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3, num_queries))


def _empty_stats(qkv, num_heads, num_queries):
    import torch

    return qkv.new_empty((qkv.shape[0], num_heads, 2, num_queries), dtype=torch.float32)


def _run(qkv, out, stats_address, num_heads, order, num_queries):
    extension().qkv_attention(
        qkv.data_ptr(),
        out.data_ptr(),
        stats_address,
        *_sizes(qkv, num_heads),
        num_queries,
        ORDERS[order],
        _code(qkv),
    )


def _cpu(qkv, num_heads, order, num_queries):
    num_queries = _check(qkv, num_heads, order, num_queries)
    qkv = qkv.contiguous()
    out = _empty_out(qkv, num_queries)
    _run(qkv, out, 0, num_heads, order, num_queries)
    return out


def _fake(qkv, num_heads, order, num_queries):
    return _empty_out(qkv, num_queries)


def _cpu_with_stats(qkv, num_heads, order, num_queries):
    num_queries = _check(qkv, num_heads, order, num_queries)
    qkv = qkv.contiguous()
    out = _empty_out(qkv, num_queries)
    stats = _empty_stats(qkv, num_heads, num_queries)
    _run(qkv, out, stats.data_ptr(), num_heads, order, num_queries)
    return out, stats


def _fake_with_stats(qkv, num_heads, order, num_queries):
    return _empty_out(qkv, num_queries), _empty_stats(qkv, num_heads, num_queries)


def _cpu_backward(grad, qkv, out, stats, num_heads, order):
    import torch

    grad, qkv, out, stats = (tensor.contiguous() for tensor in (grad, qkv, out, stats))
    dqkv = torch.empty_like(qkv)
    extension().qkv_attention_backward(
        grad.data_ptr(),
        qkv.data_ptr(),
        out.data_ptr(),
        stats.data_ptr(),
        dqkv.data_ptr(),
        *_sizes(qkv, num_heads),
        out.shape[2],
        ORDERS[order],
        _code(qkv),
    )
    return dqkv


def _fake_backward(grad, qkv, out, stats, num_heads, order):
    return qkv.new_empty(qkv.shape)
