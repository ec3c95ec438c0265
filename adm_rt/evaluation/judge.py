"""The judge: a small plain convolutional classifier of clean glyphs, independent of every model.

It shares nothing with what it judges: convolution, batch norm and ReLU instead of ADM's blocks,
clean images instead of noised ones, its own data seed. It is trained when it is needed (about a
minute and a half on one core) and is not shipped; it is kept only where the caller says.

    python -m adm_rt.evaluation.judge [--cache judge.safetensors] [--steps N] [--seed S]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adm_rt.data import GLYPH_CLASSES, glyphs
from adm_rt.errors import CheckpointError

JUDGE_SEED = 9001  # the judge's training stream; the guide and the model train on other seeds
HELD_OUT_SEED = 9002  # images nobody trains on
DEFAULT_STEPS = 800
_FEATURES = 64


class Judge(nn.Module):
    """Plain conv-BN-ReLU classifier of RGB images of one size (a multiple of 8).

    forward(x [N, 3, H, W] float32 in [-1, 1]) -> logits [N, 36]; `features(x)` -> [N, 64], the
    layer below, in which the distribution metrics are measured.
    """

    def __init__(self, image_size: int = 32, width: int = 24):
        super().__init__()
        if image_size < 16 or image_size % 8:
            raise ValueError(f"image_size={image_size!r}: a multiple of 8, at least 16, is allowed")
        self.image_size = image_size
        self.width = width
        self.training_arguments: dict = {}  # what train_judge was told; kept in the file
        self.trunk = nn.Sequential(
            *_conv(3, width, 5, 2),
            *_conv(width, 2 * width, 3, 1),
            *_conv(2 * width, 3 * width, 3, 2),
            *_conv(3 * width, 4 * width, 3, 2),
            nn.Flatten(),
            nn.Linear(4 * width * (image_size // 8) ** 2, _FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(_FEATURES, len(GLYPH_CLASSES))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))

    @torch.no_grad()
    def examine(self, images, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """images uint8 [N, H, W, 3] -> (predicted classes int64 [N], features float32 [N, 64])."""
        images = np.asarray(images)
        size = self.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images must be uint8 [N, {size}, {size}, 3] for this judge, "
                f"got {images.dtype} {list(images.shape)}"
            )
        self.eval()
        classes = np.empty(len(images), np.int64)
        features = np.empty((len(images), _FEATURES), np.float32)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            found = self.features(_to_tensor(images[rows]))
            features[rows] = found.numpy()
            classes[rows] = self.head(found).argmax(1).numpy()
        return classes, features


def train_judge(
    seed: int = JUDGE_SEED,
    steps: int = DEFAULT_STEPS,
    image_size: int = 32,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    width: int = 24,
    progress: bool = False,
) -> Judge:
    """Trains a judge on `steps * batch_size` fresh glyphs of stream `seed` (AdamW, one cycle).

    A pure function of its arguments on one machine; torch's global random state is left alone.
    """
    if steps < 1 or batch_size < 2:
        raise ValueError(f"steps={steps} must be at least 1 and batch_size={batch_size} at least 2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(image_size, width).to(memory_format=torch.channels_last)
    judge.train()
    optimiser = torch.optim.AdamW(judge.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps + 1, pct_start=0.15, cycle_momentum=False
    )
    for step in _steps(steps, progress):
        images, labels = glyphs(batch_size, image_size, seed=seed, first=step * batch_size)
        loss = nn.functional.cross_entropy(judge(_to_tensor(images)), torch.from_numpy(labels))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    judge.training_arguments = {
        "seed": seed,
        "steps": steps,
        "image_size": image_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "width": width,
    }
    return judge.eval()


def held_out_report(judge: Judge, num_images: int = 5000, seed: int = HELD_OUT_SEED) -> dict:
    """Accuracy on held-out clean glyphs and the 10 commonest confusions ("shown>called": count)."""
    images, labels = glyphs(num_images, judge.image_size, seed=seed)
    called, _ = judge.examine(images)
    wrong = np.flatnonzero(called != labels)
    pairs, counts = np.unique(labels[wrong] * 64 + called[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:10]
    return {
        "accuracy": float(np.mean(called == labels)),
        "num_images": num_images,
        "seed": seed,
        "training": judge.training_arguments,
        "confusions": {
            f"{GLYPH_CLASSES[pairs[k] // 64]}>{GLYPH_CLASSES[pairs[k] % 64]}": int(counts[k])
            for k in order
        },
    }


def save_judge(judge: Judge, path) -> None:
    """Writes the judge to `path` (.safetensors), aside first and then renamed."""
    from safetensors.torch import save_file

    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    shape = {"image_size": judge.image_size, "width": judge.width}
    header = {"judge": json.dumps(shape), "training": json.dumps(judge.training_arguments)}
    try:
        save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, aside, header)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_judge(path) -> Judge:
    """Reads what `save_judge` wrote. CheckpointError when it is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        judge = Judge(**json.loads(header["judge"]))
        judge.training_arguments = json.loads(header["training"])
        judge.load_state_dict(weights)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a judge: {error}. Delete it to train one again."
        ) from error
    return judge.to(memory_format=torch.channels_last).eval()


def cached_judge(cache=None, progress: bool = False, **training) -> Judge:
    """The judge in the file `cache`, trained with `training` (see train_judge) when not there.

    ValueError when the file holds a judge that was trained with other arguments than those given.
    """
    if cache is None or not Path(cache).exists():
        judge = train_judge(progress=progress, **training)
        if cache is not None:
            save_judge(judge, cache)
        return judge
    judge = load_judge(cache)
    for name, value in training.items():
        kept = judge.training_arguments.get(name)
        if kept != value:
            raise ValueError(
                f"the judge in {cache} was trained with {name}={kept}, not {value}: give another "
                "file, or delete this one to train again"
            )
    return judge


def _conv(inputs: int, outputs: int, kernel: int, stride: int):
    yield nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU()


def _to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _steps(steps: int, progress: bool):
    if not progress:
        return range(steps)
    from tqdm import tqdm

    return tqdm(range(steps), desc="judge", unit="step")


def print_report(report: dict) -> None:
    confusions = ", ".join(f"{pair} {count}" for pair, count in report["confusions"].items())
    print(
        f"judge: accuracy {report['accuracy']:.4f} on {report['num_images']} held-out glyphs "
        f"(seed {report['seed']}); shown>called: {confusions or 'none'}"
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m adm_rt.evaluation.judge", description=__doc__)
    parser.add_argument("--cache", help="a .safetensors file to keep the judge in")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--seed", type=int, default=JUDGE_SEED)
    args = parser.parse_args(argv)
    training = {"seed": args.seed, "steps": args.steps, "image_size": args.image_size}
    try:
        judge = cached_judge(args.cache, progress=True, **training)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")
    print_report(held_out_report(judge))


if __name__ == "__main__":
    main()
