"""What a result is worth nothing without: processor, instruction set, versions, commit.

Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from adm_rt import __version__
from adm_rt._build_info import build_info

_PACKAGES = ("torch", "numpy", "onnxruntime", "openvino")


@functools.cache
def processor():
    """Name of the processor: "AMD EPYC 9654 96-Core Processor"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def isa():
    """The instruction set that our kernels use now: "portable", "avx2" or "avx512"."""
    from adm_rt.ops._library import extension

    return extension().cpu_isa()


def versions():
    """Installed versions of this package and of what it is compared with."""
    found = {"adm_rt": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit():
    """The source tree's commit ("-dirty": with changes), else that of the build, or None."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return build_info().get("git")


def free_cores():
    """Numbers of the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
