"""csrc/common/exact_math.h, the arithmetic that CPU and CUDA share, against double precision."""

import ctypes

import numpy as np
import pytest


@pytest.fixture(scope="module")
def probe(compile_probe):
    return ctypes.CDLL(str(compile_probe("exact_math", ["tests/cpp/exact_math_probe.cpp"])))


def test_logarithm_cosine_and_sine(probe):
    """Errors in units of 2^-24; the spacing of float32 is 1 of them below 1 and 2 above."""
    errors = (ctypes.c_double * 3)()
    probe.noise_errors(ctypes.c_uint32(5), errors)
    assert errors[0] < 4 and errors[1] < 2 and errors[2] < 2, list(errors)


def test_exponential(probe):
    x = np.linspace(-103, 88.7, 1_000_003).astype(np.float32)
    x = np.concatenate([x, np.float32([0, -0.0, 1, 88.72, 89, 1e30, np.inf, -104, -1e30, -np.inf])])
    y = np.empty_like(x)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x, y))
    probe.exponential(*pointers, ctypes.c_int64(len(x)))
    with np.errstate(over="ignore"):
        exact = np.exp(x.astype(np.float64))
        finite = exact < np.finfo(np.float32).max
        spacing = np.spacing(exact[finite].astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(y[finite] - exact[finite]) / spacing) <= 1
    assert np.all(np.isinf(y[~finite])) and y[-1] == 0 and y[-2] == 0


def test_exponential_of_nan(probe):
    x, y = np.float32([np.nan, -np.nan]), np.zeros(2, np.float32)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x, y))
    probe.exponential(*pointers, ctypes.c_int64(2))
    assert np.all(np.isnan(y))
