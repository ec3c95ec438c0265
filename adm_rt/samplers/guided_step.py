"""What all samplers share: checked arguments, and one guided step.

A step asks the engine for the network's output (and the classifier's gradient, and the output
without a class), and hands everything to one ``ops.guided_mean_update`` with the sampler's row of
coefficients. There is no array arithmetic here or in the samplers, so they run on whatever arrays
the engine and the op take.
"""

from __future__ import annotations

import difflib
import math
import numbers
from typing import Any, NamedTuple

import numpy as np

from adm_rt import ops
from adm_rt.diffusion import Diffusion, guidance

CLIP_MODES = ("static", "dynamic", "none")


class StepResult(NamedTuple):
    """x for the next step; the step's x0; the op's state; whether the callback asked to stop."""

    x: Any
    x0: Any
    state: Any
    stop: bool


class GuidedRun:
    """One run of a sampler: its arguments, checked before any engine call, and its steps.

    Args:
        engine: has ``denoise`` and, if guided, ``classifier_gradient``; a ``guided_mean_update`` of
            its own takes the place of the op's.
        x: float images [N, C, H, W] to start from, torch or NumPy.
        diffusion: the respaced process.
        y: int64 labels [N], or None.
        guidance_scale: classifier guidance; 0 never calls the classifier.
        timesteps: one per step, in the original process, in the order of the steps.
        draws_noise: whether the sampler's rows have noise.
        noise: int64 seeds [N] (image i's noise depends on nothing but its seed and the step), a
            float array [steps, N, C, H, W] or a list of one [N, C, H, W] per step, or None for
            fresh seeds each run.
        callback: ``callback(step, total, t, x0)`` after each step, ``step`` from 0, ``t`` in the
            original process; returning False ends the run with this x0.
        eta: only for samplers that have it, which check it themselves; must be 0 for others.
        low_res: images [N, C, h, w] for an upsampler.
        clip: "static" clamps x0 to [-1, 1] before guidance. "dynamic" divides it by its
            ``quantile`` of absolute values where that is above 1 (Imagen, arXiv 2205.11487,
            section 2.3); where guidance shifts x0 it acts on the guided x0, as in DPM-Solver++.
            "none" leaves x0 as it is.
        guidance_interval: (low, high) timesteps of the original process, ends included, outside of
            which neither kind of guidance acts; None for everywhere.
        guidance_every: evaluate the classifier at every k-th guided step only, and reuse its
            gradient in between.
        cfg_scale: classifier-free guidance ``uncond + cfg_scale * (cond - uncond)``; None or 1
            for off.
        null_label: the class index that means "no class", for ``cfg_scale``.
    """

    def __init__(
        self,
        engine,
        x,
        diffusion: Diffusion,
        y=None,
        guidance_scale: float = 0.0,
        *,
        timesteps,
        draws_noise: bool = False,
        noise=None,
        callback=None,
        eta: float = 0.0,
        low_res=None,
        clip: str = "static",
        quantile: float = 0.995,
        guidance_interval=None,
        guidance_every: int = 1,
        cfg_scale: float | None = None,
        null_label: int | None = None,
    ):
        self._engine, self._diffusion = engine, diffusion
        self._timesteps = [float(t) for t in timesteps]
        self._callback, self._low_res = callback, low_res
        self._clip = _check_clip(clip)
        self._quantile = finite("quantile", quantile, low=0.0, high=1.0)
        if self._quantile == 0:
            raise ValueError("quantile=0.0 is not allowed; use one above 0, Imagen's is 0.995.")
        _check_images(x, y, low_res)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable or None, not {callback!r}.")
        if eta != 0 and not draws_noise:
            raise ValueError(f"eta={eta!r}: only the sampler 'ddim' has an eta; use 0 here.")

        guidance_scale = finite("guidance_scale", guidance_scale)
        interval = _check_interval(guidance_interval)
        every = _check_every(guidance_every)
        self._y, self._null_y, self._cfg_scale = y, None, None
        if guidance_scale != 0 and y is None:
            raise ValueError(
                f"guidance_scale={guidance_scale:g} needs labels: pass y, int64 [N], or "
                "guidance_scale=0."
            )
        if cfg_scale is not None:
            self._cfg_scale, self._null_y = _check_cfg(cfg_scale, null_label, y)
        self._gradient_plan = [guidance.SKIP] * len(self._timesteps)
        if guidance_scale != 0:
            self._gradient_plan = guidance.gradient_plan(self._timesteps, interval, every)
        self._interval = interval
        self._gradient = None
        self._seeds, self._noise = None, None
        if draws_noise:
            self._seeds, self._noise = _check_noise(noise, len(self._timesteps), x)
        prepare = getattr(engine, "prepare", None)  # not every engine has a use for it
        if prepare is not None:
            prepare([diffusion.scaled_timestep(t) for t in self._timesteps])

    def step(self, k, x, row, *, learned_variance=None, history=(), keep_output=False):
        """Step ``k`` from ``x`` with a row of coefficients made for this guidance scale.

        ``learned_variance``: whether the row's variance is the network's; None for a sampler that
        has no use for one, which then runs on networks with and without.
        ``keep_output`` makes the network's first C channels (guided, if classifier-free guidance
        is on) the history that ``next_h0`` multiplies.
        """
        t = self._timesteps[k]
        model_t = self._diffusion.scaled_timestep(t)
        out = self._denoise(x, model_t, self._y, learned_variance)
        if keep_output:
            history = (out[:, : x.shape[1]],)
        uncond = None
        if self._cfg_scale is not None and guidance.inside(t, self._interval):
            uncond = self._denoise(x, model_t, self._null_y, learned_variance)
            row = row._replace(cfg=self._cfg_scale)
            if keep_output:
                history = (history[0], uncond[:, : x.shape[1]])
                row = row._replace(
                    next_h0=row.next_h0 * self._cfg_scale,
                    next_h1=row.next_h0 * (1.0 - self._cfg_scale),
                )
        noise = {}
        if row.noise != 0:
            noise = {"seeds": self._seeds, "step": k}
            if self._noise is not None:
                noise = {"noise": self._noise[k]}
        next_x, x0, state = self._update(
            x,
            out,
            row,
            gradient=self._gradient_at(k, x, model_t),
            uncond_output=uncond,
            history=history,
            learned_variance=bool(learned_variance),
            **noise,
        )
        stop = False
        if self._callback is not None:
            stop = is_false(self._callback(k, len(self._timesteps), t, x0))
        return StepResult(next_x, x0, state, stop)

    def _update(self, x, out, row, *, gradient, uncond_output, **rest):
        update = getattr(self._engine, "guided_mean_update", ops.guided_mean_update)
        options = {"clip": self._clip, "quantile": self._quantile}
        if self._clip == "dynamic" and gradient is not None and row.guide_x0 != 0:
            # The op thresholds before guidance. Thresholding is there to tame the guided x0, so
            # that is made first, and then takes part as if it were the network's x0 prediction.
            first = ops.StepCoefficients(
                cfg=row.cfg,
                x0_x=row.x0_x,
                x0_out=row.x0_out,
                guide_x0=row.guide_x0,
                next_x0=1.0,
            )
            out, _, _ = update(
                x, out, first, gradient=gradient, uncond_output=uncond_output, clip="none"
            )
            row = row._replace(x0_x=0.0, x0_out=1.0, guide_x0=0.0)
            gradient = uncond_output = None
        return update(
            x, out, row, gradient=gradient, uncond_output=uncond_output, **rest, **options
        )

    def _denoise(self, x, model_t, y, learned_variance):
        more = () if self._low_res is None else (self._low_res,)
        out = self._engine.denoise(x, model_t, y, *more)
        channels = x.shape[1]
        allowed = {True: (2 * channels,), False: (channels,), None: (channels, 2 * channels)}[
            learned_variance
        ]
        if out.shape[1] not in allowed:
            raise ValueError(
                f"The network's output has {out.shape[1]} channels where learn_sigma="
                f"{self._diffusion.learn_sigma} needs {' or '.join(map(str, allowed))}. Make the "
                "Diffusion with learn_sigma as the network was trained."
            )
        return out

    def _gradient_at(self, k, x, model_t):
        what = self._gradient_plan[k]
        if what == guidance.FRESH:
            self._gradient = self._engine.classifier_gradient(x, model_t, self._y)
        return None if what == guidance.SKIP else self._gradient


