"""The emulator behind csrc/simt against what NumPy and the PTX ISA's tables say."""

import ctypes
import subprocess

import numpy as np
import pytest
from compilers import ROOT, find_nvcc

SCHEDULES = (0, 1, 2)  # forward, reverse, shuffled
LANES = np.arange(32)


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def library(compile_emulated, request):
    """Once per way of switching fibers."""
    flags = ["-DADM_RT_EMULATOR_UCONTEXT"] if request.param == "ucontext" else []
    return compile_emulated("simt_probe.cpp", *flags, name=f"emulator_{request.param}")


@pytest.fixture(scope="module")
def probe(library):
    """probe(function, arguments...), arrays as pointers; what C++ throws is an AssertionError."""

    def call(name, *arguments):
        converted = [
            ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments
        ]
        assert getattr(library, f"run_{name}")(*converted) == 0, library.error_text().decode()

    return call


def aligned(values, dtype=np.float32):
    """A copy at a multiple of 16 bytes."""
    values = np.ascontiguousarray(values, dtype)
    buffer = np.empty(values.nbytes + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    result = buffer[start : start + values.nbytes].view(dtype).reshape(values.shape)
    result[...] = values
    return result


def bits(values, kind):
    """float32 values that fit, as the 16 bits of bfloat16 or float16."""
    if kind == "bfloat16":
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.asarray(values, np.float16).view(np.uint16)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_collectives(probe, schedule):
    values = np.random.default_rng(1).standard_normal(96).astype(np.float32)
    out = np.zeros((7, 96), np.float32)
    probe("collectives", values, out, 96, schedule)
    for warp in range(3):
        v, got = values[32 * warp : 32 * warp + 32], out[:, 32 * warp : 32 * warp + 32]
        np.testing.assert_array_equal(got[0], v[(LANES * 7 + 3) % 32])
        np.testing.assert_array_equal(got[1], v[LANES ^ 5])
        np.testing.assert_array_equal(got[2], np.concatenate([v[3:], v[29:]]))
        votes = sum(1 << i for i in range(32) if v[i] > 0)
        assert (got[3].view(np.uint32) == votes).all()
        assert (got[4] == (v > 1.5).any() + 2).all()
        assert (got[5] == got[5][0]).all() and abs(got[5][0] - v.sum()) < 1e-5
        assert (got[6] == v.max()).all()


# Element i of a lane's fragment -> (row, column), as the PTX ISA gives them: "Matrix Fragments for
# mma.m16n8k16 with floating point type" and "mma.m16n8k8".
def a16(lane, i):
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)


def b16(lane, i):
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def a32(lane, i):
    group, thread = lane >> 2, lane % 4
    return (group if i in (0, 2) else group + 8), (thread if i in (0, 1) else thread + 4)


def b32(lane, i):
    group, thread = lane >> 2, lane % 4
    return (thread if i == 0 else thread + 4), group


def c32(lane, i):
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def fragments(matrix, place, count):
    return np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)])


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float16"])
def test_mma_lane_maps(probe, kind):
    rng = np.random.default_rng(2)
    depth = 8 if kind == "tf32" else 16
    # Small whole numbers, exact in every format: one element in a wrong place changes the product.
    a, b = rng.integers(-8, 9, (16, depth)), rng.integers(-8, 9, (depth, 8))
    c = rng.integers(-99, 99, (16, 8))
    d = fragments(c, c32, 4).astype(np.float32)
    if kind == "tf32":
        left = fragments(a, a32, 4).astype(np.float32).view(np.uint32)
        right = fragments(b, b32, 2).astype(np.float32).view(np.uint32)
    else:
        left = np.ascontiguousarray(bits(fragments(a, a16, 8), kind)).view(np.uint32)
        right = np.ascontiguousarray(bits(fragments(b, b16, 4), kind)).view(np.uint32)
    probe("mma", {"tf32": 0, "bfloat16": 1, "float16": 2}[kind], left, right, d)
    np.testing.assert_array_equal(d, fragments(a @ b + c, c32, 4))


def test_ldmatrix_lane_maps(probe):
    matrix = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    out = np.zeros((4, 32, 4), np.uint32)
    probe("ldmatrix", matrix, out)
    for kind in range(4):
        for lane in range(32):
            for j in range(4 if kind < 2 else 2):
                # "each thread holds a fragment of a row": thread l has row l / 4, elements
                # 2 (l % 4) and the next; .trans: of the matrix loaded by columns.
                part = matrix[8 * j : 8 * j + 8]
                part = part.T if kind % 2 else part
                row, column = lane // 4, 2 * (lane % 4)
                expected = int(part[row, column]) | int(part[row, column + 1]) << 16
                assert out[kind, lane, j] == expected, (kind, lane, j)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_product_by_copies_ldmatrix_and_mma(probe, kind, schedule):
    rng = np.random.default_rng(3)
    a, b = rng.integers(-8, 9, (16, 80)), rng.integers(-8, 9, (80, 8))
    d = np.zeros((16, 8), np.float32)
    code = {"bfloat16": 1, "float16": 2}[kind]
    left, right = aligned(bits(a, kind), np.uint16), aligned(bits(b, kind), np.uint16)
    probe("product", code, left, right, 80, d, schedule)
    np.testing.assert_array_equal(d, a @ b)


