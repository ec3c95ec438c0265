"""The op that ends every sampler step: x0, clip, guidance, linear update and noise in one pass."""

import functools
import importlib
import math
from typing import NamedTuple

import numpy as np

from adm_rt.ops._arrays import is_cupy, is_dlpack, through_dlpack
from adm_rt.ops._backend import reference_forced
from adm_rt.ops._library import define, extension
from adm_rt.ops.philox import STEP_NOISE, _word, as_seeds, philox_normal

CLIPS = ("none", "static", "dynamic")  # the position is the code in C++


class StepCoefficients(NamedTuple):
    """One step's row of coefficients, which makes one op every sampler's update.

    Make a row in float64; the kernels round it to float32 once. With out the first C channels of
    the model's output, v the others and g the classifier's gradient (unscaled)::

        out     = uncond + cfg * (out - uncond)                     when uncond_output is given
        x0      = clip(x0_x * x + x0_out * out) + guide_x0 * g
        logvar  = f * max_log + (1 - f) * min_log, f = (v + 1) / 2  with learned variances
        logvar  = max_log                                           without
        x_next  = next_x * x + next_x0 * x0 + next_h0 * history[0] + next_h1 * history[1]
                  + next_h2 * history[2] + guide_mean * exp(logvar) * g
                  + noise * exp(logvar / 2) * z
        state   = state_x * x + state_x0 * x0 + state_h0 * history[0] + ...

    * cfg: scale of classifier-free guidance (1 is the conditional prediction).
    * x0_x, x0_out: from model output to x0. For eps prediction ``sqrt(1 / abar)`` and
      ``-sqrt(1 / abar - 1)``; for x0 prediction 0 and 1.
    * guide_x0: classifier guidance of DDIM and ODE solvers, ``scale * (1 - abar) / sqrt(abar)``
      (Dhariwal & Nichol 2021, algorithm 2, written for x0).
    * guide_mean: classifier guidance of DDPM, the scale (algorithm 1: the mean moves by
      ``scale * variance * gradient``).
    * next_*: the update. DDPM: the two posterior mean coefficients; DDIM: eps expressed by x and
      x0; multistep solvers: earlier x0 in the history.
    * state_*: a second linear combination, for solvers that carry one (UniPC's corrected x); all
      zero: none is made.
    * min_log, max_log: logarithms of the posterior variance (clipped) and of beta.
    * noise: 1, or 0 at the last step and in deterministic samplers. A sigma that is known outside
      (DDIM's eta) is ``noise=sigma, max_log=0``.
    """

    cfg: float = 0.0
    x0_x: float = 0.0
    x0_out: float = 0.0
    guide_x0: float = 0.0
    guide_mean: float = 0.0
    next_x: float = 0.0
    next_x0: float = 0.0
    next_h0: float = 0.0
    next_h1: float = 0.0
    next_h2: float = 0.0
    state_x: float = 0.0
    state_x0: float = 0.0
    state_h0: float = 0.0
    state_h1: float = 0.0
    state_h2: float = 0.0
    min_log: float = 0.0
    max_log: float = 0.0
    noise: float = 0.0

    def row(self):
        """The coefficients as a NumPy float64 [18], in field order."""
        return np.array(self, dtype=np.float64)

    @property
    def has_state(self):
        """Whether the op makes a state."""
        return any(self[10:15])


