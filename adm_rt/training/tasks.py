"""What one training step optimises: a denoiser's objective, an upsampler's, a noisy classifier's.

A task turns a step number into a batch and rows of a batch into per-image losses. Its randomness
comes from the ``StepRandom`` it is given and its data from the step's position in the stream, so a
resumed run repeats the uninterrupted one, and so does a run on another number of processes.
"""

import dataclasses

import torch

from adm_rt.data import area_downsample
from adm_rt.diffusion import losses
from adm_rt.request import check_number
from adm_rt.training.evaluations import check_labels, classification_terms
from adm_rt.training.randomness import CLASS_DROPOUT, NOISE_AMPLITUDE


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

    @property
    def numbers(self):
        """Positions of the images in the stream."""
        return range(self.first, self.first + len(self))

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(len(self))
        extra = {name: value[start:stop] for name, value in self.extra.items()}
        return Batch(self.x0[start:stop], self.y[start:stop], self.first + start, extra)

    def to(self, device):
        """The batch with its tensors on ``device``."""
        extra = {name: value.to(device) for name, value in self.extra.items()}
        return Batch(self.x0.to(device), self.y.to(device), self.first, extra)


class DiffusionTask:
    """The objective of ``diffusion``, by default the hybrid one of Improved DDPM (eq. 16).

    diffusion: the process; its flags choose the target and the loss (``losses.training_losses``).
    data: has ``batch(step, rank, world_size)``, such as ``adm_rt.data.BatchStream``. class_cond:
    hand the labels to the network. num_classes: refuse labels outside 0 .. num_classes - 1
    (ValueError names the image). class_dropout: the share of images whose label becomes
    num_classes, the null class of classifier-free guidance (Ho & Salimans 2022).

    noise_jitter: each image's noise is multiplied by 1 + noise_jitter * z, z standard normal,
    between 0.3 and 2, in x_t and in the target alike. A narrow network otherwise learns to answer
    with noise of unit amplitude whatever it is shown, and few-step samplers leave grain; so it has
    to measure the amplitude (cf. input perturbation, Ning et al. 2023, arXiv 2301.11706).
    snr_weight: see ``losses.training_losses``.
    """

    def __init__(
        self,
        diffusion,
        data,
        class_cond,
        *,
        num_classes=None,
        class_dropout=0.0,
        noise_jitter=0.0,
        snr_weight=False,
    ):
        check_number("class_dropout", class_dropout, 0.0, 1.0)
        check_number("noise_jitter", noise_jitter, 0.0, 1.0)
        if class_dropout and (not class_cond or num_classes is None):
            raise ValueError(
                f"class_dropout={class_dropout} needs class_cond=True and num_classes, the number "
                "of the null class; set it to 0 for a model without classes."
            )
        if snr_weight:
            losses.check_snr_weight(diffusion)
        self.diffusion = diffusion
        self.data = data
        self.class_cond = class_cond
        self.num_classes = num_classes
        self.class_dropout = class_dropout
        self.noise_jitter = noise_jitter
        self.snr_weight = snr_weight

    def batch(self, step, rank=0, world_size=1):
        """The share of process ``rank`` in the global batch of update ``step``: a ``Batch``."""
        batch = Batch(*self.data.batch(step, rank, world_size))
        if self.class_cond and self.num_classes is not None:
            check_labels(batch.y, self.num_classes, _name(self.data, step), batch.numbers)
        return batch

    def describe(self):
        """What the losses depend on beside the network, for JSON; a resumed run must have it."""
        return {
            "diffusion": self.diffusion.to_config(),
            "class_cond": self.class_cond,
            "class_dropout": self.class_dropout,
            "noise_jitter": self.noise_jitter,
            "snr_weight": self.snr_weight,
            **_description(self.data),
        }

    def losses(self, model, batch, random, schedule_sampler):
        """Values [n] by name for the rows of ``batch``.

        "loss" times "weight" is what is minimised; "t" are the timesteps drawn; the rest is for
        the log. ``random`` is the ``StepRandom`` of these rows.
        """
        t, weight = (v.to(batch.x0.device) for v in schedule_sampler.sample(random, len(batch)))
        noise = self._noise(batch, random)
        x_t = losses.q_sample(self.diffusion, batch.x0, t, noise)
        times = self.diffusion.model_timesteps(t)
        output = model(x_t, times, *self._conditions(batch), self._labels(batch, random))
        values = losses.training_losses(
            self.diffusion,
            output.float(),
            batch.x0,
            x_t,
            t,
            noise,
            snr_weight=self.snr_weight,
        )
        return {**values, "t": t, "weight": weight}

    def _noise(self, batch, random):
        noise = random.normal(batch.x0.shape[1:])
        if self.noise_jitter:
            amplitude = 1 + self.noise_jitter * random.normal((1, 1, 1), NOISE_AMPLITUDE)
            noise = noise * amplitude.clamp(0.3, 2.0)
        return noise.to(batch.x0.device)

    def _conditions(self, batch):
        """What the network takes between the timesteps and the labels."""
        return ()

    def _labels(self, batch, random):
        if not self.class_cond:
            return None
        if not self.class_dropout:
            return batch.y
        dropped = (random.uniform(CLASS_DROPOUT) < self.class_dropout).to(batch.y.device)
        return torch.where(dropped, self.num_classes, batch.y)


