"""Where these tests run, and what happens where they cannot.

They need a GPU and are skipped with the reason where there is none; ADM_RT_REQUIRE_GPU=1 makes that
a failure (``make gpu`` sets it). ADM_RT_TEST_DEVICE=cpu runs what can be run on the CPU, to try the
tests themselves.
"""

import os

import pytest
import torch

NAME = os.environ.get("ADM_RT_TEST_DEVICE", "cuda")


def require():
    """Skips the module that calls it where there is no device."""
    if NAME == "cuda" and not torch.cuda.is_available():
        unavailable("torch sees no CUDA device", allow_module_level=True)


def unavailable(reason, **options):
    if os.environ.get("ADM_RT_REQUIRE_GPU") == "1":
        raise RuntimeError(f"{reason}, and ADM_RT_REQUIRE_GPU=1")
    pytest.skip(reason, **options)
