"""Ours beside one baseline in this process: what is printed above, timed in turns, and the row."""

from __future__ import annotations

import contextlib
import time

import torch

from adm_rt import __version__, testing
from adm_rt.benchmarking import machine

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


@contextlib.contextmanager
def torch_threads(count):
    """torch and our kernels use ``count`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with testing.cpu_settings(threads=count):
            yield
    finally:
        torch.set_num_threads(before)


def heading(args):
    """One line: the machine, how many threads, which clock and which torch."""
    return (
        f"{machine.processor()}, {machine.isa()}, {args.threads} thread(s), {args.clock} clock, "
        f"torch {torch.__version__}"
    )


def timed_row(name, sizes, functions, error, args, baseline="plain torch", **more):
    """A row of the JSON: ``functions`` {"ours": f, "baseline": g} timed over ``args.rounds``.

    Both have run before, and their results differ by ``error``. more: further keys.
    """
    clock = CLOCKS[args.clock]
    timings = testing.interleaved_timings(functions, args.rounds, clock=clock)
    ours, theirs = timings["ours"], timings["baseline"]
    return {
        "name": name,
        "sizes": sizes,
        "baseline": baseline,
        "device": "cpu",
        "ours_ms": ours.median,
        "baseline_ms": theirs.median,
        "ratio": theirs.median / ours.median,
        "max_error": error,
        "ours_min_ms": ours.minimum,
        "baseline_min_ms": theirs.minimum,
        **more,
        "rounds": args.rounds,
        "processor": machine.processor(),
        "isa": machine.isa(),
        "threads": args.threads,
        "clock": args.clock,
        "torch": torch.__version__,
        "version": __version__,
        "commit": machine.commit(),
    }


def network_line(row):
    """How a row of one whole network is printed."""
    return (
        f"{row['name']} {row['sizes']}: ours {row['ours_ms']:9.1f} ms, {row['baseline']:12s} "
        f"{row['baseline_ms']:9.1f} ms  {row['ratio']:5.2f}x  error {row['max_error']:.1e}"
    )
