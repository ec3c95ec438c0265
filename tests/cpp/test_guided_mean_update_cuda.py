"""The CUDA source of guided_mean_update where there is no GPU: its kernels under the emulator, bit
for bit against the CPU build, and nvcc's report on registers and spills."""

import numpy as np
import pytest
from emulated_update import BFLOAT16, ROW, Case, assert_equal_bits

from adm_rt.ops._library import extension_available
from adm_rt.ops.guided_mean_update import CLIPS, StepCoefficients

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def emulated(compile_emulated):
    return compile_emulated("guided_mean_update_emulated.cpp")


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
        case = Case(6, 2, 3, pixels, dtype=BFLOAT16)
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


def test_nvcc_report(nvcc_report):
    """No spill and no stack; four blocks of 256 threads on an SM, three of those by pixels."""
    reports = nvcc_report("guided_mean_update_cuda.cu", {80: (80, 86, 89), 90: (90, 100, 120)})
    # Three passes, wide and narrow, by elements and by pixels, and the selection.
    assert len(reports) == 6 * 13, reports
    for report in reports:
        assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0), report
        blocks = 4 if "Lb0EEE" in report.name else 3 if "Lb1ELb1EEE" in report.name else 2
        assert report.registers * 256 * blocks <= 65536, report
