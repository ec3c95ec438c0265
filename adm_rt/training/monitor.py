"""What is seen of a training run: progress bar, log.csv and log.jsonl, TensorBoard, a loss plot.

The trainer calls ``start``, then ``record`` after every update, ``evaluate`` and ``checkpointed``
now and then, and ``close``; on rank 0 only. Nothing here touches the run: no global random state is
used, and a run without a monitor gives the same weights.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import sys
import time
from pathlib import Path

_ESTIMATE_AFTER = 6  # updates, the first not counted: it is slower than the rest
_LAST = ("lr", "loss_scale", "skipped")  # the newest value says more than a mean
_QUARTILES = range(4)


class Monitor:
    """Follows one run in the folder ``out``.

    config: has ``iterations``, ``batch_size`` and ``log_interval``. num_timesteps: of the process,
    for the loss by quartile of t (None: without). evaluations: each is called as
    ``evaluation(step, network)`` with the EMA network in eval mode and returns a dict of numbers
    (``adm_rt.training.evaluations``); they go to log.jsonl, evaluation.csv and TensorBoard.
    progress: the bar. tensorboard: False never writes for it; None does when it is installed.
    """

    def __init__(
        self,
        out,
        config,
        num_timesteps=None,
        *,
        progress=True,
        evaluations=(),
        tensorboard=None,
    ):
        self.out = Path(out)
        self.config = config
        self.num_timesteps = num_timesteps
        self.evaluations = list(evaluations)
        self.progress = progress
        self._tensorboard = tensorboard
        self._writer = self._bar = None
        self._log = _Table(self.out / "log.csv")
        self._evaluation_log = _Table(self.out / "evaluation.csv")
        self._jsonl = self.out / "log.jsonl"
        self._clear()

    def start(self, step, seconds=0.0):
        """Begin, or continue after ``step`` updates that took ``seconds``.

        Rows beyond ``step`` are dropped: a run that was killed wrote them after its checkpoint.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._log.keep_until(step)
        self._evaluation_log.keep_until(step)
        if self._jsonl.exists():
            rows = [line for line in self._jsonl.read_text().splitlines() if _within(line, step)]
            write_aside(self._jsonl, "".join(f"{line}\n" for line in rows).encode())
        self._writer = self._open_tensorboard(step)
        self._bar = self._open_bar(step)
        self._started = time.monotonic() - seconds
        self._row_time, self._row_step, self._paused = time.monotonic(), step, 0.0
        self._first = (step + 1, None)

    def record(self, step, per_image, scalars=None):
        """Note one update; ``step`` is the number of updates done.

        per_image: name -> [N] tensor of the batch's values, with "t" int64 [N] when losses are to
        be split by quartile of t; empty for an update that was skipped. scalars: name -> number.
        """
        if per_image:
            self._batches.append({name: v.detach() for name, v in per_image.items()})
        for name, value in (scalars or {}).items():
            self._scalars.setdefault(name, []).append(float(value))
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        self._estimate(step)
        if step % self.config.log_interval == 0 or step == self.config.iterations:
            self._write_row(step)

    def evaluate(self, step, network):
        """Run the evaluations on ``network`` (eval mode); returns their numbers, already logged."""
        before = time.monotonic()
        row = {}
        for evaluation in self.evaluations:
            row |= evaluation(step, network)
        if row:
            self._emit(self._evaluation_log, {"step": step, **row})
            self.say(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
        self._paused += time.monotonic() - before
        return row

    def checkpointed(self, step, path):
        """Say that the state of ``step`` is safe in ``path``."""
        if self._bar is not None:
            self._bar.set_description_str(f"train {self.out.name}, saved {step}", refresh=False)

    def say(self, text):
        """One line above the bar; nothing when there is no progress to see."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def close(self, plot=True):
        """End the bar and TensorBoard's file; plot: draw ``loss.png`` (needs matplotlib)."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if plot and self._log.path.exists() and importlib.util.find_spec("matplotlib") is not None:
            plot_losses(self._log.path, self.out / "loss.png")

    def _estimate(self, step):
        """After a few updates say how long the rest will take."""
        first, then = self._first
        if step == first:
            self._first = (step, time.monotonic())
        elif step == first + _ESTIMATE_AFTER - 1 and step < self.config.iterations:
            each = (time.monotonic() - then) / (step - first)
            left = self.config.iterations - step
            self.say(f"time: {duration(each * left)} for {left:,} updates of {each:.3g} s")

    def _clear(self):
        self._batches, self._scalars = [], {}

    def _write_row(self, step):
        now = time.monotonic()
        busy = now - self._row_time - self._paused
        images = (step - self._row_step) * self.config.batch_size
        row = {
            "step": step,
            "seconds": round(now - self._started, 1),
            "images_per_second": images / max(busy, 1e-9),
            **self._means(),
        }
        for name, values in self._scalars.items():
            finite = [v for v in values if math.isfinite(v)] or [math.nan]
            row[name] = values[-1] if name in _LAST else sum(finite) / len(finite)
        self._row_time, self._row_step, self._paused = now, step, 0.0
        self._clear()
        self._emit(self._log, row)
        if self._bar is not None:
            shown = {k: f"{row[k]:.4f}" for k in ("loss", "mse", "top1") if k in row}
            shown["img/s"] = f"{row['images_per_second']:.1f}"
            self._bar.set_postfix(shown, refresh=False)

    def _means(self):
        """Mean of every per-image value, then by quartile of t; None where no image was."""
        import torch

        if not self._batches:
            return {}
        names = [name for name in self._batches[0] if name != "t"]
        values = {n: torch.cat([b[n] for b in self._batches]).double().cpu() for n in names}
        row = {name: value.mean().item() for name, value in values.items()}
        if self.num_timesteps and "t" in self._batches[0]:
            t = torch.cat([b["t"] for b in self._batches]).cpu()
            quartile = t * 4 // self.num_timesteps
            for name, value in values.items():
                for q in _QUARTILES:
                    inside = value[quartile == q]
                    row[f"{name}_q{q}"] = inside.mean().item() if len(inside) else None
        return row

    def _emit(self, table, row):
        table.append(row)
        with open(self._jsonl, "a") as file:
            file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and _plain(value) is not None:
                    self._writer.add_scalar(name, value, row["step"])

    def _open_bar(self, step):
        if not self.progress:
            return None
        from tqdm import tqdm

        return tqdm(
            total=self.config.iterations,
            initial=step,
            desc=f"train {self.out.name}",
            unit="step",
            mininterval=1 if sys.stderr.isatty() else 30,  # a log file needs no animation
        )

    def _open_tensorboard(self, step):
        if self._tensorboard is False or importlib.util.find_spec("tensorboard") is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)


