"""The CUDA source under the emulator once more, with AddressSanitizer and UBSan."""

import pytest

from adm_rt.ops._library import extension_available

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def library(compile_emulated):
    return compile_emulated("guided_mean_update_emulated.cpp", sanitized=True)


PRELUDE = """
import ctypes, sys
import test_guided_mean_update_cuda as cases
import test_guided_mean_update_step as steps
library = ctypes.CDLL(sys.argv[1])
library.error_text.restype = ctypes.c_char_p
"""


def test_cases_of_the_kernels(library, run_sanitized):
    code = PRELUDE + (
        "for clip in cases.CLIPS:\n"
        "    for pixels in (64, 1, 7, 49):\n"
        "        cases.test_kernels_give_the_bits_of_the_cpu(library, clip, pixels)\n"
        "for schedule in (0, 1, 2):\n"
        "    cases.test_selection_in_any_order_of_threads(library, schedule, 0.995)\n"
        "cases.test_forms(library)\n"
        "for pixels in (64, 49, 3):\n"
        "    steps.test_copies_and_image(library, pixels=pixels, clip='static')\n"
        "    steps.test_pixel_major_networks(library, dtype=steps.BFLOAT16, pixels=pixels)\n"
        "steps.test_the_kernel_advances_the_step(library, schedule=2, clip='static')\n"
    )
    status, text = run_sanitized(code, library)
    assert status == 0, text[-3000:]


def test_a_read_behind_the_end_is_seen(library, run_sanitized):
    """An image of six elements that is said to have eight."""
    code = PRELUDE + (
        "case = cases.Case(1, 1, 1, 6, noise=None, full=False)\n"
        "case.shape = (1, 1, 8, 2, 0)\n"
        "case.emulate(library, cases.StepCoefficients(x0_x=1.0), 0, 'none', 0.9)\n"
    )
    status, text = run_sanitized(code, library)
    assert status != 0 and "heap-buffer-overflow" in text, text[-3000:]
