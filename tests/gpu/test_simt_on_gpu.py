"""What csrc/simt promises, on the GPU: the very checks that its emulator passes."""

import ctypes
import subprocess

import devices
import numpy as np
import pytest
import test_emulator as checks
import torch
from compilers import ROOT, find_nvcc

devices.require()

SCHEDULE = 0  # means nothing here


@pytest.fixture(scope="module")
def probe(gpu, tmp_path_factory):
    """probe(function, arguments...): arrays go to the device and come back."""
    nvcc = find_nvcc()
    assert nvcc is not None, "no nvcc: set CUDACXX or CUDA_HOME, or put it on PATH"
    output = tmp_path_factory.mktemp("simt") / "simt_probe.so"
    major, minor = torch.cuda.get_device_capability()
    command = [nvcc, "-x", "cu", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared"]
    command += ["-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}", "-o", str(output)]
    subprocess.run([*command, str(ROOT / "tests" / "cpp" / "simt_probe.cpp")], check=True)
    library = ctypes.CDLL(str(output))
    library.error_text.restype = ctypes.c_char_p

    def call(name, *arguments):
        copies, converted = [], []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                words = np.ascontiguousarray(argument).reshape(-1).view(np.uint8)
                copies.append((argument, torch.from_numpy(words.copy()).cuda()))
                converted.append(ctypes.c_void_p(copies[-1][1].data_ptr()))
            else:
                converted.append(argument)
        assert getattr(library, f"run_{name}")(*converted) == 0, library.error_text().decode()
        torch.cuda.synchronize()
        for array, tensor in copies:
            array[...] = tensor.cpu().numpy().view(array.dtype).reshape(array.shape)

    return call


def test_collectives(probe):
    checks.test_collectives(probe, SCHEDULE)


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float16"])
def test_mma_lane_maps(probe, kind):
    checks.test_mma_lane_maps(probe, kind)


def test_ldmatrix_lane_maps(probe):
    checks.test_ldmatrix_lane_maps(probe)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_product_by_copies_ldmatrix_and_mma(probe, kind):
    checks.test_product_by_copies_ldmatrix_and_mma(probe, kind, SCHEDULE)


def test_memory(probe):
    checks.test_memory(probe)


def test_the_last_block_sees_all_others(probe):
    checks.test_the_last_block_sees_all_others_in_any_order(probe, SCHEDULE)


def test_barriers_of_groups(probe):
    checks.test_barriers_of_groups(probe, SCHEDULE)


def test_conversions(probe):
    checks.test_conversions_round_as_numpy_does(probe)


def test_approximations(probe):
    checks.test_approximations(probe)
