"""conv3x3 and the matrix product under it, in AddressSanitizer, UBSan and ThreadSanitizer."""

import platform
import subprocess

import pytest

ISAS = {
    "portable": (0, []),
    "avx2": (1, ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (
        2,
        ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
    ),
}
KERNELS = [
    "csrc/engine/gemm_simd.cpp",
    "csrc/engine/ops/conv3x3_input_simd.cpp",
    "csrc/engine/ops/conv3x3_output_simd.cpp",
    "csrc/engine/ops/conv3x3_weights_simd.cpp",
    "csrc/engine/ops/row_kernels_simd.cpp",
]
SOURCES = [
    "tests/cpp/conv3x3_probe.cpp",
    "csrc/common/cpu_isa.cpp",
    "csrc/common/thread_pool.cpp",
    "csrc/engine/gemm.cpp",
    "csrc/engine/op.cpp",
    "csrc/engine/ops/channel_stats.cpp",
    "csrc/engine/ops/conv3x3.cpp",
    "csrc/engine/ops/thread_scratch.cpp",
]
SANITIZERS = {
    # Left out is what the address sanitizer sees as well, and what makes g++ take minutes.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,alignment,pointer-overflow,object-size",
        "-fno-sanitize-recover=all",
    ],
    "thread": ["-fsanitize=thread"],
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_clean(compile_probe, tmp_path, sanitizer):
    flags = [*SANITIZERS[sanitizer], "-O1", "-g1", "-w"]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    try:
        compile_probe(f"empty_{sanitizer}", [empty], *flags, shared=False)
    except AssertionError as error:
        pytest.skip(f"this compiler has no such sanitizer: {error}")
    isas = ISAS if platform.machine() in ("x86_64", "AMD64") else {"portable": ISAS["portable"]}
    objects = []
    for isa, (level, machine) in isas.items():
        for source in KERNELS:
            name = f"{sanitizer}_{isa}_{source.split('/')[-1]}.o"
            define = [f"-DADM_RT_ISA={isa}", f"-DADM_RT_ISA_LEVEL={level}"]
            objects.append(
                compile_probe(name, [source], *flags, *machine, *define, "-c", shared=False)
            )
    program = compile_probe(f"conv3x3_{sanitizer}", [*SOURCES, *objects], *flags, shared=False)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the sanitizer does not run on this kernel: " + done.stderr[:200])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
