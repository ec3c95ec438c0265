"""What one training step optimises: the hybrid diffusion objective, or the noisy classifier's.

A task turns a step number into a batch and rows of a batch into per-image losses. Its randomness
comes from the ``StepRandom`` it is given and its data from the step's position in the stream, so a
resumed run repeats the uninterrupted one, and so does a run on another number of processes.
"""

import dataclasses

import torch
import torch.nn.functional as F

from adm_rt.diffusion import losses


@dataclasses.dataclass(frozen=True)
class Batch:
    """One process's share of a global batch; ``batch[a:b]`` are the rows a to b - 1 of it.

    x0: float32 [n, 3, S, S] in [-1, 1]; y: int64 [n]; first: position of the first image in the
    stream; extra: further tensors [n, ...] by name, such as an upsampler's "low_res".
    """

    x0: torch.Tensor
    y: torch.Tensor
    first: int = 0
    extra: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __len__(self):
        return self.x0.shape[0]

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(len(self))
        extra = {name: value[start:stop] for name, value in self.extra.items()}
        return Batch(self.x0[start:stop], self.y[start:stop], self.first + start, extra)

    def to(self, device):
        """The batch with its tensors on ``device``."""
        extra = {name: value.to(device) for name, value in self.extra.items()}
        return Batch(self.x0.to(device), self.y.to(device), self.first, extra)


class GlyphStream:
    """Batches of ``adm_rt.data.glyphs``: batch k of a seed is always the same."""

    def __init__(self, image_size, batch_size, seed):
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed

    def batch(self, step, rank=0, world_size=1):
        """The share of ``rank`` in batch ``step``.

        Returns images [n, 3, S, S] float32 in [-1, 1], labels [n] int64, and the position of the
        first of them in the stream.
        """
        from adm_rt.data import glyphs

        start = self.batch_size * rank // world_size
        count = self.batch_size * (rank + 1) // world_size - start
        first = step * self.batch_size + start
        images, labels = glyphs(count, self.image_size, seed=self.seed, first=first)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels.contiguous(), torch.from_numpy(labels), first


class DiffusionTask:
    """The hybrid objective of Nichol & Dhariwal 2021 (eq. 16): L_simple + the bound for v."""

    def __init__(self, diffusion, data, class_cond):
        self.diffusion = diffusion
        self.data = data
        self.class_cond = class_cond

    def batch(self, step, rank=0, world_size=1):
        """The share of process ``rank`` in the global batch of update ``step``: a ``Batch``."""
        return Batch(*self.data.batch(step, rank, world_size))

    def losses(self, model, batch, random, schedule_sampler):
        """Values [n] by name for the rows of ``batch``.

        "loss" times "weight" is what is minimised; "t" are the timesteps drawn; the rest is for
        the log. ``random`` is the ``StepRandom`` of these rows.
        """
        t, weight = (v.to(batch.x0.device) for v in schedule_sampler.sample(random, len(batch)))
        noise = random.normal(batch.x0.shape[1:]).to(batch.x0.device)
        x_t = losses.q_sample(self.diffusion, batch.x0, t, noise)
        y = batch.y if self.class_cond else None
        output = model(x_t, self.diffusion.model_timesteps(t), y)
        values = losses.training_losses(self.diffusion, output.float(), batch.x0, x_t, t, noise)
        return {**values, "t": t, "weight": weight}


class ClassifierTask:
    """Cross-entropy on images noised to a random level (section 4.1)."""

    def __init__(self, diffusion, data):
        self.diffusion = diffusion
        self.data = data

    def batch(self, step, rank=0, world_size=1):
        """The share of process ``rank`` in the global batch of update ``step``: a ``Batch``."""
        return Batch(*self.data.batch(step, rank, world_size))

    def losses(self, model, batch, random, schedule_sampler):
        """Per-image "loss", "accuracy" (0 or 1) and "t" [n]; the sampler's weights are not used."""
        t, _ = (v.to(batch.x0.device) for v in schedule_sampler.sample(random, len(batch)))
        noise = random.normal(batch.x0.shape[1:]).to(batch.x0.device)
        x_t = losses.q_sample(self.diffusion, batch.x0, t, noise)
        logits = model(x_t, self.diffusion.model_timesteps(t)).float()
        loss = F.cross_entropy(logits, batch.y, reduction="none")
        accuracy = (logits.detach().argmax(1) == batch.y).float()
        return {"loss": loss, "accuracy": accuracy, "t": t}
