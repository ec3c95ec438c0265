"""A training run small enough to be started many times: 8x8 images, 4 channels, no data files."""

import contextlib

import torch

from adm_rt import models
from adm_rt.diffusion import Diffusion
from adm_rt.ops.philox import image_seeds, philox_normal, philox_randint
from adm_rt.training.tasks import DiffusionTask
from adm_rt.training.trainer import TrainConfig, Trainer

MODEL = {
    "image_size": 8,
    "num_channels": 4,
    "norm_groups": 1,
    "channel_mult": "1,1",
    "num_res_blocks": 1,
    "num_head_channels": 4,
    "attention_resolutions": "4",
    "resblock_updown": True,
    "num_classes": 3,
    "class_cond": True,
    "learn_sigma": True,
}


class Stream:
    """Images of smooth noise; batch ``short_step`` has only ``short_size`` images."""

    def __init__(self, batch_size, short_step=-1, short_size=0):
        self.batch_size = batch_size
        self.short = {short_step: short_size}

    def batch(self, step, rank=0, world_size=1):
        size = self.short.get(step, self.batch_size)
        start, stop = size * rank // world_size, size * (rank + 1) // world_size
        seeds = image_seeds(7, stop - start, step * self.batch_size + start)
        images = torch.from_numpy(philox_normal(seeds, (3, 8, 8))).clamp(-1, 1)
        return images, torch.from_numpy(philox_randint(seeds, 3)), start


class Quiet:
    """A monitor that only remembers what it was told."""

    def __init__(self):
        self.rows = []
        self.networks = []
        self.plotted = None  # until it is closed

    def start(self, step, seconds=0.0):
        pass

    def record(self, step, per_image, scalars):
        self.rows.append((step, per_image, scalars))

    def evaluate(self, step, network):
        self.networks.append((step, network))

    def checkpointed(self, step, path):
        pass

    def close(self, plot=True):
        self.plotted = plot


def tiny_trainer(out, *, model=None, short=(-1, 0), timesteps=100, callback=None, **changes):
    """A Trainer that writes into ``out``; ``changes`` are fields of TrainConfig."""
    options = {"iterations": 6, "batch_size": 4, "lr": 1e-2, "save_interval": 3, "device": "cpu"}
    config = TrainConfig(out=str(out), **(options | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = models.build(models.ModelConfig(**(MODEL | (model or {}))))
    task = DiffusionTask(
        Diffusion(steps=timesteps, noise_schedule="cosine"),
        Stream(config.batch_size, *short),
        class_cond=True,
    )
    return Trainer(network, task, config, monitor=Quiet(), callback=callback)


def all_tensors(trainer):
    """Weights and every average of ``trainer``, by name."""
    tensors = {f"model.{name}": p.detach() for name, p in trainer.parameters.items()}
    for rate, average in trainer.averages.averages.items():
        tensors |= {f"ema.{rate}.{name}": value for name, value in average.items()}
    return tensors


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@contextlib.contextmanager
def poisoned(trainer, bad):
    """Inside, the losses of the updates for which ``bad(step)`` holds are NaN."""
    losses = trainer.task.losses

    def wrapped(model, batch, random, sampler):
        values = losses(model, batch, random, sampler)
        return {**values, "loss": values["loss"] * float("nan")} if bad(random.step) else values

    trainer.task.losses = wrapped
    yield
    trainer.task.losses = losses
