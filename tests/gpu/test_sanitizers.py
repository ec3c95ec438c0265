"""compute-sanitizer over every kernel; before that, that it sees planted bugs."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import devices
import pytest
import torch
from compilers import ROOT, find_nvcc

devices.require()

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # the exit status we ask it for


def find_sanitizer():
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/compute-sanitizer"]
    places += ["/usr/local/cuda/compute-sanitizer/compute-sanitizer"]
    found = shutil.which("compute-sanitizer")
    return found or next((place for place in places if os.path.exists(place)), None)


def only_ours(tool, help_text):
    """Options by which a tool looks at the kernels in namespace adm_rt alone; help_text: of the
    program, whose versions call them differently."""
    if tool == "initcheck":  # it would not see what other kernels write, and call it unwritten
        return []
    names = ("--kernel-name", "--kernel-regex", "--filter")
    return [next(name for name in names if name in help_text), "kns=adm_rt"]


@pytest.fixture(scope="module")
def sanitize(gpu):
    """sanitize(tool, *command) -> (exit status, output)."""
    program = find_sanitizer()
    if program is None:
        devices.unavailable("compute-sanitizer is not on PATH and not in CUDA_HOME")
    help_text = subprocess.run([program, "--help"], capture_output=True, text=True).stdout

    def run(tool, *command):
        words = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
        words += only_ours(tool, help_text)
        environment = {
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [*words, *command], env=environment, capture_output=True, text=True, timeout=220
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def planted(gpu, tmp_path_factory):
    """The program of tests/cpp/planted_bugs.cpp: name, with the bug, whether `in` is written."""
    output = tmp_path_factory.mktemp("planted") / "planted_bugs"
    major, minor = torch.cuda.get_device_capability()
    command = [find_nvcc(), "-x", "cu", "-std=c++17", "-lineinfo", "-DADM_RT_PLANTED_MAIN"]
    command += [f"-arch=sm_{major}{minor}", f"-I{ROOT / 'csrc'}", "-o", str(output)]
    subprocess.run([*command, str(ROOT / "tests" / "cpp" / "planted_bugs.cpp")], check=True)
    return str(output)


BUGS = {
    "memcheck": ("misaligned", "1", "1"),
    "racecheck": ("missing_barrier", "1", "1"),
    "initcheck": ("missing_barrier", "0", "0"),  # nobody wrote what it reads
    "synccheck": ("early_return", "1", "1"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_planted_bug_is_seen(sanitize, planted, tool):
    status, text = sanitize(tool, planted, "missing_barrier", "0", "1")
    assert status == 0, text[-3000:]  # the right kernel passes
    status, text = sanitize(tool, planted, *BUGS[tool])
    assert status == FOUND, text[-3000:]


@pytest.fixture(scope="module")
def reports(sanitize):
    """tool -> (status, output) over all kernels; the four run beside each other."""
    script = str(ROOT / "tests" / "gpu" / "small_calls.py")
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        runs = {tool: pool.submit(sanitize, tool, sys.executable, script) for tool in TOOLS}
        return {tool: run.result() for tool, run in runs.items()}


@pytest.mark.parametrize("tool", TOOLS)
def test_our_kernels_are_clean(reports, tool):
    status, text = reports[tool]
    assert "all kernels ran" in text, text[-3000:]
    assert status == 0, text[-6000:]
