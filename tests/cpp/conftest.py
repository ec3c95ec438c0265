"""Compiles C++ probes of the core with the system compiler, for tests that look below _C."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def compile_probe(tmp_path_factory):
    """compile_probe(name, sources, *flags, shared=True) -> path of the library or program."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
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