class UpsamplerTask(DiffusionTask):
    """``DiffusionTask`` for an upsampler (section 4.3): the network also sees a small image.

    The small image, [n, 3, small_size, small_size], is the batch's image reduced by area. Further
    arguments as in ``DiffusionTask``.
    """

    def __init__(self, diffusion, data, small_size, class_cond, **options):
        super().__init__(diffusion, data, class_cond, **options)
        self.small_size = small_size

    def batch(self, step, rank=0, world_size=1):
        """As in ``DiffusionTask``, with ``extra["low_res"]``."""
        batch = super().batch(step, rank, world_size)
        extra = {"low_res": area_downsample(batch.x0, self.small_size)}
        return dataclasses.replace(batch, extra=extra)

    def describe(self):
        """As in ``DiffusionTask``, with ``small_size``."""
        return {**super().describe(), "small_size": self.small_size}

    def _conditions(self, batch):
        return (batch.extra["low_res"],)


class ClassifierTask:
    """Cross-entropy on images noised to a random level (section 4.1).

    num_classes: refuse labels outside 0 .. num_classes - 1 (ValueError names the image).
    """

    def __init__(self, diffusion, data, *, num_classes=None):
        self.diffusion = diffusion
        self.data = data
        self.num_classes = num_classes

    def batch(self, step, rank=0, world_size=1):
        """The share of process ``rank`` in the global batch of update ``step``: a ``Batch``."""
        batch = Batch(*self.data.batch(step, rank, world_size))
        if self.num_classes is not None:
            check_labels(batch.y, self.num_classes, _name(self.data, step), batch.numbers)
        return batch

    def describe(self):
        """What the losses depend on beside the network, for JSON; a resumed run must have it."""
        return {"diffusion": self.diffusion.to_config(), **_description(self.data)}

    def losses(self, model, batch, random, schedule_sampler):
        """Per-image "loss", "top1" and "top5" (0 or 1) and "t" [n], no "weight", as published."""
        t, _ = (v.to(batch.x0.device) for v in schedule_sampler.sample(random, len(batch)))
        noise = random.normal(batch.x0.shape[1:]).to(batch.x0.device)
        x_t = losses.q_sample(self.diffusion, batch.x0, t, noise)
        logits = model(x_t, self.diffusion.model_timesteps(t)).float()
        return {**classification_terms(logits, batch.y), "t": t}


def _name(data, step):
    return f"{getattr(getattr(data, 'dataset', None), 'name', 'the data')}, batch {step}"


def _description(data):
    return {"data": data.describe()} if hasattr(data, "describe") else {}
