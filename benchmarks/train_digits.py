"""Train on scikit-learn's digits and measure what comes out: ``python benchmarks/train_digits.py``.

Real handwriting, 8x8, 899 training images, two CPU cores, under ten minutes with the measurements:
the samples have to beat a Gaussian fitted to each class (exit code 1 if they do not). Needs the
extra "data".
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

import adm_rt
from adm_rt.benchmarking.machine import commit, processor
from adm_rt.commands.flags import set_threads
from adm_rt.data import digits
from adm_rt.diffusion import Diffusion
from adm_rt.evaluation.digits import DigitScores, compare, markdown_table
from adm_rt.evaluation.nll import bits_per_dim, summary
from adm_rt.models import load_model
from adm_rt.training import train

MODEL = {
    "image_size": 8,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 2,
    "norm_groups": 8,
    "num_head_channels": 32,
    "attention_resolutions": "4",
    "resblock_updown": True,
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "dropout": 0.1,
}
RUN = {
    "batch_size": 64,
    "lr": 1e-3,
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "grad_clip": 1.0,
    "ema_rate": "0.998",
    "device": "cpu",
    "seed": 0,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the run; one in it is continued")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--steps", default="100", help="sampling steps (ddpm)")
    parser.add_argument("--nll-images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    set_threads(args.threads)
    clock = time.process_time()
    start = time.perf_counter()
    run = {**RUN, "cooldown_steps": args.iterations // 2}
    final = train(
        "diffusion",
        "digits:train",
        iterations=args.iterations,
        out=args.out,
        export_dtype="float32",
        sample_interval=0,
        **MODEL,
        **run,
    )
    record = {
        "train_seconds": time.perf_counter() - start,
        "train_cpu_seconds": time.process_time() - clock,
        "iterations": args.iterations,
        "run": run,
        "model": MODEL,
    }
    print(f"trained: {record['train_seconds']:.0f} s, {record['train_cpu_seconds']:.0f} s of CPU")
    pipeline = adm_rt.load(str(final))

    def sample(labels, seed):
        options = {"steps": args.steps, "sampler": "ddpm", "seed": seed, "progress": False}
        return pipeline(len(labels), labels.tolist(), batch_size=64, **options).images

    scores = DigitScores()
    rows = compare(scores, sample, range(args.seeds))
    print(markdown_table(rows))
    network = load_model(final)
    images, labels = (part[: args.nll_images] for part in digits("test"))
    bits = summary(
        bits_per_dim(network, Diffusion.from_config(network.cfg.diffusion_config()), images, labels)
    )
    print(f"bits per dim: {bits['bits_per_dim']:.3f} on {bits['num_images']} test images")
    record |= {
        "seconds": time.perf_counter() - start,
        "rows": rows,
        "sampler": {"name": "ddpm", "steps": args.steps, "seeds": args.seeds},
        "features_accuracy": scores.features_accuracy,
        "judge_accuracy": scores.judge_accuracy,
        "bits_per_dim": {k: v for k, v in bits.items() if not isinstance(v, list)},
        "processor": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": adm_rt.__version__,
        "commit": commit(),
    }
    if args.json:
        aside = Path(f"{args.json}.{os.getpid()}.part")
        aside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(aside, args.json)
    model, gaussian, floor = (rows[name]["fd"] for name in ("model", "gaussian", "held-out"))
    print(
        f"FD-digits {model:.1f}; the Gaussian's is {gaussian:.1f}, other real images' "
        f"{floor:.1f}. {record['seconds']:.0f} s in all"
    )
    return int(model >= gaussian)


if __name__ == "__main__":
    sys.exit(main())
