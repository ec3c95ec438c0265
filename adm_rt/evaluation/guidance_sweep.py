"""The guidance sweep: what a larger guidance scale buys in fidelity and costs in diversity.

For each scale the same labels and the same noise are sampled, an independent judge (judge.py)
classifies the images, and their judge features are compared with held-out glyphs: class accuracy
and precision should rise with the scale, recall and coverage should fall (Dhariwal & Nichol 2021,
figure 4). Recall rises instead where guidance takes images away from the data; coverage does not.

    python -m adm_rt.evaluation.guidance_sweep --model glyphs32 --scales 0,0.5,1,2,5 \
        --num-images 500 --steps 25 --seed 0 --json sweep.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from adm_rt.data import GLYPH_CLASSES, glyphs
from adm_rt.evaluation.metrics import class_accuracy, coverage, frechet_distance, precision_recall

DEFAULT_HELD_OUT = 2000
_MIN_IMAGES = 6  # coverage looks at the 5 nearest of the others


def balanced_labels(num_images: int) -> np.ndarray:
    """int64 [N]: 0, 1, ..., 35, 0, 1, ..."""
    return np.arange(num_images, dtype=np.int64) % len(GLYPH_CLASSES)


def measure(judge, images, labels, reference_features) -> dict:
    """images uint8 [N, H, W, 3], labels [N], reference features [M, D] -> the five numbers."""
    called, features = judge.examine(images)
    precision, recall = precision_recall(reference_features, features)
    return {
        "accuracy": class_accuracy(called, labels),
        "frechet_distance": frechet_distance(features, reference_features),
        "precision": precision,
        "recall": recall,
        "coverage": coverage(reference_features, features),
    }


def guidance_sweep(
    source: Mapping | Callable,
    scales=None,
    labels=None,
    *,
    judge=None,
    held_out: int = DEFAULT_HELD_OUT,
    held_out_seed: int | None = None,
) -> list[dict]:
    """Measures one set of images per guidance scale against `held_out` real glyphs.

    source: a mapping {scale: (images uint8 [N, H, W, 3], labels [N])}, or a function
      (scale, labels) -> images that is called with `labels` [N] for each of `scales`; it should use
      the same noise every time.
    judge: a trained `Judge` for the images' size; None trains one (about a minute).

    Returns one row per scale, in order, and last the floor: real glyphs of yet another seed with
    the same labels, row["guidance_scale"] None. Rows hold guidance_scale, accuracy,
    frechet_distance, precision, recall, coverage and num_images.
    """
    from adm_rt.evaluation.judge import HELD_OUT_SEED, train_judge

    sets = _collect(source, scales, labels)
    held_out_seed = HELD_OUT_SEED if held_out_seed is None else held_out_seed
    size = next(iter(sets.values()))[0].shape[1]
    judge = train_judge(image_size=size) if judge is None else judge
    real, _ = glyphs(held_out, size, held_out_seed, labels=balanced_labels(held_out))
    _, reference = judge.examine(real)
    rows = []
    for scale, (images, set_labels) in sets.items():
        row = {"guidance_scale": scale, "num_images": len(images)}
        rows.append({**row, **measure(judge, images, set_labels, reference)})
    labels = next(iter(sets.values()))[1]
    images, _ = glyphs(len(labels), size, held_out_seed + 1, labels=labels)
    row = {"guidance_scale": None, "num_images": len(images)}
    rows.append({**row, **measure(judge, images, labels, reference)})
    return rows


def markdown_table(rows: list[dict]) -> str:
    """The rows of guidance_sweep as a table.

    FD-glyphs is measured in the judge's features: comparable within one sweep, never with an FID.
    """
    lines = [
        "| guidance scale | class accuracy | FD-glyphs | precision | recall | coverage |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        scale = row["guidance_scale"]
        name = "real glyphs (floor)" if scale is None else f"{scale:g}"
        lines.append(
            f"| {name} | {row['accuracy']:.1%} | {row['frechet_distance']:.2f} "
            f"| {row['precision']:.3f} | {row['recall']:.3f} "
            f"| {row['coverage']:.3f} |"
        )
    return "\n".join(lines)


def _collect(source, scales, labels) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    if isinstance(source, Mapping):
        if scales is not None or labels is not None:
            raise ValueError("scales and labels come with the sets of images; leave them out")
        sets = dict(source)
    elif callable(source):
        if scales is None or labels is None:
            raise ValueError("a sampling function needs both scales and labels")
        labels = np.asarray(labels)
        sets = {scale: (source(scale, labels), labels) for scale in check_scales(scales)}
    else:
        raise TypeError(f"source must be a mapping or a function, got {type(source).__name__}")
    if not sets:
        raise ValueError("there is no guidance scale to measure")
    shape = None
    for scale, (images, set_labels) in sets.items():
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(set_labels):
            raise ValueError(
                f"guidance scale {scale}: images must be uint8 [N, H, W, 3] with N labels, got "
                f"{images.dtype} {list(images.shape)} and {len(set_labels)} labels"
            )
        shape = images.shape if shape is None else shape
        if images.shape != shape:  # the metrics depend on N: rows of other sizes mislead
            raise ValueError(
                f"guidance scale {scale}: all sets must have one shape, got {list(images.shape)} "
                f"after {list(shape)}"
            )
    return sets


def check_scales(scales) -> list[float]:
    """A list of distinct finite numbers, or "0,0.5,1"."""
    parts = scales.split(",") if isinstance(scales, str) else list(scales)
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
        raise ValueError(f"scales={scales!r} must be distinct finite numbers, such as 0,0.5,1,2,5")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adm_rt.evaluation.guidance_sweep",
        description="Class accuracy, Frechet distance, precision, recall and coverage by scale.",
    )
    parser.add_argument("--model", default="glyphs32", help="a 36-class model of glyphs")
    parser.add_argument("--classifier", help="the guide (default: the one that comes with it)")
    parser.add_argument("--scales", default="0,0.5,1,2,5")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--steps", default="25")
    parser.add_argument("--sampler", default="auto", help="auto: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the same at each scale")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--held-out", type=int, default=DEFAULT_HELD_OUT, metavar="N")
    parser.add_argument("--judge", metavar="FILE", help="keep the judge here (.safetensors)")
    parser.add_argument("--judge-steps", type=int, help="training steps of the judge")
    parser.add_argument("--json", metavar="FILE", help="write the rows and the set-up here too")
    return parser


def main(argv=None) -> list[dict]:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        scales = check_scales(args.scales)
        for name, low in (("num_images", _MIN_IMAGES), ("held_out", _MIN_IMAGES)):
            if getattr(args, name) < low:
                raise ValueError(f"{name}={getattr(args, name)} must be at least {low}")
        for name in ("json", "judge"):  # before the work, not after it
            _check_folder(name, getattr(args, name))
        return _run(args, scales)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")


def _run(args, scales) -> list[dict]:
    import adm_rt
    from adm_rt.evaluation import judge as judging

    labels = balanced_labels(args.num_images)
    optional = {"classifier": args.classifier, "batch_size": args.batch_size}
    seconds, samplers = {}, set()

    def sample(scale, classes):
        start = time.perf_counter()
        result = adm_rt.sample(
            args.model,
            num_images=len(classes),
            classes=classes.tolist(),
            steps=int(args.steps) if args.steps.isdigit() else args.steps,
            sampler=args.sampler,
            guidance_scale=scale,
            seed=args.seed,
            **{name: value for name, value in optional.items() if value is not None},
        )
        seconds[scale] = round(time.perf_counter() - start, 2)
        samplers.add(result.metadata["sampler"])
        return result.images

    sets = _collect(sample, scales, labels)
    (args.sampler,) = samplers  # what "auto" stood for
    training = {"image_size": next(iter(sets.values()))[0].shape[1]}
    if args.judge_steps is not None:
        training["steps"] = args.judge_steps
    judge = judging.cached_judge(args.judge, progress=True, **training)
    report = judging.held_out_report(judge)
    judging.print_report(report)
    rows = guidance_sweep(sets, judge=judge, held_out=args.held_out)
    for row in rows:
        row["seconds"] = seconds.get(row["guidance_scale"])
    print(
        f"\n{args.model}: {args.num_images} images per scale, {args.sampler}, {args.steps} steps, "
        f"seed {args.seed}; {args.held_out} held-out glyphs (seed {judging.HELD_OUT_SEED}); k=3\n"
    )
    print(markdown_table(rows))
    if args.json:
        setup = {k: v for k, v in vars(args).items() if k not in ("json", "scales")}
        record = {**setup, "held_out_seed": judging.HELD_OUT_SEED, "judge": report, "rows": rows}
        _write_json(Path(args.json), record)
    return rows


def _check_folder(name: str, path: str | None) -> None:
    folder = Path(path).absolute().parent if path else None
    if folder and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{name}={path!r}: the folder {folder} is not there or cannot be written")


def _write_json(path: Path, record: dict) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
