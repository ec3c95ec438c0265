"""Where the compilers are, for tests that build C++ and CUDA."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cxx():
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def find_nvcc():
    """Path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = (os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc")
    return next((path for path in candidates if path and Path(path).exists()), None)
