"""csrc/simt is the only door to CUDA: nothing else in csrc or python names a builtin or PTX."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORBIDDEN = {
    "an index or size": r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b",
    "a qualifier": r"__(global|device|host|shared|constant|restrict|launch_bounds|grid_constant"
    r"|forceinline|noinline)__",
    "an intrinsic": r"\b__(sync|shfl|ballot|any|all|match|activemask|reduce|ld|st|cvta|float|half"
    r"|uint|int|f[a-z]+_r[nzud]|expf|logf|sinf|cosf|nanosleep|threadfence|popc|clz|ffs)\w*\s*\(",
    "an atomic": r"\batomic(Add|Sub|Min|Max|Inc|Dec|Exch|CAS|And|Or|Xor)\w*\s*\(",
    "PTX": r"\basm\b",
    "a launch": r"<<<|\bcuLaunch|\bcudaLaunch",
    "the CUDA runtime": r"\bcuda(?!_)[A-Z]\w*|\bcu(Stream|Event|Mem|Func|Module|Device|Ctx)\w*\b",
    "a CUDA header": r"#\s*include\s*[<\"](cuda|cub/|cute/|cutlass/|mma\.h|cooperative_groups"
    r"|device_launch|vector_types|sm_\d|nv/)",
    "a CUDA type": r"\b(__half2?|__nv_bfloat162?|nv_bfloat162?|dim3|float[234]|u?int[234]|uchar4"
    r"|ushort[24])\b",
    "a CUDA library": r"\b(cooperative_groups|cub|cute|cutlass|nvcuda|wmma)::",
    "CUDA's macros": r"\b__CUDA_ARCH__|\b__CUDACC__|\b__NVCC__",
}


def device_files():
    """All of csrc but csrc/simt, and the bindings."""
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cuh", ".cu")]
    files += (ROOT / "python").glob("*.cpp")
    return [p for p in sorted(files) if (ROOT / "csrc" / "simt") not in p.parents]


def without_comments_and_texts(text):
    keep_lines = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    keep_lines = re.sub(r"//[^\n]*", "", keep_lines)
    return re.sub(r'(#\s*include\s*)?"(\\.|[^"\\\n])*"', lambda m: m.group(1) and m.group() or '""',
                  keep_lines)  # fmt: skip


def violations(text, device=True):
    found = []
    for number, line in enumerate(without_comments_and_texts(text).split("\n"), 1):
        for what, pattern in FORBIDDEN.items():
            if what == "PTX" and not device:
                continue  # host code may have assembly
            if re.search(pattern, line):
                found.append((number, what, line.strip()))
    return found


def test_no_file_goes_round_simt():
    files = device_files()
    assert any(p.suffix == ".cuh" for p in files) and any(p.suffix == ".cu" for p in files)
    bad = [
        f"{path.relative_to(ROOT)}:{number}: {what}: {line}"
        for path in files
        for number, what, line in violations(path.read_text(), path.suffix in (".cuh", ".cu"))
        # TensorRT's interface for plugins has the type in it.
        if not (path.parent.name == "tensorrt" and re.search(r"\bcudaStream_t stream\)", line))
    ]
    assert not bad, "use csrc/simt/simt.h or simt/launch.h:\n" + "\n".join(bad)


@pytest.mark.parametrize(
    "line",
    [
        "int i = threadIdx.x;",
        "__global__ void kernel(float* x) {}",
        "__shared__ float tile[32];",
        "__syncthreads();",
        "v += __shfl_xor_sync(0xffffffffu, v, 1);",
        "x = __ldg(p);",
        "y = __fadd_rn(a, b);",
        "atomicAdd(p, 1);",
        'asm volatile("bar.sync 0;");',
        "kernel<<<grid, block>>>(x);",
        "cudaMalloc(&p, 4);",
        "#include <cuda_runtime.h>",
        '#include "cuda_fp16.h"',
        "#include <cub/cub.cuh>",
        "const float4 v = *p;",
        "cooperative_groups::this_grid();",
        "#if __CUDA_ARCH__ >= 900",
        "__half h;",
    ],
)
def test_the_search_sees(line):
    assert violations(f"namespace x {{\n{line}\n}}") and violations(line)[0][0] == 1


@pytest.mark.parametrize(
    "line",
    [
        "// threadIdx.x is simt::thread_x() here",
        'ADM_RT_CHECK(ok, "cudaMalloc failed");',
        "/* __global__\n */ simt::sync_block();",
        "simt::launch<kernel<simt::Half>>(shape, stream, x);",
        "#include \"ops/ada_group_norm_cuda.h\"",
        "ada_group_norm_cuda(params, workspace, stream);",
        "std::vector<std::vector<std::vector<int>>> v;",
    ],
)  # fmt: skip
def test_the_search_lets_pass(line):
    assert not violations(line)


def test_files_of_the_door_stay_small():
    for path in (ROOT / "csrc" / "simt").iterdir():
        assert len(path.read_text().splitlines()) <= 300, f"{path.name} has more than 300 lines"
