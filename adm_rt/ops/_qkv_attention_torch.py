"""The torch side of qkv_attention: registration, autograd, and which tensors the kernels take."""

import torch

from . import reference
from ._backend import reference_forced
from ._library import cuda_extension, cuda_stream, define, extension
from .qkv_attention import ORDERS, check, sizes

_CPU_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # codes of csrc/common/dtype.h
_CUDA_DTYPES = {**_CPU_DTYPES, torch.float16: 2}
_DTYPES = {"cpu": _CPU_DTYPES, "meta": _CPU_DTYPES, "cuda": _CUDA_DTYPES}
_MAX_CUDA_HEAD_DIM = 256  # csrc/ops/qkv_attention_cuda.h
_CHANNEL_MAJOR, _TOKEN_MAJOR = 0, 1


def forward(qkv, num_heads, order, num_queries):
    """``qkv_attention`` on tensors; the documentation is there."""
    if not isinstance(qkv, torch.Tensor):
        raise TypeError(f"qkv is {type(qkv).__name__}; give a torch tensor or a NumPy array")
    if not qkv.is_floating_point():
        raise TypeError(f"qkv is a tensor of {qkv.dtype}; give a floating dtype")
    num_queries = check(qkv, num_heads, order, num_queries)
    if not kernels_take(qkv, num_heads):
        return reference.qkv_attention(qkv, num_heads, order, num_queries)
    if qkv.requires_grad and torch.is_grad_enabled():
        return _QkvAttention.apply(qkv, num_heads, order, num_queries)
    return _operator(qkv, num_heads, order, num_queries)


def kernels_take(qkv, num_heads):
    """Whether a tensor of qkv's dtype, device and size goes to the kernels."""
    if reference_forced() or qkv.dtype not in _DTYPES.get(qkv.device.type, ()):
        return False
    return qkv.device.type != "cuda" or qkv.shape[1] // (3 * num_heads) <= _MAX_CUDA_HEAD_DIM


class _QkvAttention(torch.autograd.Function):
    """Keeps qkv, the output, and the maxima and sums of the softmax: memory grows with T."""

    @staticmethod
    def forward(ctx, qkv, num_heads, order, num_queries):
        out, stats = _stats_operator(qkv, num_heads, order, num_queries)
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
            dqkv = _backward_operator(grad, qkv, out, stats, num_heads, order)
        return dqkv, None, None, None


def _code(qkv, dtypes):
    if qkv.dtype not in dtypes:
        raise TypeError(
            f"qkv is a tensor of {qkv.dtype}; the kernels take "
            + ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        )
    return dtypes[qkv.dtype]


def _empty_stats(qkv, num_heads, num_queries):
    return qkv.new_empty((qkv.shape[0], num_heads, 2, num_queries), dtype=torch.float32)


# ---- CPU ----


def _cpu(qkv, num_heads, order, num_queries):
    return _run_cpu(qkv, num_heads, order, num_queries, None)


def _cpu_with_stats(qkv, num_heads, order, num_queries):
    stats = _empty_stats(qkv, num_heads, num_queries)
    return _run_cpu(qkv, num_heads, order, num_queries, stats), stats


def _run_cpu(qkv, num_heads, order, num_queries, stats):
    num_queries = check(qkv, num_heads, order, num_queries)
    code = _code(qkv, _CPU_DTYPES)
    qkv = qkv.contiguous()
    out = qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3, num_queries))
    extension().qkv_attention(
        qkv.data_ptr(),
        out.data_ptr(),
        0 if stats is None else stats.data_ptr(),
        *sizes(qkv, num_heads),
        num_queries,
        ORDERS[order],
        code,
    )
    return out


def _cpu_backward(grad, qkv, out, stats, num_heads, order):
    grad, qkv, out, stats = (tensor.contiguous() for tensor in (grad, qkv, out, stats))
    dqkv = torch.empty_like(qkv)
    extension().qkv_attention_backward(
        grad.data_ptr(),
        qkv.data_ptr(),
        out.data_ptr(),
        stats.data_ptr(),
        dqkv.data_ptr(),
        *sizes(qkv, num_heads),
        out.shape[2],
        ORDERS[order],
        _code(qkv, _CPU_DTYPES),
    )
    return dqkv


