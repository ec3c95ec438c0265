"""csrc/common/simd.h in every instruction set that this machine has, against NumPy in float64."""

import ctypes
import platform

import numpy as np
import pytest

FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c"]
    + ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
}


def isas():
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    try:
        from adm_rt import _C
    except ImportError:
        return ["portable"]
    return _C.available_cpu_isas()


@pytest.fixture(scope="module", params=isas())
def simd(request, compile_probe):
    isa = request.param
    level = list(FLAGS).index(isa)
    path = compile_probe(
        f"simd_{isa}",
        ["tests/cpp/simd_probe.cpp"],
        f"-DADM_RT_ISA={isa}",
        f"-DADM_RT_ISA_LEVEL={level}",
        *FLAGS[isa],
    )
    library = ctypes.CDLL(str(path))
    library.reduce_add.restype = library.reduce_max.restype = ctypes.c_float
    library.isa = isa
    return library


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def apply(function, x):
    x = np.ascontiguousarray(x, np.float32)
    y = np.full(x.size + 1, 7.0, np.float32)
    function(pointer(x), pointer(y), x.size)
    assert y[-1] == 7.0  # nothing is written behind the end
    return y[:-1]


def ulps(got, exact):
    """Distance of float32 values from exact float64 ones in units of the float32 spacing there."""
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.max(np.abs(got.astype(np.float64) - exact) / spacing)


def test_exp_is_within_one_ulp(simd):
    normal = np.linspace(-87.3, 88.7, 200_003).astype(np.float32)
    assert ulps(apply(simd.map_exp, normal), np.exp(normal.astype(np.float64))) <= 1.0
    subnormal = np.linspace(-103.9, -87.4, 10_001).astype(np.float32)
    assert ulps(apply(simd.map_exp, subnormal), np.exp(subnormal.astype(np.float64))) <= 1.0


def test_exp_at_the_ends(simd):
    x = np.array([0, -0.0, -105, -1e30, -np.inf, 88.8, 1e30, np.inf, np.nan], np.float32)
    expected = [1, 1, 0, 0, 0, np.inf, np.inf, np.inf, np.nan]
    np.testing.assert_array_equal(apply(simd.map_exp, x), np.array(expected, np.float32))


def test_sigmoid_and_silu(simd):
    x = np.linspace(-80, 80, 100_001).astype(np.float32)
    wide = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    assert ulps(apply(simd.map_sigmoid, x), sigmoid) <= 2.5
    assert ulps(apply(simd.map_silu, x), wide * sigmoid) <= 2.5
    assert np.isnan(apply(simd.map_silu, [np.nan])[0])
    np.testing.assert_array_equal(apply(simd.map_sigmoid, [-1e4, 1e4]), [0, 1])


def test_same_bits_in_every_instruction_set(simd, compile_probe):
    path = compile_probe(
        "simd_again",
        ["tests/cpp/simd_probe.cpp"],
        "-DADM_RT_ISA=portable",
        "-DADM_RT_ISA_LEVEL=0",
    )
    portable = ctypes.CDLL(str(path))
    x = np.linspace(-104, 89, 100_001).astype(np.float32)
    for name in ("map_exp", "map_sigmoid", "map_silu"):
        got, expected = (apply(getattr(library, name), x) for library in (simd, portable))
        np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32), err_msg=name)


def test_arithmetic(simd):
    width = simd.width()
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, width + 1)).astype(np.float32)[:, 1:]  # unaligned
    a, b, c = (np.ascontiguousarray(v) for v in (a, b, c))
    y = np.empty((8, width), np.float32)
    simd.arithmetic(pointer(a), pointer(b), pointer(c), pointer(y))
    wide = [v.astype(np.float64) for v in (a, b, c)]  # a*b is exact, the sum rounds at 2^-53
    expected = [wide[0] * wide[1] + wide[2], wide[2] - wide[0] * wide[1]]
    expected += [np.maximum(a, b), np.minimum(a, b), a + b, a - b, a * b, a / b]
    for got, want in zip(y, expected, strict=True):
        np.testing.assert_array_equal(got, np.asarray(want).astype(np.float32))


def test_rounding_sqrt_and_signs(simd):
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3.49, -3.51, 127.0, 0.25], np.float32)
    np.testing.assert_array_equal(apply(simd.map_round, x), np.round(x))
    np.testing.assert_array_equal(apply(simd.map_sqrt, np.abs(x)), np.sqrt(np.abs(x)))
    np.testing.assert_array_equal(apply(simd.map_negative_abs, x), -np.abs(x))


def test_reductions_and_partial_loads(simd):
    width = simd.width()
    x = np.arange(1, width + 1, dtype=np.float32)
    for n in range(width + 1):
        assert simd.reduce_add(pointer(x), n) == x[:n].sum()
    for position in range(width):
        y = -x.copy()
        y[position] = 5.0
        assert simd.reduce_max(pointer(y)) == 5.0


def test_bf16(simd):
    every = np.arange(2**16, dtype=np.uint32)
    floats = (every << 16).astype(np.uint32).view(np.float32)
    got = np.empty(2**16, np.float32)
    codes = every.astype(np.uint16)
    simd.bf16_to_float(pointer(codes), pointer(got), 2**16)
    np.testing.assert_array_equal(got.view(np.uint32), floats.view(np.uint32))

    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 100_003, dtype=np.uint32)
    bits[:65536] = (every << 16) | 0x8000  # exactly between two bf16 numbers
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    out = np.zeros(bits.size, np.uint16)
    simd.float_to_bf16(pointer(bits.view(np.float32)), pointer(out), bits.size)
    nan = np.isnan(bits.view(np.float32))
    np.testing.assert_array_equal(out[~nan], rounded[~nan])
    assert np.all((out[nan] & 0x7F80) == 0x7F80) and np.all((out[nan] & 0x7F) != 0)
