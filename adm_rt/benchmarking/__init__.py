"""``adm-rt bench``: time this package against its alternatives on the machine at hand.

Each benchmark is a module with ``rows(args) -> list of dict`` whose keys are at least name, sizes,
device, ours_ms, baseline_ms, ratio (baseline / ours) and max_error, and two functions in
``arguments.py``. Importing this module imports neither torch nor the extension.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from typing import Any, NamedTuple

from adm_rt.benchmarking import arguments


class Benchmark(NamedTuple):
    """Where its ``rows`` are, its line of help, and its arguments."""

    module: str
    help: str
    add_arguments: Any  # (parser) -> None
    check: Any  # (args) -> None, raises ValueError before any work


BENCHMARKS = {
    "ops": Benchmark(
        "adm_rt.benchmarking.ops",
        "the three ops against plain torch",
        arguments.add_ops,
        arguments.check_ops,
    ),
    "sample": Benchmark(
        "adm_rt.benchmarking.sample",
        "networks, guided steps and whole samples against eager PyTorch and other runtimes; on a "
        "GPU whole samples against eager and compiled PyTorch",
        arguments.add_sample,
        arguments.check_sample,
    ),
    "gradient": Benchmark(
        "adm_rt.benchmarking.gradient",
        "the classifier's gradient network against autograd",
        arguments.add_gradient,
        arguments.check_gradient,
    ),
    "export": Benchmark(
        "adm_rt.benchmarking.export",
        "exported graphs in ONNX Runtime against the torch modules, compared and timed",
        arguments.add_export,
        arguments.check_export,
    ),
    "tensorrt": Benchmark(
        "adm_rt.benchmarking.tensorrt",
        "TensorRT engines against the torch engine on a GPU",
        arguments.add_tensorrt,
        arguments.check_tensorrt,
    ),
    "train": Benchmark(
        "adm_rt.benchmarking.train",
        "a training step against the same network on plain torch operations",
        arguments.add_train,
        arguments.check_train,
    ),
}


def add_arguments(parser):
    """The command line of ``adm-rt bench``."""
    parser.description = (
        "Times are medians of rounds in which ours and the others take turns; results are "
        "compared before they are timed. For numbers worth quoting: a quiet machine."
    )
    below = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, benchmark in BENCHMARKS.items():
        benchmark.add_arguments(below.add_parser(name, help=benchmark.help, allow_abbrev=False))


def run(args):
    """Print a table, write the JSON; exit code 0, or 1: no rows, or something of ours failed."""
    benchmark = BENCHMARKS[args.what]
    benchmark.check(args)
    rows = importlib.import_module(benchmark.module).rows(args)
    if rows is None:  # it was only asked to say something
        return 0
    if args.json:
        write(args.json, rows)
        print(f"{len(rows)} rows -> {args.json}")
    failures = getattr(args, "failures", [])
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 0 if rows and not failures else 1


def main(argv=None):
    """``adm-rt bench`` without the rest of ``adm-rt``: argv as after the word "bench"."""
    parser = argparse.ArgumentParser(prog="bench", allow_abbrev=False)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1


def write(path, rows):
    """A JSON list of rows; the file appears whole or not at all."""
    folder = os.path.dirname(os.path.abspath(path))
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
        json.dump(rows, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
