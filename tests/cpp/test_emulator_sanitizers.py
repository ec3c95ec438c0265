"""The CUDA source under the emulator once more, with AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adm_rt.ops._library import extension_available

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)

FOLDER = Path(__file__).resolve().parent
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]


@pytest.fixture(scope="module")
def environment():
    """Variables of a Python that may load libraries with sanitizers."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    text = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(text).is_absolute() or not Path(text).exists():
        pytest.skip(f"{compiler} has no AddressSanitizer library")
    path = os.pathsep.join([str(FOLDER), *filter(None, sys.path)])
    # Python itself keeps memory until its end.
    options = {"LD_PRELOAD": text, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", "import numpy"],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"Python does not run under AddressSanitizer: {done.stderr[-300:]}")
    return {**os.environ, **options}


def run(code, environment, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def library(compile_probe):
    """The emulated kernels, compiled before the sanitizers are in every process."""
    source = "tests/cpp/guided_mean_update_emulated.cpp"
    return str(compile_probe("emulated_sanitized", [source], *FLAGS))


PRELUDE = """
import ctypes, sys
import test_guided_mean_update_cuda as cases
library = ctypes.CDLL(sys.argv[1])
library.error_text.restype = ctypes.c_char_p
"""


def test_cases_of_the_kernels(library, environment):
    code = PRELUDE + (
        "for clip in cases.CLIPS:\n"
        "    for pixels in (64, 1, 7, 49):\n"
        "        cases.test_kernels_give_the_bits_of_the_cpu(library, clip, pixels)\n"
        "for schedule in (0, 1, 2):\n"
        "    cases.test_selection_in_any_order_of_threads(library, schedule, 0.995)\n"
        "cases.test_forms(library)\n"
    )
    status, text = run(code, environment, library)
    assert status == 0, text[-3000:]


def test_a_read_behind_the_end_is_seen(library, environment):
    """An image of six elements that is said to have eight."""
    code = PRELUDE + (
        "case = cases.Case(1, 1, 1, 6, noise=None, full=False)\n"
        "case.shape = (1, 1, 8, 2, 0)\n"
        "case.emulate(library, cases.StepCoefficients(x0_x=1.0), 0, 'none', 0.9)\n"
    )
    status, text = run(code, environment, library)
    assert status != 0 and "heap-buffer-overflow" in text, text[-3000:]
