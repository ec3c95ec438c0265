"""The native engine's ops and whole plans in AddressSanitizer, UBSan and ThreadSanitizer."""

import platform
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import tiny_config

from adm_rt import _C
from adm_rt.engines import plan_builder
from adm_rt.engines.lowering import lower_embedding, lower_unet
from adm_rt.engines.lowering_classifier import lower_classifier_gradient

NO_EXECUTABLE_STACK = '.section .note.GNU-stack,"",@progbits\n'
CSRC = Path(__file__).parents[2] / "csrc"
WIDE = ["-mavx2", "-mfma", "-mf16c"]
ISAS = {
    "portable": (0, []),
    "avx2": (1, WIDE),
    "avx512": (2, [*WIDE, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]),
}
SANITIZERS = {
    # Left out is what the address sanitizer sees as well, and what makes g++ take minutes.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,alignment,pointer-overflow,object-size",
        "-fno-sanitize-recover=all",
    ],
    "thread": ["-fsanitize=thread"],
}
# Who writes what is the same for every instruction set: one is enough to see races.
USED = {"address": ("avx2", "avx512"), "thread": ("avx2",)}

# name -> (kind, flags): between them every op, every fusion and both orders of attention
NETWORKS = {
    "unet": ("diffusion", {"channel_mult": "1,2", "num_channels": 48, "norm_groups": 16}),
    "old_unet": (
        "diffusion",
        {
            "resblock_updown": False,
            "use_scale_shift_norm": False,
            "use_new_attention_order": True,
            "num_head_channels": 16,
        },
    ),
    "upsampler": ("upsampler", {"large_size": 24, "small_size": 12}),
    **{
        pool: ("classifier", {"pool": pool, "resblock_updown": pool != "spatial"})
        for pool in ("attention", "adaptive", "spatial", "spatial_v2")
    },
}


class RecordedPlan:
    """A ``_C.Plan`` that writes down how it is made, one line per call, for plan_probe.cpp."""

    def __init__(self):
        self._plan, self.lines = _C.Plan(), []

    def __getattr__(self, name):
        return getattr(self._plan, name)

    def _line(self, *words):
        self.lines.append(" ".join(map(str, words)))

    def buffer(self, shape):
        self._line("buffer", *shape)
        return self._plan.buffer(shape)

    def input(self, name, shape):
        self._line("input", name, *shape)
        return self._plan.input(name, shape)

    def output(self, name, number):
        self._line("output", name, number)
        self._plan.output(name, number)

    def add(self, op, inputs, outputs, attributes, weights):
        words = [op]
        for table in (inputs, outputs, {k: repr(v) for k, v in attributes.items()}):
            words += [len(table), *(word for pair in table.items() for word in pair)]
        words.append(len(weights))
        for name, shape in weights.items():
            words += [name, len(shape), *shape]
        self._line("op", *words)
        return self._plan.add(op, inputs, outputs, attributes, weights)


@pytest.fixture
def plans(monkeypatch, tmp_path):
    """A file with the plans of all networks."""
    monkeypatch.setattr(plan_builder, "extension", lambda: SimpleNamespace(Plan=RecordedPlan))
    lines, ops = [], set()
    for name, (kind, flags) in NETWORKS.items():
        cfg = tiny_config(kind, **flags)
        lower = lower_classifier_gradient if kind == "classifier" else lower_unet
        for part, lowered in (("embedding", lower_embedding(cfg)), ("body", lower(cfg))):
            lines += [f"plan {name}_{part}", *lowered.plan.lines, "end"]
            ops |= {row["op"] for row in lowered.plan.ops()}
    assert ops == set(_C.engine_ops())
    file = tmp_path / "plans.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def sources(*folders, simd):
    files = [file for folder in folders for file in sorted((CSRC / folder).glob("*.cpp"))]
    return [file for file in files if file.name.endswith("_simd.cpp") == simd]


def write_stubs(objects, file):
    """Symbols for the kernels of the instruction sets that are left out. Nobody calls them."""
    lines = subprocess.run(["nm", "-g", *objects], capture_output=True, text=True, check=True)
    symbols = [line.split() for line in lines.stdout.splitlines()]
    defined = {words[2] for words in symbols if len(words) == 3}
    wanted = {words[1] for words in symbols if len(words) == 2 and words[0] == "U"}
    left_out = re.compile(r"_ZN6adm_rt(8portable|4avx2|6avx512)\d")
    missing = sorted(s for s in wanted - defined if left_out.match(s))
    file.write_text("".join(f".globl {s}\n{s}:\n" for s in missing) + NO_EXECUTABLE_STACK)
    return file


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_clean(compile_probe, plans, tmp_path, sanitizer):
    flags = [*SANITIZERS[sanitizer], "-O1", "-g1", "-w"]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    try:
        compile_probe(f"empty_{sanitizer}", [empty], *flags, shared=False)
    except AssertionError as error:
        pytest.skip(f"this compiler has no such sanitizer: {error}")
    used = USED[sanitizer] if platform.machine() in ("x86_64", "AMD64") else ("portable",)
    objects = []
    for isa in used:
        level, machine = ISAS[isa]
        define = [f"-DADM_RT_ISA={isa}", f"-DADM_RT_ISA_LEVEL={level}", *machine, "-c"]
        for source in sources("engine", "engine/ops", simd=True):
            name = f"{sanitizer}_{isa}_{source.stem}.o"
            objects.append(compile_probe(name, [source], *flags, *define, shared=False))
    for source in sources("common", "engine", "engine/ops", simd=False):
        name = f"{sanitizer}_{source.stem}.o"
        objects.append(compile_probe(name, [source], *flags, "-O0", "-c", shared=False))
    objects.append(write_stubs(objects, tmp_path / "stubs.s"))
    available = [isa for isa in used if isa in _C.available_cpu_isas()]
    assert available, "no instruction set to run"
    for probe, arguments in (("conv3x3_probe", []), ("plan_probe", [str(plans)])):
        program = compile_probe(
            f"{probe}_{sanitizer}", [f"tests/cpp/{probe}.cpp", *objects], *flags, shared=False
        )
        done = subprocess.run(
            [program, *arguments, *available], capture_output=True, text=True, timeout=600
        )
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("the sanitizer does not run on this kernel: " + done.stderr[:200])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