def guided_mean_update(
    x,
    model_output,
    coefficients,
    *,
    gradient=None,
    uncond_output=None,
    history=(),
    noise=None,
    seeds=None,
    step=0,
    learned_variance=False,
    clip="static",
    quantile=0.995,
):
    """One sampler step after the networks have run.

    All tensors are torch tensors on one device, or all are NumPy arrays, or CuPy arrays, or arrays
    of one library that speaks DLPack. ``StepCoefficients`` tells which coefficient does what.

    * x [N, C, H, W] float32: the noisy images.
    * model_output [N, C or 2C, H, W] float32, bfloat16 or float16: the prediction and, where the
      model has them, the variances v. Only read beyond C with learned_variance.
    * gradient [N, C, H, W], float32, bfloat16 or float16: d log p(y | x_t) / dx, unscaled.
    * uncond_output like model_output: the prediction without a class.
    * history: at most three tensors like x.
    * noise like x, or seeds int64 [N] with step (int in [0, 2**32)): Philox noise, the same for an
      image in every batch and on every device. One of them is needed when coefficients.noise != 0.
    * clip: "static" (to [-1, 1]), "dynamic" (per image, s = max(1, the quantile of |x0|), x0 is
      clamped to [-s, s] and divided by s; quantile in (0, 1], linear between order statistics) or
      "none". Clipping comes before guidance; the guided x0 is never clipped again.

    Returns (x_next, x0, state): new contiguous tensors like x; x0 after guidance; state None when
    the row's state coefficients are all zero.

    One pass over memory on the CPU (AVX-512, AVX2 or portable, equal bits) and one CUDA kernel (two
    more for "dynamic"; not measured on a GPU yet), which reads model outputs and gradients of
    channels_last networks and of bfloat16 or float16 as they lie, on torch's or CuPy's current
    stream. Inference only: the kernels have no derivative.
    Tensors that require grad while grad mode is on, float64 inputs and everything inside
    ``use_reference()`` go to ``reference.guided_mean_update``, which has one; float64 NumPy arrays
    pass through torch there.

    Raises ValueError or TypeError naming the argument.
    """
    if is_dlpack(x) or is_cupy(x) and reference_forced():
        return _dlpack(
            x, model_output, coefficients, gradient, uncond_output, history, noise,
            seeds=seeds, step=step, learned_variance=learned_variance, clip=clip,
            quantile=quantile,
        )  # fmt: skip
    tensors = {"model_output": model_output, "gradient": gradient, "uncond_output": uncond_output}
    tensors.update({f"history[{j}]": tensor for j, tensor in enumerate(history)})
    tensors["noise"] = noise
    _check(x, tensors, coefficients, learned_variance, clip, quantile)
    if noise is not None and seeds is not None:
        raise ValueError("noise and seeds are both given; give the noise tensor or the seeds")
    if noise is None and seeds is None and coefficients.noise != 0:
        raise ValueError(
            f"coefficients.noise is {coefficients.noise} but there is neither noise nor seeds; "
            "give noise [N, C, H, W], or seeds [N] and step"
        )
    arguments = {
        "gradient": gradient,
        "uncond_output": uncond_output,
        "history": history,
        "noise": noise,
        "seeds": seeds,
        "step": _word("step", step),
        "learned_variance": bool(learned_variance),
        "clip": clip,
        "quantile": float(quantile),
    }
    if isinstance(x, np.ndarray):
        return _numpy(x, model_output, coefficients, **arguments)
    if is_cupy(x):
        return _cuda_side().cupy(x, model_output, coefficients, **arguments)
    return _torch(x, model_output, coefficients, **arguments)


def count_nonfinite(x):
    """NaN or infinite values per image: x [N, ...], torch or NumPy -> NumPy int64 [N]."""
    if not isinstance(x, np.ndarray):
        x = x.detach()
        if x.device.type != "cpu" or str(x.dtype) != "torch.float32":
            return (~x.isfinite()).flatten(1).sum(1).cpu().numpy()
        x = x.numpy()
    if x.dtype != np.float32:
        return (~np.isfinite(x)).reshape(len(x), -1).sum(axis=1)
    x = np.ascontiguousarray(x)
    counts = np.empty(len(x), dtype=np.int64)
    extension().count_nonfinite(x.ctypes.data, len(x), math.prod(x.shape[1:]), counts.ctypes.data)
    return counts


def _check(x, tensors, coefficients, learned_variance, clip, quantile):
    """Raises for anything that the kernels would misread."""
    if not isinstance(coefficients, StepCoefficients):
        raise TypeError(
            f"coefficients is a {type(coefficients).__name__}; make a StepCoefficients(...)"
        )
    if not math.isfinite(sum(coefficients)):
        name, value = next(
            pair
            for pair in zip(coefficients._fields, coefficients, strict=True)
            if not math.isfinite(pair[1])
        )
        raise ValueError(f"coefficients.{name} is {value}; it must be finite")
    if clip not in CLIPS:
        raise ValueError(f"clip is {clip!r}; allowed: {', '.join(map(repr, CLIPS))}")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}; allowed: 0 < quantile <= 1, Imagen's is 0.995")
    if getattr(x, "ndim", None) != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be [N, C, H, W]; it is {_describe(x)}")
    if str(x.dtype) not in ("float32", "float64", "torch.float32", "torch.float64"):
        raise TypeError(f"x is {x.dtype}; allowed: float32 (float64: the reference implementation)")
    if len(tensors) > 7:  # four others and three of history
        raise ValueError("history has more than three tensors; no solver here uses that many")
    n, channels, height, width = x.shape
    is_numpy, is_tensor = isinstance(x, np.ndarray), hasattr(x, "is_floating_point")
    if is_cupy(x) and str(x.dtype) != "float32":
        raise TypeError(f"x is a CuPy array of {x.dtype}; give float32")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if (
            isinstance(tensor, np.ndarray) != is_numpy
            or is_cupy(tensor) != is_cupy(x)
            or not hasattr(tensor, "shape")
        ):
            raise TypeError(
                f"{name} is a {type(tensor).__name__} and x a {type(x).__name__}; give either "
                "torch tensors or NumPy arrays, or arrays of one other library"
            )
        if not is_numpy and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them")
        if not (tensor.is_floating_point() if is_tensor else tensor.dtype.kind == "f"):
            raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")
        shape = tensor.shape
        widths = (channels, 2 * channels) if name.endswith("_output") else (channels,)
        if (
            len(shape) != 4
            or shape[1] not in widths
            or (shape[0], shape[2], shape[3]) != (n, height, width)
        ):
            raise ValueError(
                f"{name} is {list(shape)}; x is {list(x.shape)}, so it must have "
                f"{' or '.join(map(str, widths))} channels and the rest of x's shape"
            )
    if learned_variance and tensors["model_output"].shape[1] != 2 * channels:
        raise ValueError(
            f"learned_variance needs model_output with {2 * channels} channels; it has "
            f"{channels}: this model predicts no variances, pass learned_variance=False"
        )


