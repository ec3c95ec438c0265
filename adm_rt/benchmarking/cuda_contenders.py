"""Who takes part in ``adm-rt bench sample --device cuda``: guided DDIM samples, from noise to x_0.

The rivals are the published networks (``published.py``) with the published sequence of torch
operations for a step (``baselines.ddim_update``), from the released flags to all that torch offers.
Not measured yet.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import numpy as np
import torch

from adm_rt.benchmarking import baselines, published
from adm_rt.benchmarking.contenders import published_of
from adm_rt.engines.torch_engine import TorchEngine
from adm_rt.samplers import SAMPLERS

SAMPLER = "ddim"


class Work(NamedTuple):
    """One batch. x: the noise, float32 [N, 3, S, S]; y int64 [N], both on the device."""

    x: torch.Tensor
    y: torch.Tensor
    diffusion: Any
    guidance_scale: float


class Released:
    """The flags as released: the UNet in float16 where its flags say so, the classifier in float32,
    all checkpointing; coefficients and timesteps copied from the host in every step.

    networks: part -> ``ModelWeights``; options: device, dtype and gpu, for those who have a choice.
    """

    title = "published code, flags as released"
    half_classifier = half_unet = False
    order, checkpoint = torch.contiguous_format, True
    _update = staticmethod(baselines.ddim_update)

    def __init__(self, networks, device, **options):
        self._device = device
        self._unet = self._made(networks["diffusion"], self.half_unet)
        self._classifier = self._made(networks["classifier"], self.half_classifier)

    def _made(self, weights, half):
        network = published_of(weights.cfg, weights.state_dict(), self.checkpoint)
        if half or (weights.cfg.use_fp16 and weights.cfg.kind != "classifier"):
            network.convert_to_fp16()
        return network.to(self._device, memory_format=self.order)

    def denoise(self, x, t, y):
        """x [N, 3, S, S]; t int64 [N]; y int64 [N] -> [N, 6, S, S]."""
        labels = (y,) if self._unet.cfg.class_cond else ()
        with torch.no_grad():
            return self._unet(x, t, *labels)

    def classifier_gradient(self, x, t, y):
        return published.classifier_gradient(self._classifier, x, t, y)

    def networks(self, work, position):
        """name -> both networks' outputs at a position of the process, as float32."""
        x, t = work.x.contiguous(memory_format=self.order), self._times(work, position)[1]
        outputs = {
            "denoise": self.denoise(x, t, work.y),
            "classifier_gradient": self.classifier_gradient(x, t, work.y),
        }
        return {name: value.float().clone() for name, value in outputs.items()}

    def sample(self, work):
        """x_0 [N, 3, S, S]."""
        tables, x = self._tables(work.diffusion), work.x.contiguous(memory_format=self.order)
        for position in reversed(range(work.diffusion.num_timesteps)):
            index, t = self._times(work, position)
            x = self._step(tables, x, t, index, work)
        return x

    def _step(self, tables, x, t, index, work):
        out = self.denoise(x, t, work.y)
        gradient = self.classifier_gradient(x, t, work.y) * work.guidance_scale
        with torch.no_grad():
            return self._update(tables, x, out, index, gradient)

    def _times(self, work, position):
        """(positions in the respaced process, timesteps of the original), int64 [N] each."""
        index = torch.tensor([position] * len(work.x), device=self._device)
        steps = torch.tensor([int(t) for t in work.diffusion.timestep_map], device=self._device)
        return index, steps[index]

    def _tables(self, diffusion):
        return baselines.tables(diffusion)


class HalfPrecision(Released):
    """Both networks in float16."""

    title = "published code, both networks in float16"
    half_classifier = half_unet = True


class ChannelsLast(HalfPrecision):
    """Both in float16 and channels_last."""

    title = "published code, float16, channels_last"
    order = torch.channels_last


