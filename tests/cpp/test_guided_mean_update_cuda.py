"""The CUDA source of guided_mean_update where there is no GPU: its kernels under the emulator, bit
for bit against the CPU build, and nvcc's report on registers and spills."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from adm_rt.ops._library import extension, extension_available
from adm_rt.ops.guided_mean_update import CLIPS, StepCoefficients

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
ROW = StepCoefficients(
    cfg=1.5, x0_x=1.3, x0_out=-0.9, guide_x0=0.2, guide_mean=1.5, next_x=0.3, next_x0=0.6,
    next_h0=0.1, next_h1=-0.2, next_h2=0.3, state_x=0.1, state_x0=0.2, state_h0=0.5,
    min_log=-5.0, max_log=-3.0, noise=0.7,
)  # fmt: skip


@pytest.fixture(scope="module")
def emulated(compile_emulated):
    return compile_emulated("guided_mean_update_emulated.cpp")


class Case:
    """Inputs of one call, from a seed, and the outputs of both implementations."""

    def __init__(self, seed, n, c, pixels, *, noise="seeds", bf16=False, full=True):
        rng = np.random.default_rng(seed)
        self.shape = (n, c, pixels, 2 * c, 2 * c if full else 0)
        self.dtypes = (int(bf16), int(bf16))

        def normal(*size, half=False):
            values = rng.standard_normal(size, dtype=np.float32)
            return (values.view(np.uint32) >> 16).astype(np.uint16) if half else values

        self.arrays = [
            normal(n, c, pixels),
            normal(n, 2 * c, pixels, half=bf16),
            normal(n, 2 * c, pixels, half=bf16) if full else None,
            normal(n, c, pixels, half=bf16) if full else None,
            *[normal(n, c, pixels) if full else None for _ in range(3)],
            normal(n, c, pixels) if noise == "tensor" else None,
            rng.integers(0, 2**62, n) if noise == "seeds" else None,
        ]
        self.full = full

    def _addresses(self):
        inputs = tuple(0 if a is None else a.ctypes.data for a in self.arrays)
        results = [
            np.full(self.shape[:3], np.nan, np.float32) for _ in range(3 if self.full else 2)
        ]
        outputs = tuple(a.ctypes.data for a in results) + (() if self.full else (0,))
        return inputs, outputs, results

    def cpu(self, row, step, clip, quantile):
        inputs, outputs, results = self._addresses()
        extension().guided_mean_update(
            row, self.shape, inputs, outputs, self.dtypes, step, True, CLIPS.index(clip), quantile
        )
        return results

    def emulate(self, library, row, step, clip, quantile, *, schedule=0, vector=-1, table=False):
        inputs, outputs, results = self._addresses()
        n = self.shape[0]
        limits = np.full(n, np.nan, np.float32)
        floats = np.array(row, np.float32)
        rows = np.zeros((step + 1, 18), np.float32)
        rows[step] = floats
        counter = np.array([step], np.uint32)
        used = ctypes.c_int(-1)
        if table:  # then neither the row nor the step of the arguments may matter
            floats = np.full(18, np.nan, np.float32)

        def pointer(array):
            return ctypes.c_void_p(array.ctypes.data)

        failed = library.run_update(
            pointer(floats),
            pointer(np.array(self.shape, np.int64)),
            pointer(np.array(inputs, np.uint64)),
            pointer(np.array(outputs, np.uint64)),
            pointer(np.array(self.dtypes, np.int32)),
            ctypes.c_uint32(0 if table else step),
            1,
            CLIPS.index(clip),
            ctypes.c_double(quantile),
            pointer(rows) if table else None,
            pointer(counter) if table else None,
            pointer(limits),
            2,
            schedule,
            vector,
            ctypes.byref(used),
        )
        assert not failed, library.error_text().decode()
        return results, bool(used.value)


def assert_equal_bits(got, expected):
    for name, a, b in zip(("x_next", "x0", "state"), got, expected):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("pixels", [64, 1, 7, 49, 1024])
def test_kernels_give_the_bits_of_the_cpu(emulated, clip, pixels):
    for noise in ("seeds", "tensor"):
        case = Case(pixels, 2, 3, pixels, noise=noise)
        got, vector = case.emulate(emulated, ROW, 5, clip, 0.7)
        assert vector == (3 * pixels % 4 == 0)
        assert_equal_bits(got, case.cpu(ROW, 5, clip, 0.7))


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("quantile", [0.001, 0.5, 0.995, 1.0])
def test_selection_in_any_order_of_threads(emulated, schedule, quantile):
    case = Case(17, 1, 3, 700)
    got, _ = case.emulate(emulated, ROW, 1, "dynamic", quantile, schedule=schedule)
    assert_equal_bits(got, case.cpu(ROW, 1, "dynamic", quantile))


def test_selection_among_equal_values(emulated):
    case = Case(3, 2, 1, 400, full=False)
    case.arrays[0][:] = np.round(case.arrays[0])  # few distinct values
    case.arrays[1][:] = 0
    row = StepCoefficients(x0_x=2.0, next_x0=1.0)
    for quantile in (0.3, 0.8, 0.99, 1.0):
        got, _ = case.emulate(emulated, row, 0, "dynamic", quantile)
        assert_equal_bits(got, case.cpu(row, 0, "dynamic", quantile))


def test_forms(emulated):
    """Narrow accesses, bfloat16 inputs, the device table, and a call with nothing optional."""
    case = Case(5, 2, 3, 64)
    expected = case.cpu(ROW, 9, "static", 0.9)
    assert_equal_bits(case.emulate(emulated, ROW, 9, "static", 0.9, vector=0)[0], expected)
    assert_equal_bits(case.emulate(emulated, ROW, 9, "static", 0.9, table=True)[0], expected)
    for pixels in (64, 31):
        case = Case(6, 2, 3, pixels, bf16=True)
        got, _ = case.emulate(emulated, ROW, 2, "static", 0.9)
        assert_equal_bits(got, case.cpu(ROW, 2, "static", 0.9))
        case = Case(7, 1, 4, pixels, noise=None, full=False)
        row = StepCoefficients(x0_x=1.5, x0_out=-0.5, next_x=0.5, next_x0=0.5)
        got, _ = case.emulate(emulated, row, 0, "static", 0.9)
        assert_equal_bits(got, case.cpu(row, 0, "static", 0.9))


def test_unaligned_tensors_take_the_narrow_kernel(emulated):
    case = Case(8, 1, 3, 64)
    buffer = np.empty(3 * 64 + 1, np.float32)
    start = 0 if buffer.ctypes.data % 16 else 1  # four bytes off, whichever way the buffer lies
    case.arrays[3] = buffer[start : start + 3 * 64].reshape(1, 3, 64)
    case.arrays[3][:] = 0.25
    got, vector = case.emulate(emulated, ROW, 2, "static", 0.9)
    assert not vector
    assert_equal_bits(got, case.cpu(ROW, 2, "static", 0.9))
    with pytest.raises(AssertionError, match="not aligned"):  # the ring sees a bad kernel
        case.emulate(emulated, ROW, 2, "static", 0.9, vector=1)


def find_nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = (os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc")
    return next((path for path in candidates if path and Path(path).exists()), None)


def test_nvcc_report(tmp_path):
    """No spill, no stack, and registers for at least four blocks of 256 threads on an SM."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: set CUDACXX or CUDA_HOME, or put it on PATH")
    source = ROOT / "csrc" / "ops" / "guided_mean_update_cuda.cu"
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-cubin", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    assert len(spills) == 7, report  # three passes, wide and narrow, and the selection
    assert all(numbers == ("0", "0", "0") for numbers in spills), report
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert max(registers) <= 64, report  # four blocks of 256 threads on an SM's 65536 registers
