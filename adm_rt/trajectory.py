"""Running one stage: batches of images from their seeds' noise to uint8 pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from adm_rt.engines.memory import free_memory
from adm_rt.errors import NonFiniteError, SamplingInterrupted
from adm_rt.ops.philox import INITIAL_NOISE, philox_normal
from adm_rt.request import check_count
from adm_rt.result import SampleResult
from adm_rt.samplers.guided_step import is_false

_MAX_AUTO_BATCH = 32  # beyond this a CPU gains nothing and the progress bar stands still


@dataclasses.dataclass
class Stage:
    """One network's part of a run: everything a sampler is called with, except the batch.

    ``title`` goes into messages and the progress bar; ``options`` are keyword arguments of the
    sampler; ``low_images`` uint8 [N, h, w, 3] feeds an upsampler.
    """

    title: str
    engine: Any
    sampler: Any
    diffusion: Any
    image_shape: tuple[int, int, int]  # (C, H, W)
    options: dict[str, Any]
    guidance_scale: float = 0.0
    low_images: np.ndarray | None = None


@dataclasses.dataclass
class StageOutput:
    """images uint8 [M, H, W, 3] with M < N when stopped early; timesteps: the grid used."""

    images: np.ndarray
    timesteps: list[float]
    stopped: dict[str, int] | None = None

    def result(self, labels, seeds, metadata):
        """SampleResult of the images that there are."""
        if self.stopped:
            metadata["stopped"] = self.stopped
        done = slice(0, len(self.images))
        return SampleResult(self.images, _rows(labels, done), seeds[done], metadata)


def run_stage(stage, seeds, labels, batch_size, progress=True, callback=None):
    """All images of a stage, ``batch_size`` at a time.

    seeds int64 [N]; labels int64 [N] or None; callback(step, total, t, x0) as in ``Pipeline``.
    Raises NonFiniteError (image and step named) and SamplingInterrupted (Ctrl-C).
    """
    count = len(seeds)
    monitor = _Monitor(stage, count, batch_size, progress, callback)
    images = []
    try:
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            images.append(_run_batch(stage, seeds[rows], _rows(labels, rows), rows, monitor))
            if monitor.stopped:
                break
    except SamplingInterrupted:
        raise
    except KeyboardInterrupt:
        raise SamplingInterrupted(
            f"interrupted during {stage.title}, {monitor.where()}; nothing was written"
        ) from None
    finally:
        monitor.close()
    return StageOutput(np.concatenate(images), monitor.timesteps, monitor.stopped)


def to_uint8(x):
    """The published quantisation, by truncation: float [N, 3, H, W] -> uint8 [N, H, W, 3]."""
    scaled = np.clip((x.astype(np.float32) + np.float32(1)) * np.float32(127.5), 0, 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


def from_uint8(images):
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], as the published upsamplers expect."""
    floats = images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(floats.transpose(0, 3, 1, 2))


def choose_batch_size(value, count, engine, guided=False):
    """``value`` as it is, or for "auto" what fits the engine's memory; at most ``count``."""
    if value != "auto":
        return min(count, check_count("batch_size", value))
    return automatic_batch_size(count, engine.image_bytes(guided), free_memory(engine.device))


