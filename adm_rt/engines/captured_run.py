"""A sampler's run as CUDA graphs: one recording of each kind of step, replayed step by step.

A graph holds one step: both networks, on streams of their own, and the update. The rows of
coefficients and the timesteps lie in tables on the device, and a counter there says which are next,
so that every replay does the next step and nothing waits for the host before the run is over.
Activations share one pool of memory; what goes from step to step lies in buffers beside it.

Shared by the engines on CUDA. Nothing here has been measured, or run, on a GPU yet.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import numpy as np
import torch

from adm_rt.diffusion.guidance import FRESH, REUSE
from adm_rt.engines.step_plan import Ref, Unplannable, plan_steps
from adm_rt.errors import EngineError
from adm_rt.ops import StepCoefficients
from adm_rt.ops.step_table import StepCounter, StepTable


class Run(NamedTuple):
    """x: a finished batch; timesteps: those of its steps, of the original process; finite: whether
    all that the networks said was."""

    x: torch.Tensor
    timesteps: list[float]
    finite: bool


class RunRecorder:
    """Records an engine's runs and replays them; the last one is kept.

    engine: its ``denoise`` and ``classifier_gradient`` take t as a float32 tensor [1], too, and
    neither wait for the device nor copy anything to it once they have run for a batch size; has
    ``notes``. gpu: a ``TorchGpu``. out_channels: of the denoiser. check(count), if any, raises
    EngineError where the networks cannot be recorded for a batch of count. branches: False puts
    the networks of a step one after the other, not side by side.
    """

    def __init__(self, engine, gpu, out_channels, check=None, branches=True):
        self._engine, self._gpu, self._out_channels = engine, gpu, out_channels
        self._check, self._side_by_side = check, gpu.side_by_side if branches else _in_turn
        self._recorded, self._on = None, True

    def forget(self):
        """Record anew: the recorded run holds addresses and values of weights that have changed."""
        self._recorded = None

    def run(self, sampler, x, diffusion, y, guidance_scale, *, noise=None, low_res=None, **options):
        """A whole run of ``sampler``, recorded on first use, as a ``Run``.

        Arguments as the sampler's, without a callback; noise: seeds [N], or None for fresh ones.
        Replayed as long as only the values of x, y, the seeds and low_res change. None where it
        cannot be recorded: then the steps have to be run one by one (a note says why).
        """
        if not self._on or not _are_seeds(noise, len(x)) or x.dtype != torch.float32:
            return None
        if noise is None:
            noise = np.random.SeedSequence().generate_state(len(x), np.uint64) >> np.uint64(1)
            noise = noise.astype(np.int64)
        # Buffers outlive the call: they must not depend on the caller's mode.
        with torch.inference_mode(False), torch.no_grad():
            given = {"x": x, "y": y, "noise": noise, "low_res": low_res}
            inputs = {name: self._on_device(value) for name, value in given.items()}
            key = _Key(
                sampler,
                {k: None if v is None else (tuple(v.shape), v.dtype) for k, v in inputs.items()},
                float(guidance_scale),
                (diffusion.to_config(), diffusion.betas.tobytes()),
                options,
            )
            if self._recorded is None or self._recorded.key != key:
                self._recorded = None  # its memory first
                try:
                    self._recorded = self._record(key, inputs, diffusion)
                except (EngineError, RuntimeError, Unplannable) as error:
                    self._on = isinstance(error, Unplannable)  # another sampler may do better
                    note = f"steps run one by one, not as CUDA graphs: {error}"
                    if note not in self._engine.notes:  # a batch after the other asks again
                        self._engine.notes.append(note)
                        print(f"adm-rt: {note}", file=sys.stderr, flush=True)
                    return None
            return self._recorded.replay(inputs)

    def _record(self, key, inputs, diffusion):
        plan = plan_steps(
            key.sampler,
            tuple(inputs["x"].shape),
            diffusion,
            key.guidance_scale,
            out_channels=self._out_channels,
            labelled=inputs["y"] is not None,
            low_shape=None if inputs["low_res"] is None else inputs["low_res"].shape,
            **key.options,
        )
        networks = self._engine, self._side_by_side
        return _Recorded(key, networks, self._gpu, plan, inputs, self._check)

    def _on_device(self, value):
        if value is None or isinstance(value, torch.Tensor):
            return value
        return self._gpu.from_numpy(value)


def _in_turn(first, second):
    return first(), second()


def _are_seeds(noise, count):
    if noise is None:
        return True
    return tuple(getattr(noise, "shape", ())) == (count,) and "int" in str(noise.dtype)


class _Key(NamedTuple):
    sampler: object
    shapes: dict
    guidance_scale: float
    diffusion: tuple
    options: dict


class _Recorded:
    """The graphs of one run, and what they read and write."""

    def __init__(self, key, networks, gpu, plan, inputs, check):
        self.key, self._plan = key, plan
        self._engine, self._side_by_side = networks
        self._inputs = {
            k: None if v is None else v.clone(memory_format=torch.contiguous_format)
            for k, v in inputs.items()
        }
        if self._inputs["noise"].dtype != torch.int64:
            self._inputs["noise"] = self._inputs["noise"].long()
        x = self._x = self._inputs["x"]
        self._null_y = None
        if plan.null_label is not None:
            self._null_y = torch.full_like(self._inputs["y"], plan.null_label)
        self._times = gpu.from_numpy(np.array(plan.model_timesteps, np.float32))
        self._counter = StepCounter(x.device)
        self._tables = _tables(plan, x.device)
        # name -> that value of one step ago, of two, ...; zero, not NaN, where there is none yet
        self._earlier = {
            name: [torch.zeros_like(x) for _ in range(plan.oldest(name))]
            for name in ("x0", "state")
        }
        reused = any(kind.gradient == REUSE for kind in plan.kinds)
        self._gradient = torch.zeros_like(x) if reused else None
        self._total = torch.zeros(1, device=x.device)
        kinds = list(dict.fromkeys(plan.kinds))
        steps = [functools.partial(self._step, kind) for kind in kinds]

        def warm_up():  # memory, loaded kernels, chosen algorithms
            for step in steps:
                self._reset()
                step()
            if check is not None:
                check(len(x))
            self._reset()

        replays = dict(zip(kinds, gpu.capture(warm_up, steps), strict=True))
        self._replays = [replays[kind] for kind in plan.kinds]

    def replay(self, inputs):
        for name, value in inputs.items():
            if value is not None:
                self._inputs[name].copy_(value)
        self._reset()
        for replay in self._replays:
            replay()
        finite = bool(torch.isfinite(self._total).all())  # the one wait
        return Run(self._x.clone(), list(self._plan.timesteps), finite)

    def _reset(self):
        self._counter.reset()
        self._total.zero_()
        for buffers in self._earlier.values():
            for buffer in buffers:
                buffer.zero_()

    # ---- one step: this is recorded ----

    def _step(self, kind):
        x, y, low_res = self._x, self._inputs["y"], self._inputs["low_res"]
        t = self._times.index_select(0, self._counter.value)

        def denoise():
            out = self._engine.denoise(x, t, y, low_res)
            uncond = self._engine.denoise(x, t, self._null_y, low_res) if kind.uncond else None
            return out, uncond

        if kind.gradient == FRESH:
            (out, uncond), gradient = self._side_by_side(
                denoise, lambda: self._engine.classifier_gradient(x, t, y)
            )
            if self._gradient is not None:
                self._gradient.copy_(gradient)
        else:
            (out, uncond), gradient = denoise(), None
        # A clip would hide a NaN or an infinity, so everything that the networks say is added up.
        for said in (out, uncond, gradient):
            if said is not None:
                self._total.add_(said.sum())
        if kind.gradient == REUSE:
            gradient = self._gradient
        made = self._update(kind, {"out": out, "uncond": uncond, "gradient": gradient})
        x.copy_(made["x_next"])
        for name, buffers in self._earlier.items():
            for newer, older in reversed(list(zip(buffers, buffers[1:], strict=False))):
                older.copy_(newer)
            if buffers and made[name] is not None:
                buffers[0].copy_(made[name])

    def _update(self, kind, made):
        for index, (table, update) in enumerate(zip(self._tables, kind.updates, strict=False)):
            results = table.update(
                self._counter,
                self._x,
                self._value(update.output, made),
                advance=index == len(kind.updates) - 1,
                state=update.state,
                gradient=made["gradient"] if update.gradient else None,
                uncond_output=made["uncond"] if update.uncond else None,
                history=[self._value(ref, made) for ref in update.history],
                seeds=self._inputs["noise"] if update.noise else None,
                learned_variance=update.learned_variance,
                clip=update.clip,
                quantile=update.quantile,
            )
            made = {**made, **dict(zip(("x_next", "x0", "state"), results, strict=True))}
        return made

    def _value(self, ref: Ref, made):
        value = self._earlier[ref.name][ref.age - 1] if ref.age else made[ref.name]
        return value[:, : self._x.shape[1]] if ref.prediction else value


def _tables(plan, device):
    """One table per update of a step; rows of steps with fewer updates are never used."""
    count = max(len(rows) for rows in plan.rows)
    none = StepCoefficients()
    padded = [(*rows, *[none] * (count - len(rows))) for rows in plan.rows]
    return [StepTable(rows, device) for rows in zip(*padded, strict=True)]