class Compiled(ChannelsLast):
    """torch.compile(mode="max-autotune"), with its CUDA graphs, of both networks without
    checkpointing and with frozen weights; the update compiled, too, tables on the device."""

    title = "torch.compile(max-autotune), float16, channels_last, no checkpointing"
    checkpoint = False

    def _made(self, weights, half):
        network = super()._made(weights, half).requires_grad_(False)
        compiled = torch.compile(network, mode="max-autotune", dynamic=False)
        return types.SimpleNamespace(cfg=network.cfg, run=compiled)

    def __init__(self, networks, device, **options):
        super().__init__(networks, device, **options)
        self._update = torch.compile(baselines.ddim_update, dynamic=False)
        self._kept = None

    def denoise(self, x, t, y):
        torch.compiler.cudagraph_mark_step_begin()
        labels = (y,) if self._unet.cfg.class_cond else ()
        with torch.no_grad():
            return self._unet.run(x, t, *labels).clone()  # the next call overwrites it

    def classifier_gradient(self, x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = torch.log_softmax(self._classifier.run(x, t), dim=-1).gather(1, y[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0].clone()

    def _times(self, work, position):
        return tuple(table[position] for table in self._resident(work)[1])

    def _tables(self, diffusion):
        return self._kept[2]

    def _resident(self, work):
        """What the host would be asked for in every step, on the device once."""
        if self._kept is None or self._kept[0] is not work:
            count, steps = len(work.x), work.diffusion.num_timesteps
            position = torch.arange(steps, device=self._device)[:, None].expand(steps, count)
            times = [int(t) for t in work.diffusion.timestep_map]
            times = torch.tensor(times, device=self._device)[:, None].expand(steps, count)
            tables = baselines.tables(work.diffusion)
            for name, table in vars(tables).items():
                if isinstance(table, np.ndarray):
                    setattr(tables, name, torch.from_numpy(table).to(self._device))
            times = position.contiguous(), times.contiguous()
            self._kept = work, times, tables
        return self._kept

    def sample(self, work):
        self._resident(work)
        return super().sample(work)


class Ours:
    """The torch engine: a run is replays of CUDA graphs."""

    title = "adm_rt torch"
    branches = True

    def __init__(self, networks, device, dtype="float16", gpu=None):
        self._engine = TorchEngine(
            networks["diffusion"],
            networks["classifier"],
            device=str(device),
            dtype=dtype,
            branches=self.branches,
            gpu=gpu,
        )

    def networks(self, work, position):
        """name -> both networks' outputs at a position of the process."""
        t = float(work.diffusion.timestep_map[position])
        return {
            "denoise": self._engine.denoise(work.x, t, work.y),
            "classifier_gradient": self._engine.classifier_gradient(work.x, t, work.y),
        }

    def sample(self, work):
        """x_0 [N, 3, S, S]; RuntimeError where the run cannot be recorded."""
        seeds = np.arange(len(work.x))  # DDIM without eta draws nothing
        arguments = (work.x, work.diffusion, work.y, work.guidance_scale)
        run = self._engine.run_captured(SAMPLERS[SAMPLER], *arguments, noise=seeds)
        if run is None:
            raise RuntimeError("; ".join(self._engine.notes))
        return run.x


class OursInTurn(Ours):
    """The same with the networks of a step one after the other."""

    title = "adm_rt torch, networks in turn"
    branches = False


class OursStepByStep(Ours):
    """The same engine without graphs: what they are worth."""

    title = "adm_rt torch, steps one by one"

    def sample(self, work):
        arguments = (work.x, work.diffusion, work.y, work.guidance_scale)
        return SAMPLERS[SAMPLER](self._engine, *arguments)


class Contender(NamedTuple):
    """default: takes part unless others are asked for."""

    make: Any
    default: bool = True


CONTENDERS = {
    "ours": Contender(Ours),
    "released": Contender(Released),
    "float16": Contender(HalfPrecision),
    "channels_last": Contender(ChannelsLast),
    "compile": Contender(Compiled, default=False),  # its start takes minutes
    "ours_in_turn": Contender(OursInTurn, default=False),
    "ours_by_step": Contender(OursStepByStep, default=False),
}