def _describe(value):
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"of shape {list(shape)}"


def _call(run, x, model_output, coefficients, outputs, arguments, address, dtype_codes, seeds):
    """Hands addresses to the extension. `arguments` holds contiguous tensors."""
    history = [address(tensor) for tensor in arguments["history"]]
    uncond = arguments["uncond_output"]
    n, channels, height, width = x.shape
    run(
        coefficients,
        (
            n,
            channels,
            height * width,
            model_output.shape[1],
            0 if uncond is None else uncond.shape[1],
        ),
        (
            address(x),
            address(model_output),
            address(uncond),
            address(arguments["gradient"]),
            *history,
            *[0] * (3 - len(history)),
            address(arguments["noise"]),
            seeds,
        ),
        outputs,
        dtype_codes,
        arguments["step"],
        arguments["learned_variance"],
        CLIPS.index(arguments["clip"]),
        arguments["quantile"],
    )


# ---- NumPy ----


def _numpy(x, model_output, coefficients, **arguments):
    if x.dtype == np.float64 or reference_forced():
        return _numpy_reference(x, model_output, coefficients, **arguments)

    def prepared(array):
        return None if array is None else np.ascontiguousarray(array, dtype=np.float32)

    x, model_output = prepared(x), prepared(model_output)
    for name in ("gradient", "uncond_output", "noise"):
        arguments[name] = prepared(arguments[name])
    arguments["history"] = [prepared(array) for array in arguments["history"]]
    seeds = None if arguments["seeds"] is None else as_seeds(arguments["seeds"], len(x))
    x_next, x0 = np.empty_like(x), np.empty_like(x)
    state = np.empty_like(x) if coefficients.has_state else None

    def address(array):
        return 0 if array is None else array.ctypes.data

    outputs = (address(x_next), address(x0), address(state))
    run = extension().guided_mean_update
    _call(run, x, model_output, coefficients, outputs, arguments, address, (0, 0), address(seeds))
    return x_next, x0, state


def _numpy_reference(x, model_output, coefficients, **arguments):
    import torch

    def tensor(array):
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

    for name in ("gradient", "uncond_output", "noise"):
        arguments[name] = tensor(arguments[name])
    arguments["history"] = [tensor(array) for array in arguments["history"]]
    with torch.no_grad():
        results = _reference(tensor(x), tensor(model_output), coefficients, **arguments)
    return tuple(None if result is None else result.numpy() for result in results)


# ---- Arrays of other libraries ----


@functools.cache
def _cuda_side():
    return importlib.import_module("adm_rt.ops._guided_mean_update_cuda")


def _dlpack(
    x, model_output, coefficients, gradient, uncond_output, history, noise, *, seeds, **options
):
    """On views; seeds may be such an array too."""
    on_device = hasattr(seeds, "__dlpack_device__") and not isinstance(seeds, np.ndarray)
    if is_cupy(x):
        importlib.import_module("torch")  # reference.py is torch: view the arrays with that
    arrays = {
        "x": x,
        "model_output": model_output,
        "gradient": gradient,
        "uncond_output": uncond_output,
        "noise": noise,
        "seeds": seeds if on_device else None,
        **{f"history[{j}]": array for j, array in enumerate(history)},
    }

    def on_views(x, model_output, gradient, uncond_output, noise, viewed_seeds, *history):
        return guided_mean_update(
            x, model_output, coefficients, gradient=gradient, uncond_output=uncond_output,
            history=history, noise=noise, seeds=seeds if viewed_seeds is None else viewed_seeds,
            **options,
        )  # fmt: skip

    return through_dlpack(on_views, arrays)


# ---- torch ----


