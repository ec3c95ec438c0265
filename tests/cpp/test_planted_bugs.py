"""Kernels with one bug each: the emulator lets the right version pass and catches the wrong one."""

import ctypes
import re

import numpy as np
import pytest

ORDERS = [(0, 1), (1, 1), *((2, seed) for seed in range(3))]  # schedule, seed


@pytest.fixture(scope="module")
def library(compile_emulated):
    return compile_emulated("planted_bugs.cpp")


def arrays():
    buffer = np.zeros(1028, np.float32)
    start = -buffer.ctypes.data % 16 // 4
    values, out = buffer[start : start + 512], buffer[start + 512 : start + 1024]
    values[:] = np.random.default_rng(6).standard_normal(512)
    return values, out


def run(library, name, bug, schedule=0, seed=1):
    """(error or None, output)"""
    values, out = arrays()
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, out)]
    failed = library.run(name.encode(), int(bug), schedule, ctypes.c_uint(seed), *pointers)
    return (library.error_text().decode() if failed else None), out.copy()


NAMES = (
    "missing_barrier missing_second_barrier beyond_shared missing_wait wrong_wait abandoned_copy "
    "divergent_barrier early_return divergent_warp lane_missing deadlock misaligned "
    "different_shared between_blocks"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_the_right_kernel_gives_one_result_in_every_order(library, name):
    results = [run(library, name, False, *order) for order in ORDERS]
    for error, out in results:
        assert error is None
        np.testing.assert_array_equal(out, results[0][1])


# Bugs that change results: some order has to give another one (or NaN, from what was not there).
@pytest.mark.parametrize(
    "name",
    ["missing_barrier", "missing_second_barrier", "missing_wait", "wrong_wait", "between_blocks"],
)
def test_a_bug_changes_the_result_in_some_order(library, name):
    _, expected = run(library, name, False)
    wrong = []
    for order in ORDERS:
        error, out = run(library, name, True, *order)
        wrong.append(error is not None or not np.array_equal(out, expected))
    assert any(wrong)
    if name in ("missing_wait", "wrong_wait"):
        assert all(wrong)  # not a matter of order: the data never arrived


# Bugs that are an error in every order, which names a thread and a line of planted_bugs.cpp.
LINE = r"emulator: block \(\d+, 0, 0\) thread \d+ at (planted_bugs\.cpp:\d+|the end of the kernel)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond_shared", "wrote beyond shared array 0 of 512 bytes"),
        ("abandoned_copy", "leaves with a cp.async that it never waited for"),
        ("divergent_barrier", r"thread \d+ at planted_bugs\.cpp:\d+: divergent barrier"),
        ("early_return", "which some threads have left|leaves while thread .* waits for the block"),
        ("divergent_warp", r"in shuffle_xor at planted_bugs\.cpp:\d+: divergent warp"),
        ("lane_missing", "a lane of its warp has left|leaves while thread .* is in shuffle_xor"),
        ("misaligned", "access of 16 bytes that is not aligned"),
        ("different_shared", "another thread took something else"),
    ],
)
def test_a_bug_is_an_error_that_names_thread_and_line(library, name, message):
    for order in ORDERS:
        error, _ = run(library, name, True, *order)
        assert error is not None and re.search(message, error), error
        assert re.match(LINE.replace("planted_bugs", "(planted_bugs|simt)"), error), error


def test_a_deadlock_names_who_waits_where(library):
    for order in ORDERS:
        error, _ = run(library, "deadlock", True, *order)
        assert "deadlock" in error and "shuffle_xor" in error and "the barrier" in error, error
        assert "planted_bugs.cpp:" in error, error


def test_after_an_error_the_next_launch_is_clean(library):
    _, expected = run(library, "missing_barrier", False)
    for name in ("divergent_barrier", "lane_missing", "beyond_shared", "deadlock"):
        assert run(library, name, True)[0] is not None
        error, out = run(library, "missing_barrier", False)
        assert error is None
        np.testing.assert_array_equal(out, expected)


CODE = """
import ctypes, sys
import test_planted_bugs as cases
library = ctypes.CDLL(sys.argv[1])
library.error_text.restype = ctypes.c_char_p
for name in sys.argv[3].split():
    for order in cases.ORDERS:
        error, _ = cases.run(library, name, sys.argv[2] == "bug", *order)
        if error is not None:
            sys.exit(error)
"""


@pytest.fixture(scope="module")
def sanitized(compile_emulated):
    return compile_emulated("planted_bugs.cpp", sanitized=True)


def test_sanitizers_are_silent_about_right_kernels(sanitized, run_sanitized):
    status, text = run_sanitized(CODE, sanitized, "right", " ".join(NAMES))
    assert status == 0 and "ERROR" not in text, text[-3000:]


@pytest.mark.parametrize("name", ["beyond_shared", "missing_wait"])
def test_sanitizers_name_the_access(sanitized, run_sanitized, name):
    status, text = run_sanitized(CODE, sanitized, "bug", name)
    assert status != 0 and "use-after-poison" in text, text[-3000:]
    assert re.search(rf"#0 .*{name}_kernel.*planted_bugs\.cpp:\d+", text), text[-3000:]


def test_errors_leave_the_sanitizers_in_order(sanitized, run_sanitized):
    """Fibers that an error abandoned do not upset what runs after it."""
    code = CODE.replace("sys.exit(error)", "print(error)")
    names = "divergent_barrier lane_missing early_return divergent_warp deadlock different_shared"
    status, text = run_sanitized(code, sanitized, "bug", names)
    assert status == 0 and text.count("emulator:") == 6 * 5, text[-3000:]