def automatic_batch_size(count, bytes_per_image, free_bytes):
    """The largest batch up to 32 that uses at most a quarter of the free memory."""
    return int(max(1, min(count, _MAX_AUTO_BATCH, free_bytes // 4 // max(1, bytes_per_image))))


def _rows(values, rows):
    return None if values is None else values[rows]


def _run_batch(stage, seeds, labels, rows, monitor):
    engine = stage.engine
    noise = philox_normal(seeds, stage.image_shape, step=0, purpose=INITIAL_NOISE)
    low = _rows(stage.low_images, rows)
    monitor.begin(rows)
    start = (
        engine.from_numpy(noise),
        stage.diffusion,
        None if labels is None else engine.from_numpy(labels),
        stage.guidance_scale,
    )
    low_res = None if low is None else engine.from_numpy(from_uint8(low))
    options = {"noise": seeds, "low_res": low_res, **stage.options}
    if monitor.may_skip_steps and hasattr(engine, "run_captured"):
        run = engine.run_captured(stage.sampler, *start, **options)
        if run is not None and run.finite:
            x = engine.to_numpy(run.x)
            monitor.check(x, "the finished sample")
            monitor.after_run(run.timesteps)
            return to_uint8(x)
        # Not possible, or not finite: the steps one by one, which names the bad one.
    watched = _Watched(engine, monitor)
    x = engine.to_numpy(stage.sampler(watched, *start, callback=monitor.after_step, **options))
    monitor.check(x, "the finished sample")
    return to_uint8(x)


class _Watched:
    """An engine whose answers are looked at: a clip would hide a NaN or an infinity."""

    def __init__(self, engine, monitor):
        self._engine, self._monitor = engine, monitor

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def denoise(self, x, t, y=None, low_res=None):
        out = self._engine.denoise(x, t, y, low_res)
        self._monitor.check(out, "the model's output")
        return out

    def classifier_gradient(self, x, t, y):
        gradient = self._engine.classifier_gradient(x, t, y)
        self._monitor.check(gradient, "the classifier's gradient")
        return gradient


class _Monitor:
    """Follows a stage step by step: progress bar, user's callback, non-finite values."""

    def __init__(self, stage, count, batch_size, progress, callback):
        self._stage, self._count, self._batch_size = stage, count, batch_size
        self._progress, self._callback = progress, callback
        self._bar = None
        self._rows, self._steps_done, self._total = slice(0, 0), 0, None
        self._first = True
        self.timesteps = []
        self.stopped = None

    def begin(self, rows):
        self._first = not rows.start
        self._rows, self._steps_done = rows, 0

    def where(self):
        """ "step 4 of 25, images 0..15 of 16"."""
        of = f" of {self._total}" if self._total else ""
        return (
            f"step {self._steps_done + 1}{of}, images {self._rows.start}.."
            f"{self._rows.stop - 1} of {self._count}"
        )

    def check(self, values, what):
        """Raise NonFiniteError naming the first image of the batch that is not finite."""
        # A sum is finite unless an element is not (or a float32 sum overflows, checked next).
        if np.isfinite(float(values.sum())):
            return
        bad = ~np.isfinite(self._stage.engine.to_numpy(values) if _foreign(values) else values)
        images = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
        if not len(images):
            return
        raise NonFiniteError(
            f"{what} is not finite in image {self._rows.start + images[0]} at step "
            f"{self._steps_done + 1}{f' of {self._total}' if self._total else ''} of "
            f"{self._stage.title} ({len(images)} of {len(bad)} images in the batch are affected); "
            "nothing was written. Damaged weights or a guidance_scale that is far too large do this"
        )

    @property
    def may_skip_steps(self):
        """Whether nobody wants to see the steps: then a batch may run as a whole."""
        return self._callback is None

    def after_run(self, timesteps):
        """A whole batch is done, whose steps were not seen."""
        self._advance(len(timesteps), len(timesteps))
        if self._first:
            self.timesteps = [float(t) for t in timesteps]
        self._steps_done = len(timesteps)

    def _advance(self, steps, total):
        self._total = total
        if self._bar is None and self._progress:
            from tqdm import tqdm

            batches = -(-self._count // self._batch_size)
            self._bar = tqdm(total=total * batches, desc=self._stage.title, unit="step")
        if self._bar is not None:
            self._bar.update(steps)

    def after_step(self, step, total, t, x0):
        """The sampler's callback; False stops the run."""
        self._advance(1, total)
        if self._first:
            self.timesteps.append(float(t))
        proceed = True
        if self._callback is not None:
            # A copy: multistep samplers go on from x0, and a callback may scale it in place.
            shown = np.array(self._stage.engine.to_numpy(x0))
            proceed = self._callback(step, total, float(t), shown)
        self._steps_done += 1
        if is_false(proceed):
            self.stopped = {"step": step, "steps": total, "image": self._rows.start}
            return False
        return True

    def close(self):
        if self._bar is not None:
            self._bar.close()


def _foreign(values):
    return not isinstance(values, np.ndarray)
