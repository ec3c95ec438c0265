"""``_C.limit_cpuid_to_avx2``: what libraries read of the processor, each time in a new process."""

import subprocess
import sys

import pytest

HIDE = "import sys, threading\nfrom adm_rt import _C\n"
HIDE += "if not _C.limit_cpuid_to_avx2(): sys.exit(3)\n"
# numpy asks the processor as it is imported.
FEATURES = "from numpy._core._multiarray_umath import __cpu_features__ as has\n"
SHOW = "print([k for k in ('AVX2', 'FMA3') if not has[k]], "
SHOW += "[k for k in has if 'AVX512' in k and has[k]])\n"


def run(*lines):
    done = subprocess.run(
        [sys.executable, "-c", "".join(lines)], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 3:
        pytest.skip("this machine cannot hide AVX-512: no CPUID faulting")
    return done


def test_libraries_loaded_later_find_avx2_and_nothing_wider():
    done = run(HIDE, FEATURES, SHOW)
    assert (done.returncode, done.stdout) == (0, "[] []\n"), done.stderr


def test_threads_inherit_it():
    ask = "def ask():\n"
    ask += "".join(f"  {line}\n" for line in (FEATURES + SHOW).splitlines())
    done = run(HIDE, ask, "t = threading.Thread(target=ask); t.start(); t.join()\n")
    assert (done.returncode, done.stdout) == (0, "[] []\n"), done.stderr


def test_other_faults_still_end_the_process():
    done = run(HIDE, "import ctypes; ctypes.string_at(8)")
    assert done.returncode == -11, (done.returncode, done.stderr)