class _Table:
    """A CSV file that grows by rows, and by columns when a row has more than those before it."""

    def __init__(self, path):
        self.path = path
        self.columns = None

    def keep_until(self, step):
        """Drop the rows whose step is beyond ``step``."""
        if not self.path.exists():
            return
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if (row.get("step") or "").isdigit()]
            self.columns = list(reader.fieldnames or [])
        if not self.columns:
            self.columns = None
            self.path.unlink()
            return
        self._rewrite(row for row in rows if int(row["step"]) <= step)

    def append(self, row):
        new = self.columns is None
        if new:
            self.columns = list(row)
        elif not row.keys() <= set(self.columns):  # the first updates were skipped, say
            with open(self.path, newline="") as file:
                rows = list(csv.DictReader(file))
            self.columns = [*row, *(name for name in self.columns if name not in row)]
            self._rewrite(rows)
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow({k: _cell(v) for k, v in row.items()})

    def _rewrite(self, rows):
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_aside(self.path, text.getvalue().encode())


def plot_losses(log, path):
    """Draw the losses of a ``log.csv`` over the updates, all and by quartile of t, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    columns = {name: [_number(row[name]) for row in rows] for name in rows[0]}
    split = next((n for n in ("mse", "loss") if f"{n}_q0" in columns), None)
    panels = [[n for n in ("loss", "mse", "vb", "top1", "top5") if n in columns]]
    if split:
        panels.append([f"{split}_q{q}" for q in _QUARTILES])
    panels.append([n for n in ("grad_norm",) if n in columns])
    panels = [names for names in panels if names]
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for names, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        for name in names:
            axes.plot(columns["step"], columns[name], label=name, linewidth=1.2, marker=".")
        values = [v for name in names for v in columns[name] if math.isfinite(v)]
        if values and min(values) > 0:
            axes.set_yscale("log")
        axes.set_xlabel("update")
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_aside(path, buffer.getvalue())


def duration(seconds):
    """ "about 40 s", "about 12 min", "about 3.5 h"."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def write_aside(path, data):
    """Write ``data`` (bytes) so that ``path`` holds all of it or what it held before."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _within(line, step):
    """Whether a line of log.jsonl is whole and not beyond ``step``."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _number(text):
    return float(text) if text else math.nan


def _plain(value):
    """The value as JSON has it: no NaN, no infinity."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _cell(value):
    value = _plain(value)
    return "" if value is None else value