def _torch(x, model_output, coefficients, **arguments):
    import torch

    inputs = [
        x,
        model_output,
        arguments["gradient"],
        arguments["uncond_output"],
        arguments["noise"],
    ]
    inputs = [tensor for tensor in (*inputs, *arguments["history"]) if tensor is not None]
    if (
        x.dtype == torch.float64
        or reference_forced()
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))
    ):
        return _reference(x, model_output, coefficients, **arguments)
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            f"x is on {x.device}; there are kernels for cpu and cuda: move the tensors, or run "
            "inside `with adm_rt.ops.use_reference():`"
        )
    seeds = arguments["seeds"]
    if seeds is not None and not _seeds_are_ready(seeds, x):
        seeds = torch.from_numpy(as_seeds(seeds, x.shape[0])).to(x.device)
    x_next, x0, state = register()(
        x,
        model_output,
        coefficients,
        arguments["gradient"],
        arguments["uncond_output"],
        list(arguments["history"]),
        arguments["noise"],
        seeds,
        arguments["step"],
        arguments["learned_variance"],
        arguments["clip"],
        arguments["quantile"],
    )
    return x_next, x0, state if coefficients.has_state else None


def _seeds_are_ready(seeds, x):
    """int64 [N] on x's device: taken as they are, because a copy would end a graph's capture."""
    return (
        str(getattr(seeds, "dtype", "")) == "torch.int64"
        and seeds.device == x.device
        and seeds.shape == x.shape[:1]
        and seeds.is_contiguous()
    )


def _reference(x, model_output, coefficients, *, seeds, step, noise, history, **arguments):
    """reference.guided_mean_update, inputs cast to x's dtype, Philox noise where asked for."""
    import torch

    from adm_rt.ops import reference

    if seeds is not None and coefficients.noise != 0:
        noise = philox_normal(as_seeds(seeds, len(x)), tuple(x.shape[1:]), step, STEP_NOISE)
        noise = torch.from_numpy(noise).to(x.device)

    def like_x(tensor):
        return None if tensor is None else tensor.to(x.dtype)

    arguments.update({name: like_x(arguments[name]) for name in ("gradient", "uncond_output")})
    history = [like_x(tensor) for tensor in history]
    return reference.guided_mean_update(
        x, like_x(model_output), coefficients, noise=like_x(noise), history=history, **arguments
    )


_SCHEMA = (
    "guided_mean_update(Tensor x, Tensor model_output, float[] coefficients, Tensor? gradient, "
    "Tensor? uncond_output, Tensor[] history, Tensor? noise, Tensor? seeds, int step, "
    "bool learned_variance, str clip, float quantile) -> (Tensor, Tensor, Tensor)"
)


@functools.cache
def register():
    """Defines ``torch.ops.adm_rt.guided_mean_update`` and returns it.

    The public function's arguments in order, coefficients as 18 floats; an absent state is an empty
    tensor. The public function checks; this trusts.
    """
    return define(_SCHEMA, cpu=_cpu, cuda=_cuda_side().torch_op, fake=_fake)


def _fake(x, model_output, coefficients, *arguments):
    state_shape = x.shape if any(coefficients[10:15]) else (0,)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(state_shape)


def _cpu(x, model_output, coefficients, *arguments):
    return _run(extension().guided_mean_update, x, model_output, coefficients, *arguments)


def _run(
    run,
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
):
    import torch

    def prepared(tensor, dtype=torch.float32):
        if tensor is None:
            return None
        return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()

    def read_as(tensor, other=None):  # bfloat16 is read as it is
        is_bfloat16 = tensor is not None and tensor.dtype == torch.bfloat16
        same = other is None or other.dtype == torch.bfloat16
        return torch.bfloat16 if is_bfloat16 and same else torch.float32

    model_dtype, gradient_dtype = read_as(model_output, uncond_output), read_as(gradient)
    x = prepared(x)
    arguments = {
        "gradient": prepared(gradient, gradient_dtype),
        "uncond_output": prepared(uncond_output, model_dtype),
        "history": [prepared(tensor) for tensor in history],
        "noise": prepared(noise),
        "step": step,
        "learned_variance": learned_variance,
        "clip": clip,
        "quantile": quantile,
    }
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    state = torch.empty_like(x) if any(coefficients[10:15]) else x.new_empty(0)

    def address(tensor):
        return 0 if tensor is None else tensor.data_ptr()  # 0 too for an empty tensor

    outputs = (address(x_next), address(x0), address(state))
    codes = tuple(int(dtype == torch.bfloat16) for dtype in (model_dtype, gradient_dtype))
    model_output = prepared(model_output, model_dtype)
    _call(run, x, model_output, coefficients, outputs, arguments, address, codes, address(seeds))
    return x_next, x0, state
