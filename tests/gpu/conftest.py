"""The device of the tests here, and that our kernels are what runs on it."""

import sys
from pathlib import Path

import devices
import pytest
import torch

# Checks of csrc/simt are shared with the emulator's tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cpp"))


@pytest.fixture(scope="session")
def device():
    """The torch device to test on."""
    return torch.device(devices.NAME)


@pytest.fixture(scope="session")
def gpu(device):
    """As device, for what the CPU cannot stand in for."""
    if device.type != "cuda":
        pytest.skip("ADM_RT_TEST_DEVICE is not cuda")
    from adm_rt.ops._library import cuda_extension

    cuda_extension()  # an ImportError with its reason, not a skip: the build is part of this
    return device


@pytest.fixture(autouse=True)
def no_reference_on_the_gpu(monkeypatch, request):
    """On the GPU the kernels have to be used: falling back to the reference is an error."""
    if "device" not in request.fixturenames and "gpu" not in request.fixturenames:
        return
    if request.getfixturevalue("device").type != "cuda":
        return
    from adm_rt.ops import reference

    for name in ("ada_group_norm", "qkv_attention", "guided_mean_update"):
        original = getattr(reference, name)

        def guarded(first, *arguments, _original=original, _name=name, **named):
            if first.device.type == "cuda" and first.dtype != torch.float64:
                raise AssertionError(f"{_name} ran the reference on {first.dtype} on the GPU")
            return _original(first, *arguments, **named)

        monkeypatch.setattr(reference, name, guarded)