def is_false(value) -> bool:
    """Whether a callback's answer is False, NumPy's included; None and everything else go on."""
    return value is False or (isinstance(value, np.bool_) and not value)


def finite(name, value, low=-math.inf, high=math.inf) -> float:
    """``value`` as a float; TypeError or ValueError unless it is a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__} {value!r}.")
    value = float(value)
    if not math.isfinite(value) or not low <= value <= high:
        limits = "" if math.isinf(high) else f" from {low:g} to {high:g}"
        raise ValueError(f"{name}={value!r} is not allowed; use a finite number{limits}.")
    return value


def _check_clip(clip):
    if clip in CLIP_MODES:
        return clip
    near = difflib.get_close_matches(str(clip), CLIP_MODES, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"clip={clip!r} is not one of {CLIP_MODES}.{hint}")


def _check_images(x, y, low_res):
    if len(getattr(x, "shape", ())) != 4:
        raise ValueError(f"x must be images [N, C, H, W], not shape {getattr(x, 'shape', None)}.")
    if str(x.dtype).removeprefix("torch.") not in ("float32", "float64"):
        raise TypeError(f"x must be float32 images (or float64), not {x.dtype}.")
    if y is not None and not hasattr(y, "shape"):
        raise TypeError(f"y must be an int64 array or tensor [N], not a {type(y).__name__}.")
    if y is not None and tuple(y.shape) != (x.shape[0],):
        raise ValueError(f"y has shape {tuple(y.shape)}; {x.shape[0]} images need ({x.shape[0]},).")
    if low_res is not None and low_res.shape[0] != x.shape[0]:
        raise ValueError(f"low_res has {low_res.shape[0]} images; x has {x.shape[0]}.")


def _check_interval(interval):
    if interval is None:
        return None
    try:
        low, high = interval
    except (TypeError, ValueError):
        raise ValueError(
            f"guidance_interval={interval!r} must be (low, high) timesteps of the original process."
        ) from None
    low, high = finite("guidance_interval[0]", low), finite("guidance_interval[1]", high)
    if not 0 <= low <= high:
        raise ValueError(
            f"guidance_interval=({low:g}, {high:g}) must have 0 <= low <= high, in timesteps of "
            "the original process."
        )
    return low, high


def _check_every(every):
    if isinstance(every, bool) or not isinstance(every, numbers.Integral):
        raise TypeError(f"guidance_every must be an int, not {type(every).__name__} {every!r}.")
    if every < 1:
        raise ValueError(f"guidance_every={every} is not allowed; use 1 (every step) or more.")
    return int(every)


def _check_cfg(cfg_scale, null_label, y):
    cfg_scale = finite("cfg_scale", cfg_scale)
    if cfg_scale == 1:
        return None, None
    if y is None:
        raise ValueError(f"cfg_scale={cfg_scale:g} needs labels: pass y, int64 [N].")
    if isinstance(null_label, bool) or not isinstance(null_label, numbers.Integral):
        raise ValueError(
            f"cfg_scale={cfg_scale:g} needs null_label, the class index that means 'no class' "
            f"(num_classes of a model with null_class), not {null_label!r}."
        )
    null_y = y.clone() if hasattr(y, "clone") else y.copy()
    null_y[...] = int(null_label)
    return cfg_scale, null_y


def _check_noise(noise, steps, x):
    """(seeds int64 [N], None) or (None, float [steps, N, C, H, W])."""
    count = x.shape[0]
    if noise is None:
        fresh = np.random.SeedSequence().generate_state(count, np.uint64)
        return (fresh >> np.uint64(1)).astype(np.int64), None
    if isinstance(noise, (list, tuple)):
        if len(noise) == steps and all(
            isinstance(z, type(x)) and tuple(z.shape) == tuple(x.shape) for z in noise
        ):
            return None, noise
        noise = np.asarray(noise)
    shape = tuple(getattr(noise, "shape", ()))
    if shape == (count,) and "int" in str(noise.dtype):
        return noise, None
    same_kind = isinstance(noise, np.ndarray) == isinstance(x, np.ndarray)
    if shape == (steps, *x.shape) and "float" in str(noise.dtype) and same_kind:
        return None, noise
    raise ValueError(
        f"noise is a {type(noise).__name__} with shape {shape}, {getattr(noise, 'dtype', None)}; "
        f"use int64 seeds {(count,)}, floats {(steps, *x.shape)} of x's kind "
        f"({type(x).__name__}), or None."
    )
