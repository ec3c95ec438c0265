"""guided_mean_update on torch's CUDA tensors and on CuPy arrays.

The networks' outputs are read as they lie: float32, bfloat16 or float16, contiguous or pixel by
pixel (channels_last). Images, history and noise are contiguous float32.
"""

import math

from ._library import cuda_extension, cuda_stream
from .guided_mean_update import CLIPS
from .philox import as_seeds

_MOST_CHANNELS_BY_PIXELS = 4  # as in csrc/ops/guided_mean_update_cuda.h
_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}  # of csrc/common/dtype.h


class _Torch:
    """What the call needs to know of tensors."""

    def __init__(self):
        import torch

        self.torch = torch

    def code(self, tensor):
        return _CODES.get(str(tensor.dtype).removeprefix("torch."))

    def is_dense(self, tensor):
        return tensor.is_contiguous()

    def is_by_pixels(self, tensor):
        return tensor.is_contiguous(memory_format=self.torch.channels_last)

    def dense(self, tensor, float32=True):
        return (tensor.float() if float32 else tensor).contiguous()

    def empty(self, shape, like):
        return like.new_empty(shape, dtype=self.torch.float32)

    def address(self, tensor):
        return 0 if tensor is None else tensor.data_ptr()


class _CuPy:
    """The same of CuPy's arrays."""

    def __init__(self):
        import cupy

        self.cupy = cupy

    def code(self, array):
        return _CODES.get(array.dtype.name)

    def is_dense(self, array):
        return array.flags.c_contiguous

    def is_by_pixels(self, array):
        return array.transpose(0, 2, 3, 1).flags.c_contiguous

    def dense(self, array, float32=True):
        dtype = "float32" if float32 else array.dtype
        return self.cupy.ascontiguousarray(array, dtype=dtype)

    def empty(self, shape, like):
        return self.cupy.empty(shape, "float32")

    def address(self, array):
        return 0 if array is None else array.data.ptr


def _as_they_lie(library, tensors, channels):
    """(tensors, dtype code, whether by pixels), all of one type and layout; None stays None.

    A copy only where they differ or lie in another order, float32 only where a type is unknown.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    codes = {library.code(tensor) for tensor in given}
    same = len(codes) == 1 and None not in codes
    if same and given and channels <= _MOST_CHANNELS_BY_PIXELS:
        if all(library.is_by_pixels(t) and not library.is_dense(t) for t in given):
            return tensors, codes.pop(), True
    tensors = [None if t is None else library.dense(t, float32=not same) for t in tensors]
    return tensors, codes.pop() if same else 0, False


def _call(
    library,
    stream,
    x,
    model_output,
    coefficients,
    gradient,
    uncond_output,
    history,
    noise,
    seeds,
    step,
    learned_variance,
    clip,
    quantile,
    table=(0, 0, 0),
    has_state=None,
):
    """(x_next, x0, state or None); seeds is the array on the device or None.

    table: addresses of rows, counter and arrivals that replace coefficients and step; then
    has_state says whether there is to be a state.
    """
    n, channels, height, width = x.shape
    (out, uncond), out_code, out_by_pixels = _as_they_lie(
        library, [model_output, uncond_output], channels
    )
    (gradient,), gradient_code, gradient_by_pixels = _as_they_lie(library, [gradient], channels)
    x, *history = (library.dense(tensor) for tensor in (x, *history))
    noise = None if noise is None else library.dense(noise)
    x_next, x0 = library.empty(x.shape, x), library.empty(x.shape, x)
    has_state = any(coefficients[10:15]) if has_state is None else has_state
    state = library.empty(x.shape, x) if has_state else None
    # Thresholds of dynamic clipping; the allocators order their reuse by stream.
    limits = library.empty((n,), x)
    inputs = (x, out, uncond, gradient, *history, *[None] * (3 - len(history)), noise, seeds)
    cuda_extension().guided_mean_update_step(
        list(coefficients),
        (n, channels, height * width, out.shape[1], 0 if uncond is None else uncond.shape[1]),
        tuple(map(library.address, inputs)),
        tuple(map(library.address, (x_next, x0, state))),
        (out_code, gradient_code),
        step,
        learned_variance,
        CLIPS.index(clip),
        quantile,
        (*table, library.address(limits)),
        (out_by_pixels, gradient_by_pixels),
        [],
        0,
        stream,
    )
    return x_next, x0, state


def torch_op(x, *arguments):
    """``torch.ops.adm_rt.guided_mean_update`` on CUDA, on torch's current stream."""
    with cuda_stream(x) as stream:
        x_next, x0, state = _call(_Torch(), stream, x, *arguments)
    return x_next, x0, x.new_empty(0) if state is None else state


def torch_step(
    x,
    model_output,
    rows,
    counter,
    *,
    advance,
    state,
    gradient,
    uncond_output,
    history,
    seeds,
    learned_variance,
    clip,
    quantile,
):
    """``StepTable.update`` on CUDA. rows: the table; counter: addresses of step and arrivals."""
    step, arrivals = counter
    table = (rows.data_ptr(), step, arrivals if advance else 0)
    with cuda_stream(x) as stream:
        return _call(
            _Torch(), stream, x, model_output, [0.0] * rows.shape[1], gradient, uncond_output,
            history, None, seeds, 0, learned_variance, clip, quantile, table, state,
        )  # fmt: skip


def cupy(x, model_output, coefficients, *, seeds, **arguments):
    """``guided_mean_update`` on CuPy arrays, on CuPy's current stream; the checks are done."""
    library = _CuPy()
    with x.device:
        if seeds is not None and not _is_ready(seeds, x):
            count = x.shape[0]
            seeds = library.cupy.asarray(as_seeds(getattr(seeds, "get", lambda: seeds)(), count))
        stream = library.cupy.cuda.get_current_stream().ptr
        return _call(library, stream, x, model_output, coefficients, seeds=seeds, **arguments)


def _is_ready(seeds, x):
    """int64 [N] on the device already."""
    return (
        hasattr(seeds, "data")
        and hasattr(seeds.data, "ptr")
        and seeds.dtype == "int64"
        and math.prod(seeds.shape) == x.shape[0]
        and seeds.flags.c_contiguous
    )