# ---- CUDA: every tensor lies in memory as qkv does ----


def _is_token_major(tensor):
    """Whether [N, C, T] lies in memory as [N, T, C] does: what the kernels are made for."""
    return tensor.transpose(1, 2).is_contiguous()


def _laid_out(tensor, token_major):
    """The tensor in that order of memory, copied if it lies otherwise."""
    if token_major:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


def _empty_out(qkv, num_queries, token_major):
    n, width = qkv.shape[0], qkv.shape[1] // 3
    if token_major:
        return qkv.new_empty((n, num_queries, width)).transpose(1, 2)
    return qkv.new_empty((n, width, num_queries))


def _cuda(qkv, num_heads, order, num_queries):
    return _run_cuda(qkv, num_heads, order, num_queries, None)


def _cuda_with_stats(qkv, num_heads, order, num_queries):
    stats = _empty_stats(qkv, num_heads, num_queries)
    return _run_cuda(qkv, num_heads, order, num_queries, stats), stats


def _run_cuda(qkv, num_heads, order, num_queries, stats):
    num_queries = check(qkv, num_heads, order, num_queries)
    code = _code(qkv, _CUDA_DTYPES)
    kernels = cuda_extension()
    token_major = _is_token_major(qkv)
    with cuda_stream(qkv) as stream:
        qkv = _laid_out(qkv, token_major)
        out = _empty_out(qkv, num_queries, token_major)
        kernels.qkv_attention(
            qkv.data_ptr(),
            out.data_ptr(),
            0 if stats is None else stats.data_ptr(),
            *sizes(qkv, num_heads),
            num_queries,
            ORDERS[order],
            code,
            _TOKEN_MAJOR if token_major else _CHANNEL_MAJOR,
            stream,
        )
    return out


def _cuda_backward(grad, qkv, out, stats, num_heads, order):
    code = _code(qkv, _CUDA_DTYPES)
    kernels = cuda_extension()
    token_major = _is_token_major(qkv)
    with cuda_stream(qkv) as stream:
        qkv, grad, out = (_laid_out(tensor, token_major) for tensor in (qkv, grad, out))
        stats = stats.contiguous()
        dqkv = torch.empty_like(qkv)
        size = kernels.qkv_attention_backward_workspace(qkv.shape[0], num_heads, out.shape[2])
        workspace = qkv.new_empty(size, dtype=torch.uint8)
        kernels.qkv_attention_backward(
            grad.data_ptr(),
            qkv.data_ptr(),
            out.data_ptr(),
            stats.data_ptr(),
            dqkv.data_ptr(),
            workspace.data_ptr(),
            *sizes(qkv, num_heads),
            out.shape[2],
            ORDERS[order],
            code,
            _TOKEN_MAJOR if token_major else _CHANNEL_MAJOR,
            stream,
        )
    return dqkv


# ---- Without data ----


def _fake(qkv, num_heads, order, num_queries):
    return _empty_out(qkv, num_queries, qkv.device.type == "cuda" and _is_token_major(qkv))


def _fake_with_stats(qkv, num_heads, order, num_queries):
    out = _fake(qkv, num_heads, order, num_queries)
    return out, _empty_stats(qkv, num_heads, num_queries)


def _fake_backward(grad, qkv, out, stats, num_heads, order):
    if qkv.device.type == "cuda" and _is_token_major(qkv):
        return torch.empty_like(qkv)
    return qkv.new_empty(qkv.shape)


_ARGUMENTS = "Tensor qkv, int num_heads, str order, int num_queries"
_operator = define(f"qkv_attention({_ARGUMENTS}) -> Tensor", cpu=_cpu, cuda=_cuda, fake=_fake)
_stats_operator = define(
    f"qkv_attention_with_stats({_ARGUMENTS}) -> (Tensor out, Tensor stats)",
    cpu=_cpu_with_stats,
    cuda=_cuda_with_stats,
    fake=_fake_with_stats,
)
_backward_operator = define(
    "qkv_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor stats, int num_heads, "
    "str order) -> Tensor",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
