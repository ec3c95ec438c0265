"""TrainConfig: how to train. Its fields are the flags of ``adm-rt train``."""

import dataclasses
import math
import os

from adm_rt.models.config import nearest
from adm_rt.training.schedule_samplers import SCHEDULE_SAMPLERS

PRECISIONS = ("float32", "bf16", "fp16")
PARALLEL = ("ddp", "fsdp")


def _flag(help, default=dataclasses.MISSING, may_change=False):
    """A field; ``may_change``: a resumed run may have another value."""
    return dataclasses.field(default=default, metadata={"help": help, "may_change": may_change})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    The learning rate rises linearly over ``warmup_steps``, stays at ``lr``, and falls linearly to
    zero over the last ``cooldown_steps``; with ``lr_anneal_steps`` it also falls over the whole run
    as (1 - step / lr_anneal_steps), the published annealing. ``precision`` "bf16" and "fp16" run
    the network under autocast with float32 master weights. ``ema_rate`` is one decay or several,
    as "0.9999,0.999"; the first one's average becomes the final model.

    Raises ValueError, naming the field.
    """

    iterations: int = _flag("updates to make; training never runs without an end", may_change=True)
    out: str = _flag(
        "folder for checkpoints, log.csv and the final model; a run in it is continued",
        may_change=True,
    )
    batch_size: int = _flag("images of one update, over all processes", 64)
    microbatch: int = _flag("images of one backward pass of a process, 0: all at once", 0)
    sum_microbatches: bool = _flag(
        "add the microbatches' mean gradients, as the published code does, not average them", False
    )
    lr: float = _flag("learning rate of AdamW", 1e-4)
    warmup_steps: int = _flag("linear rise of the learning rate at the start", 0)
    cooldown_steps: int = _flag("linear fall of the learning rate to zero at the end", 0)
    lr_anneal_steps: int = _flag(
        "linear fall of the learning rate over this many updates, 0: no", 0
    )
    weight_decay: float = _flag("of AdamW", 0.0)
    grad_clip: float = _flag("largest norm of the gradient, 0: no limit", 0.0)
    ema_rate: str = _flag("decays of the moving averages; the first is the final model's", "0.9999")
    ema_ramp: bool = _flag(
        "let the decay rise from 0.1 so that the start is forgotten; published: False", True
    )
    precision: str = _flag("float32, bf16 or fp16 (autocast, float32 master weights)", "float32")
    initial_lg_loss_scale: float = _flag("fp16: binary logarithm of the first loss scale", 20.0)
    fp16_scale_growth: float = _flag("fp16: what that logarithm gains by every good update", 1e-3)
    schedule_sampler: str = _flag("timesteps drawn: uniform or loss-second-moment", "uniform")
    seed: int = _flag("of the weights, timesteps and noise", 0)
    parallel: str = _flag(
        "several processes: ddp, or fsdp (weights in shards, for models over one GPU's memory)",
        "ddp",
        may_change=True,
    )
    device: str = _flag("auto, cpu or cuda", "auto", may_change=True)
    timeout: float = _flag("seconds a process waits for the others", 600.0, may_change=True)
    log_interval: int = _flag("updates between rows of log.csv", 20, may_change=True)
    save_interval: int = _flag("updates between checkpoints", 500, may_change=True)
    sample_interval: int = _flag("updates between looks at the EMA model, 0: none", 0, True)
    keep: int = _flag("newest checkpoints that are kept", 2, may_change=True)
    allow_changes: str = _flag(
        "fields, as 'lr,grad_clip', that may differ from the checkpoint's", "", may_change=True
    )

    def __post_init__(self):
        object.__setattr__(self, "ema_rate", _canonical_rates(self.ema_rate))
        for name in ("iterations", "batch_size", "log_interval", "save_interval", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in (
            "microbatch",
            "warmup_steps",
            "cooldown_steps",
            "lr_anneal_steps",
            "weight_decay",
            "grad_clip",
            "fp16_scale_growth",
            "sample_interval",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more, and finite.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must be 0 to {2**31 - 1}.")
        if not self.out or (os.path.exists(self.out) and not os.path.isdir(self.out)):
            raise ValueError(f"out={self.out!r} must be a folder, there or to be made.")
        for name in ("lr", "timeout"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be a positive number.")
        if not -14 <= self.initial_lg_loss_scale <= 64:
            raise ValueError(
                f"initial_lg_loss_scale={self.initial_lg_loss_scale} must be in [-14, 64]."
            )
        if 0 < self.lr_anneal_steps < self.iterations:
            raise ValueError(
                f"lr_anneal_steps={self.lr_anneal_steps} is less than iterations="
                f"{self.iterations}: the learning rate would be zero from there on."
            )
        for name, allowed in (
            ("precision", PRECISIONS),
            ("parallel", PARALLEL),
            ("schedule_sampler", tuple(SCHEDULE_SAMPLERS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}."
                    + nearest(value, allowed)
                )

    @property
    def ema_rates(self):
        """The decays by their names in ``ema_rate``: {"0.9999": 0.9999}."""
        return {text: float(text) for text in self.ema_rate.split(",")}

    def learning_rate(self, step):
        """Learning rate of update ``step`` (0-based)."""
        up = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        left = self.iterations - step
        down = left / self.cooldown_steps if left < self.cooldown_steps else 1.0
        annealed = 1.0 - step / self.lr_anneal_steps if self.lr_anneal_steps else 1.0
        return self.lr * min(up, down) * annealed


def differences(saved, now, allowed=""):
    """What forbids to continue a run of configuration ``saved`` with ``now``: a list of sentences.

    Both are dicts of sections ("train", "model", "task") of JSON values; ``allowed`` is
    ``TrainConfig.allow_changes``, in which fields of other sections are named "model.dropout", and
    "task.data" stands for all that is below it.
    Also returns whether something that was allowed differs: (list, bool).
    """
    free = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata["may_change"]}
    free_by_request = {name.strip() for name in allowed.split(",")}
    found, changed = [], False
    for section in sorted(saved.keys() | now.keys()):
        prefix = "" if section == "train" else f"{section}."
        old, new = (_flat(side.get(section, {}), prefix) for side in (saved, now))
        for name in sorted(old.keys() | new.keys()):
            if name in free or old.get(name) == new.get(name):
                continue
            parts = name.split(".")
            if free_by_request & {".".join(parts[:n]) for n in range(1, len(parts) + 1)}:
                changed = True
            else:
                found.append(f"{name} is {new.get(name)!r}, was {old.get(name)!r}")
    return found, changed


def _flat(values, prefix):
    """A dict of dicts as one, with the names joined by dots."""
    flat = {}
    for name, value in values.items():
        name = prefix + name
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _canonical_rates(value):
    """ "0.9999, .999", 0.9999 or a sequence of numbers as "0.9999,0.999"."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        parts = list(parts)
    except TypeError:
        parts = [parts]
    try:
        rates = [float(part) for part in parts]
    except (TypeError, ValueError):
        rates = []
    if not rates or not all(0 <= rate < 1 for rate in rates) or len(set(rates)) != len(rates):
        raise ValueError(
            f"ema_rate={value} must be one number in [0, 1), or different ones as '0.9999,0.999'."
        )
    return ",".join(map(repr, rates))
