"""The training loop: AdamW, warm-up and cool-down, EMA, checkpoints, a log.

Checkpoints are folders ``step_<n>`` written aside and renamed. Randomness is keyed on
(seed, step), so a run that was stopped and continued from its newest checkpoint gives the weights
of an uninterrupted one.
"""

import contextlib
import csv
import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from adm_rt.training import schedule_samplers
from adm_rt.training.randomness import StepRandom


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Every field is a flag of ``adm-rt train``.

    The learning rate rises linearly over ``warmup_steps``, stays at ``lr``, and falls linearly to
    zero over the last ``cooldown_steps``. ``precision`` "bf16" runs the network under autocast
    with float32 master weights. ``ema_rate`` is the decay of the exponential moving average.
    """

    iterations: int
    out: str
    batch_size: int = 64
    lr: float = 1e-4
    warmup_steps: int = 0
    cooldown_steps: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    ema_rate: float = 0.9999
    precision: str = "float32"
    seed: int = 0
    log_interval: int = 20
    save_interval: int = 500
    keep: int = 2

    def __post_init__(self):
        for name in ("iterations", "batch_size", "log_interval", "save_interval", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("warmup_steps", "cooldown_steps", "weight_decay", "grad_clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more, and finite.")
        if not self.out or (os.path.exists(self.out) and not os.path.isdir(self.out)):
            raise ValueError(f"out={self.out!r} must be a folder, there or to be made.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr={self.lr} must be a positive number.")
        if not 0 <= self.ema_rate < 1:
            raise ValueError(f"ema_rate={self.ema_rate} must be in [0, 1).")
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"precision={self.precision!r} must be 'float32' or 'bf16'.")

    def learning_rate(self, step):
        """Learning rate of update ``step`` (0-based)."""
        up = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        left = self.iterations - step
        down = left / self.cooldown_steps if left < self.cooldown_steps else 1.0
        return self.lr * min(up, down)


class Trainer:
    """Trains ``model`` on ``task`` (see ``tasks.py``) and keeps its EMA.

    ``run()`` continues from the newest checkpoint in ``config.out`` if there is one. Raises
    FloatingPointError after 20 updates in a row with non-finite gradients.
    """

    def __init__(self, model, task, config):
        self.model = model
        self.task = task
        self.config = config
        self.out = Path(config.out)
        self.parameters = dict(model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.schedule_sampler = schedule_samplers.create("uniform", task.diffusion.num_timesteps)
        self.step = 0
        self.seconds = 0.0

    def run(self, progress=True):
        """Train to ``config.iterations``; returns the EMA state_dict."""
        config = self.config
        self.out.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.model.train()
        sums, count, bad_in_a_row = {}, 0, 0
        started = time.monotonic() - self.seconds
        with (
            torch.random.fork_rng(devices=[]),
            tqdm(
                total=config.iterations,
                initial=self.step,
                desc=f"train {self.out.name}",
                unit="step",
                disable=not progress,
                mininterval=5,
            ) as bar,
        ):
            while self.step < config.iterations:
                torch.manual_seed((config.seed << 32) + self.step)
                losses = self._update()
                bad_in_a_row = 0 if losses is not None else bad_in_a_row + 1
                if bad_in_a_row == 20:
                    raise FloatingPointError(
                        f"20 updates in a row up to step {self.step} had non-finite gradients. The "
                        f"last checkpoint in {self.out} is good: continue from it with a lower lr "
                        f"(now {config.lr}) or grad_clip (now {config.grad_clip})."
                    )
                for name, value in (losses or {}).items():
                    sums[name] = sums.get(name, 0.0) + value
                count += losses is not None
                self.step += 1
                self.seconds = time.monotonic() - started
                bar.update()
                if self.step % config.log_interval == 0 or self.step == config.iterations:
                    means = {name: total / max(count, 1) for name, total in sums.items()}
                    bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
                    self._log(means)
                    sums, count = {}, 0
                if self.step % config.save_interval == 0 or self.step == config.iterations:
                    self.save()
        return {**self.model.state_dict(), **self.ema}

    def _update(self):
        """One optimiser step; mean losses by name, or None when gradients were not finite."""
        config = self.config
        lr = config.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        autocast = contextlib.nullcontext()
        if config.precision == "bf16":
            autocast = torch.autocast("cpu", torch.bfloat16)
        batch = self.task.batch(self.step)
        random = StepRandom(config.seed, self.step, batch.first, len(batch))
        with autocast:
            losses = self.task.losses(self.model, batch, random, self.schedule_sampler)
        losses.pop("t")
        weight = losses.pop("weight", torch.ones(len(batch)))
        self.optimizer.zero_grad(set_to_none=True)
        (losses["loss"] * weight).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), config.grad_clip or math.inf
        )
        if not torch.isfinite(norm):
            return None
        self.optimizer.step()
        # The decay is ramped up so that the random start is forgotten.
        decay = min(config.ema_rate, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
        means = {name: float(value.detach().mean()) for name, value in losses.items()}
        return {**means, "grad_norm": float(norm), "lr": lr}

    def save(self):
        """Write checkpoint ``step_<n>`` (aside, then renamed) and drop the oldest ones."""
        target = self.out / f"step_{self.step:07d}"
        aside = self.out / f".{target.name}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": p for name, p in self.ema.items()}
        for index, name in enumerate(self.parameters):
            moments = self.optimizer.state_dict()["state"].get(index, {})
            tensors |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside / "state.safetensors")
        facts = {"step": self.step, "seconds": round(self.seconds, 1)}
        facts["config"] = dataclasses.asdict(self.config)
        (aside / "state.json").write_text(json.dumps(facts, indent=2) + "\n")
        for path in aside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        for old in sorted(self.out.glob("step_*"))[: -self.config.keep]:
            shutil.rmtree(old)

    def _resume(self):
        checkpoints = sorted(self.out.glob("step_*"))
        if not checkpoints:
            return
        facts = json.loads((checkpoints[-1] / "state.json").read_text())
        tensors = load_file(checkpoints[-1] / "state.safetensors")
        state = self.optimizer.state_dict()
        state["state"] = {}
        with torch.no_grad():
            for index, (name, parameter) in enumerate(self.parameters.items()):
                parameter.copy_(tensors[f"model.{name}"])
                self.ema[name].copy_(tensors[f"ema.{name}"])
                state["state"][index] = {
                    key: tensors[f"optimizer.{key}.{name}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.optimizer.load_state_dict(state)
        self.step, self.seconds = facts["step"], facts["seconds"]

    def _log(self, means):
        """Append one row to ``log.csv``."""
        path = self.out / "log.csv"
        row = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {name: f"{value:.6g}" for name, value in means.items()}
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
