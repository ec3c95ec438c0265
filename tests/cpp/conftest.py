"""Compiles C++ probes of the core with the system compiler, for tests that look below _C."""

import ctypes
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from compilers import ROOT, cxx, find_nvcc

FOLDER = Path(__file__).resolve().parent
# Without what AddressSanitizer sees as well and what makes g++ take minutes.
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,vptr",
    "-fno-sanitize-recover=all",
    "-Og",
    "-g1",
)


@pytest.fixture(scope="session")
def compile_probe(tmp_path_factory):
    """compile_probe(name, sources, *flags, shared=True) -> path of the library or program."""
    compiler = cxx()
    if compiler is None:
        pytest.skip("no C++ compiler here; set CXX")
    folder = tmp_path_factory.mktemp("probes")

    def build(name, sources, *flags, shared=True):
        output = folder / (f"{name}.so" if shared else name)
        command = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
        command += ["-fPIC", "-shared"] if shared else []
        command += [*flags, *(str(ROOT / source) for source in sources), "-o", str(output)]
        done = subprocess.run([*command, "-pthread"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return output

    return build


@pytest.fixture(scope="session")
def compile_emulated(compile_probe):
    """compile_emulated(source) -> ctypes library of tests/cpp/<source> with error_text().

    sanitized=True gives the path of a build for `run_sanitized` instead.
    """

    @functools.cache
    def build(source, *flags, name=None, sanitized=False):
        name = name or Path(source).stem
        path = f"tests/cpp/{source}"
        if sanitized:
            return str(compile_probe(f"{name}_sanitized", [path], *SANITIZERS, *flags))
        # These are tests of results: -O1 compiles in a fraction of the time.
        library = ctypes.CDLL(str(compile_probe(name, [path], "-O1", *flags)))
        library.error_text.restype = ctypes.c_char_p
        return library

    return build


@pytest.fixture(scope="session")
def run_sanitized():
    """run_sanitized(code, *arguments) -> (exit status, output) of a Python under AddressSanitizer.

    The code may load libraries made by compile_emulated(..., sanitized=True), whose paths it finds
    in sys.argv, and import modules of this folder.
    """
    compiler = cxx() or "c++"
    # The sanitizer has to find __cxa_throw when it starts, which Python alone does not bring.
    preload = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    for library in preload:
        if not Path(library).is_absolute() or not Path(library).exists():
            pytest.skip(f"{compiler} has no {library}, which AddressSanitizer needs")
    path = os.pathsep.join([str(FOLDER), *filter(None, sys.path)])
    # Python itself keeps memory until its end; a fake stack per fiber costs ten times the rest.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=0",
        "PYTHONPATH": path,
    }

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    status, text = run("import numpy")
    if status != 0:
        pytest.skip(f"Python does not run under AddressSanitizer: {text[-300:]}")
    return run


class KernelReport(NamedTuple):
    """What ptxas says of one kernel; bytes, but for registers."""

    arch: str
    name: str  # mangled
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


@pytest.fixture(scope="session")
def nvcc_report(tmp_path_factory):
    """nvcc_report(source, {virtual arch: (arch, ...)}) -> [KernelReport], of csrc/ops/<source>.

    {80: (80, 86)} compiles to the PTX of sm_80 once and that for both. Skips where no nvcc is.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: set CUDACXX or CUDA_HOME, or put it on PATH")
    output = tmp_path_factory.mktemp("nvcc") / "kernels.fatbin"

    def compile_and_read(source, archs):
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-fatbin", "-o", str(output)]
        for virtual, real in archs.items():
            codes = ",".join(f"sm_{arch}" for arch in real)
            command += ["-gencode", f"arch=compute_{virtual},code=[{codes}]"]
        command += [f"-I{ROOT / 'csrc'}", str(ROOT / "csrc" / "ops" / source)]
        done = subprocess.run(command, capture_output=True, text=True)
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        kernels = re.findall(
            r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            text,
            re.S,
        )
        assert kernels, text
        return [KernelReport(arch, name, *map(int, numbers)) for name, arch, *numbers in kernels]

    return compile_and_read
