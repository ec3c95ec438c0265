"""What is looked at during training: a grid of samples, a classifier's accuracy on held-out images.

Each is called with the step and the EMA network in eval mode, uses Philox noise only, so that it is
the same at every step and leaves the run alone, and returns numbers for the log.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from adm_rt.data import area_downsample
from adm_rt.data.keyed_random import shuffled
from adm_rt.diffusion import losses
from adm_rt.errors import NonFiniteError
from adm_rt.ops.philox import image_seeds, philox_normal, philox_randint
from adm_rt.result import SampleResult
from adm_rt.samplers import SAMPLERS
from adm_rt.training.monitor import write_aside
from adm_rt.trajectory import Stage, from_uint8, run_stage

_CELL = 64  # smaller images are enlarged in a grid, by a whole factor
_VALIDATION_NOISE, _VALIDATION_LEVEL = 32, 33  # purposes of their own, see randomness.py


class SampleGrid:
    """Writes ``samples/step_<n>.png``: images made by the network, the same noise every time.

    A class-conditional network shows classes 0, 1, 2, ... in turn; images below 64x64 are enlarged.
    An upsampler's grid has three rows: the low-resolution input (enlarged), its output, the truth;
    ``truth`` is uint8 [N, S, S, 3], and ``truth_labels`` [N] their classes.
    """

    def __init__(
        self, out, cfg, diffusion, count=16, steps=25, seed=0, truth=None, truth_labels=None
    ):
        self.folder = Path(out) / "samples"
        self.cfg = cfg
        self.diffusion = diffusion.respaced(str(min(steps, diffusion.steps)))
        self.seeds = image_seeds(seed, count if truth is None else len(truth))
        self.truth = truth
        self.labels = None
        if cfg.class_cond:
            index = np.arange(len(self.seeds), dtype=np.int64)
            self.labels = index % cfg.num_classes if truth_labels is None else truth_labels
        self.summary = f"{len(self.seeds)} samples in {self.diffusion.num_timesteps} steps"
        if cfg.kind == "upsampler" and truth is None:
            raise ValueError("truth=None: the grid of an upsampler needs images to enlarge.")

    def __call__(self, step, network):
        cfg, low = self.cfg, None
        if self.truth is not None:
            low = area_downsample(torch.from_numpy(from_uint8(self.truth)), cfg.small_size)
            low = _uint8(low)
        stage = Stage(
            title=f"samples of step {step}",
            engine=_NetworkEngine(network),
            sampler=SAMPLERS["ddpm" if self.diffusion.learn_sigma else "ddim"],
            diffusion=self.diffusion,
            image_shape=(cfg.in_channels, cfg.image_size, cfg.image_size),
            options={},
            low_images=low,
        )
        try:
            images = run_stage(stage, self.seeds, self.labels, len(self.seeds), False).images
        except NonFiniteError:  # the run goes on; its log says so
            return {"samples_not_finite": 1.0}
        columns = None
        if low is not None:
            columns = len(images)
            images = np.concatenate([_enlarged(low, cfg.image_size), images, self.truth])
        images = _enlarged(images, max(1, _CELL // cfg.image_size) * cfg.image_size)
        png = io.BytesIO()
        SampleResult(images, None, np.arange(len(images))).grid(columns).save(png, "PNG")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_aside(self.folder / f"step_{step:07d}.png", png.getvalue())
        return {}


class Validation:
    """Top-1 and top-5 accuracy and loss of a noisy classifier on held-out images, by noise level.

    dataset: from ``adm_rt.data.open_dataset``; ``num_images`` of it are used (all, if fewer), drawn
    at random, for a folder is in the order of its classes. They, and the level that each is noised
    to, are the same at every step. Returns ``val_loss``,
    ``val_top1``, ``val_top5`` and each by quartile of t (``val_top1_q0`` is the least noisy).
    """

    def __init__(self, dataset, diffusion, num_classes, num_images=1000, batch_size=64, seed=0):
        size = dataset.num_images
        self.count = num_images if size is None else min(num_images, size)
        if self.count < 1:
            raise ValueError(f"the validation set {dataset.name} has no images.")
        self.dataset, self.diffusion, self.batch_size = dataset, diffusion, batch_size
        self.summary = f"accuracy on {self.count:,} images of {dataset.name}"
        self.seeds = image_seeds(seed, self.count)
        self._index = np.arange(self.count)
        if size is not None:
            self._index = np.sort(shuffled(self._index, size, seed, 0))
        self.num_classes = num_classes
        self.t = philox_randint(self.seeds, diffusion.num_timesteps, purpose=_VALIDATION_LEVEL)

    def __call__(self, step, network):
        device = next(network.parameters()).device
        parts = []
        for start in range(0, self.count, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self.count))
            images, labels = self.dataset.get_many(self._index[rows], self._index[rows])
            x0, y = torch.from_numpy(from_uint8(images)), torch.from_numpy(labels)
            check_labels(y, self.num_classes, self.dataset.name, self._index[rows])
            noise = philox_normal(self.seeds[rows], x0.shape[1:], purpose=_VALIDATION_NOISE)
            t = torch.from_numpy(self.t[rows])
            x_t = losses.q_sample(self.diffusion, x0, t, torch.from_numpy(noise)).to(device)
            with torch.no_grad():
                logits = network(x_t, self.diffusion.model_timesteps(t).to(device)).float().cpu()
            parts.append(classification_terms(logits, y))
        quartile = torch.from_numpy(self.t) * 4 // self.diffusion.num_timesteps
        row = {}
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts]).double()
            row[f"val_{name}"] = values.mean().item()
            for q in range(4):
                if (quartile == q).any():
                    row[f"val_{name}_q{q}"] = values[quartile == q].mean().item()
        return row


def classification_terms(logits, y):
    """Per-image cross-entropy "loss", and "top1" and "top5" as 0 or 1, [N] each, of logits [N, K].

    With fewer than five classes top5 counts them all.
    """
    best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == y[:, None]
    return {
        "loss": F.cross_entropy(logits, y, reduction="none"),
        "top1": hits[:, 0].float(),
        "top5": hits.any(dim=1).float(),
    }


def check_labels(y, num_classes, name, numbers):
    """ValueError naming the first label of ``y`` int64 [N] that is not in [0, num_classes).

    numbers: those of the images, [N], for the message.
    """
    bad = ((y < 0) | (y >= num_classes)).nonzero().flatten().tolist()
    if not bad:
        return
    label = int(y[bad[0]])
    what = "no label" if label == -1 else f"label {label}"
    raise ValueError(
        f"{name}: image {numbers[bad[0]]} has {what}, and the model has classes 0 to "
        f"{num_classes - 1}. Give the model the data's number of classes (num_classes), train "
        "without classes (class_cond=False), or mend the labels."
    )


def _enlarged(images, size):
    """uint8 [N, s, s, 3] -> [N, size, size, 3], each pixel a block (nearest neighbour)."""
    index = np.arange(size) * images.shape[1] // size
    return images[:, index][:, :, index]


def _uint8(x):
    scaled = (x.clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


class _NetworkEngine:
    """A network in training as an engine: it is not moved, frozen or changed."""

    name, dtype, notes = "training", "float32", []

    def __init__(self, network):
        self._network = network
        self._device = next(network.parameters()).device
        self.device = str(self._device)

    def from_numpy(self, values):
        return torch.from_numpy(values).to(self._device)

    def to_numpy(self, values):
        return values.detach().cpu().numpy()

    @torch.no_grad()
    def denoise(self, x, t, y=None, low_res=None):
        times = torch.full((len(x),), float(t), device=self._device)
        inputs = (x, times) if low_res is None else (x, times, low_res)
        return self._network(*inputs, y if self._network.cfg.class_cond else None).float()

    def classifier_gradient(self, x, t, y):
        raise ValueError("samples during training are not guided")