def test_memory(probe):
    values, out = aligned(np.arange(1, 21)), aligned(np.zeros(20))
    probe("memory", values, out)
    values[4:8] = 0
    np.testing.assert_array_equal(out[:14], values[:14])
    np.testing.assert_array_equal(out[16:], values[16:])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_block_sees_all_others_in_any_order(probe, schedule):
    values = np.random.default_rng(4).standard_normal(24 * 32).astype(np.float32)
    counter, totals = np.zeros(1, np.uint32), []
    for _ in range(2):  # the ticket is ready for the next launch
        out = np.zeros(25, np.float32)
        probe("last_block", values, out, counter, 4, 3, 2, schedule)
        assert counter[0] == 0
        assert abs(out[24] - values.sum()) < 1e-3
        totals.append(out[24])
    assert totals[0] == totals[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_barriers_of_groups(probe, schedule):
    out = np.zeros(128, np.int32)
    probe("groups", out, 5, schedule)
    assert (out == 5).all()


def test_shared_memory_starts_as_nan(probe):
    out = np.zeros(32, np.float32)
    probe("uninitialised", out)
    assert (out[:16] == 1).all() and np.isnan(out[16:]).all()


def order(probe, schedule, seed=1, blocks=3, threads=70):
    place = np.zeros(1 + blocks * threads, np.uint32)
    probe("order", place, blocks, threads, schedule, seed)
    return place[1:].tolist()


def test_schedules_are_different_orders(probe):
    assert order(probe, 0) == list(range(210))
    assert order(probe, 1) == list(range(209, -1, -1))
    shuffled = order(probe, 2)
    assert sorted(shuffled) == list(range(210)) and shuffled != order(probe, 0)
    assert shuffled == order(probe, 2) != order(probe, 2, seed=2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 1, 1, 32, 128), "blocks_x 0"),
        ((1, 65536, 1, 32, 128), "blocks_y 65536"),
        ((1, 1, 65536, 32, 128), "blocks_z 65536"),
        ((1, 1, 1, 1025, 128), "threads 1025"),
        ((1, 1, 1, 32, 100 * 1024), "shared_bytes 102400"),
        ((1, 1, 1, 32, 96), "takes bytes 0 to 128 of shared memory; the launch gave 96"),
        ((1, 1, 1, 31, 128), None),
    ],
)
def test_launch_limits(probe, shape, message):
    out = np.zeros(32, np.float32)
    x, y, z, threads, shared = shape
    if message is None:
        return probe("launch", x, y, z, threads, ctypes.c_size_t(shared), out)
    with pytest.raises(AssertionError, match=message):
        probe("launch", x, y, z, threads, ctypes.c_size_t(shared), out)


def convert(probe, kind, values):
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty_like(values)
    probe("convert", kind, values, out, values.size)
    return out


def test_conversions_round_as_numpy_does(probe):
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    with np.errstate(all="ignore"):
        all_halves = halves.view(np.float16).astype(np.float32)
        rng = np.random.default_rng(5)
        words = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
        numbers = np.concatenate(
            [all_halves, words.view(np.float32), rng.uniform(-1e-4, 1e-4, 50_000)]
        ).astype(np.float32)
        # Ties and their neighbours.
        between = (all_halves[:31743] + all_halves[1:31744]) / 2
        numbers = np.concatenate([numbers, between, np.nextafter(between, np.float32(np.inf))])
        expected = numbers.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(convert(probe, 0, numbers), expected)
        finite = numbers[~np.isnan(numbers)]
        np.testing.assert_array_equal(convert(probe, 3, finite), finite.astype(np.float16))
        word = finite.view(np.uint32).astype(np.uint64)
        rounded = ((word + 0x7FFF + (word >> 16 & 1)) >> 16 << 16).astype(np.uint32)
    np.testing.assert_array_equal(convert(probe, 1, finite), rounded.view(np.float32))
    np.testing.assert_array_equal(convert(probe, 4, finite), rounded.view(np.float32))
    assert (
        np.isnan(convert(probe, 1, [np.nan])).all() and np.isnan(convert(probe, 2, [np.nan])).all()
    )
    # tf32: 10 bits of fraction, ties away from zero.
    tf32 = convert(probe, 2, [1 + 2**-11, -1 - 2**-11, 1 + 2**-12, np.inf, 3.0])
    assert tf32.tolist() == [1 + 2**-10, -1 - 2**-10, 1.0, np.inf, 3.0]


def test_approximations(probe):
    x = np.linspace(-60, 60, 1001, dtype=np.float32)
    np.testing.assert_allclose(convert(probe, 5, x), np.exp2(x.astype(np.float64)), rtol=3e-7)
    y = np.exp2(x)
    np.testing.assert_allclose(convert(probe, 6, y), np.log2(y.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(convert(probe, 7, y), 1 / y.astype(np.float64), rtol=1e-7)
    assert convert(probe, 5, [-np.inf, -130, 200]).tolist() == [0, 0, np.inf]
    assert convert(probe, 6, [1e-40]).tolist() == [-np.inf]  # a subnormal is zero
    assert convert(probe, 7, [np.inf, 0]).tolist() == [0, np.inf]


def test_the_cuda_side_compiles(tmp_path):
    """The same probe by nvcc; tests/gpu runs it where there is a GPU."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: set CUDACXX or CUDA_HOME, or put it on PATH")
    command = [nvcc, "-x", "cu", "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-Werror=all-warnings"]
    for arch in (80, 90):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-c", "-o", str(tmp_path / "probe.o"), str(ROOT / "tests/cpp/simt_probe.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
