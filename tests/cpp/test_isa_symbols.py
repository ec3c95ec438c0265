"""What common/simd.h asks of *_simd.cpp: nothing compiled for one instruction set can end up in
the code of another, or run before the CPU was asked what it has."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-mavx2", "-mfma", "-mf16c", "-DADM_RT_ISA=avx2", "-DADM_RT_ISA_LEVEL=1"]
# A pointer to the handler of exceptions, in every object that has any: data, the same everywhere.
HARMLESS = "DW.ref.__gxx_personality_v0"

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or shutil.which("nm") is None,
    reason="needs nm and an x86-64 compiler",
)


def shared_symbols(compile_probe, source):
    """Symbols that the linker could exchange with those of another object, and initialisers."""
    # Without optimisation every inline function in use is a symbol, and not only what is left over.
    flags = ["-O0", *FLAGS, "-c"]
    output = compile_probe(f"{Path(source).stem}.o", [source], *flags, shared=False)
    listing = subprocess.run(["nm", "-C", output], capture_output=True, text=True, check=True)
    found = []
    for line in listing.stdout.splitlines():
        kind, name = line[17:].split(" ", 1)
        exported = kind.isupper() or kind in "uvw"
        if kind == "U" or name == HARMLESS:
            continue
        if "_GLOBAL__" in name or (exported and "adm_rt::avx2::" not in name):
            found.append(name)
    return found


@pytest.mark.parametrize(
    "source", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*_simd.cpp"))
)
def test_every_symbol_is_in_the_namespace(compile_probe, source):
    assert shared_symbols(compile_probe, source) == []


def test_a_library_template_is_seen(compile_probe, tmp_path):
    bad = tmp_path / "bad.cpp"
    bad.write_text(
        "#include <algorithm>\n"
        "namespace adm_rt::ADM_RT_ISA {\n"
        "int worse(int a, int b) { return std::max(a, b); }\n"
        "static int early = worse(1, 2);\n"
        "int use() { return early; }\n"
        "}\n"
    )
    found = " ".join(shared_symbols(compile_probe, bad))
    assert "std::max" in found and "_GLOBAL__" in found
