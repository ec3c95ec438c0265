"""``adm-rt bench``: time this package against plain torch on the machine at hand.

Each benchmark is a module with ``rows(args) -> list of dict`` whose keys are at least name, sizes,
device, ours_ms, baseline_ms, ratio (baseline / ours) and max_error. Importing this module imports
neither torch nor the extension.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile

BENCHMARKS = {"ops": "adm_rt.benchmarking.ops"}


def add_arguments(parser):
    """The command line of ``adm-rt bench``."""
    parser.description = (
        "Times are medians of rounds in which ours and the baseline take turns; results are "
        "compared before they are timed. For numbers worth quoting: a quiet machine, one core "
        "(taskset -c 0), OMP_NUM_THREADS=1."
    )
    parser.add_argument("what", choices=sorted(BENCHMARKS), help="which benchmark")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT")
    parser.add_argument("--batch", default="1,4", metavar="N,N", help="batch sizes (default: 1,4)")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="for torch and us (default: 1)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the processor time of the one thread, for a machine that others use too",
    )


def run(args):
    """Print a table, write the JSON; exit code 0."""
    _check(args)
    rows = importlib.import_module(BENCHMARKS[args.what]).rows(args)
    if args.json:
        _write(args.json, rows)
        print(f"{len(rows)} rows -> {args.json}")
    return 0 if rows else 1


def main(argv=None):
    """``adm-rt bench`` without the rest of ``adm-rt``: argv as after the word "bench"."""
    parser = argparse.ArgumentParser(prog="bench", allow_abbrev=False)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError, ImportError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1


def _check(args):
    try:
        args.batches = [int(part) for part in str(args.batch).split(",")]
    except ValueError:
        args.batches = []
    if not args.batches or min(args.batches) < 1:
        raise ValueError(f"--batch {args.batch}: give whole numbers from 1, such as 1,4")
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: give at least 1")
    if args.threads < 1:
        raise ValueError(f"--threads {args.threads}: give at least 1")
    if args.clock == "cpu" and args.threads > 1:
        raise ValueError("--clock cpu sees one thread only; use --threads 1 or --clock wall")
    if args.json:  # before minutes of work, not after
        folder = os.path.dirname(os.path.abspath(args.json))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ValueError(f"--json {args.json}: cannot write into the folder {folder}")


def _write(path, rows):
    """A JSON list of rows; the file appears whole or not at all."""
    folder = os.path.dirname(os.path.abspath(path))
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
        json.dump(rows, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
