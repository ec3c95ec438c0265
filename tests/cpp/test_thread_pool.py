"""csrc/common/thread_pool.h: ranges, exceptions, nesting, several callers, fork, signals."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest

SOURCES = ["tests/cpp/pool_probe.cpp", "csrc/common/thread_pool.cpp"]


@pytest.fixture(scope="module")
def probe_path(compile_probe):
    return compile_probe("pool", SOURCES)


@pytest.fixture
def pool(probe_path):
    library = ctypes.CDLL(str(probe_path))
    for name in ("nested", "callers"):
        getattr(library, name).restype = ctypes.c_int64
    yield library
    library.set_threads(1)


def cover(pool, n, grain):
    counts = np.zeros(max(n, 1), np.int32)
    address = ctypes.c_void_p(counts.ctypes.data)
    ranges = pool.cover(ctypes.c_int64(n), ctypes.c_int64(grain), address)
    return ranges, counts[:n]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_index_once(pool, threads):
    pool.set_threads(threads)
    for n in (0, 1, 2, 7, 64, 1001):
        for grain in (-1, 0, 1, 3, 64, 5000):
            ranges, counts = cover(pool, n, grain)
            assert np.all(counts == 1), (n, grain)
            assert ranges <= max(1, -(-n // max(grain, 1)))
            if threads == 1 or n <= grain:
                assert ranges == (n > 0)


def test_threads_share_the_work_and_are_waited_for(pool):
    pool.set_threads(3)
    assert cover(pool, 100, 1)[0] > 1
    for _ in range(3):
        assert pool.slow(ctypes.c_int64(12)) == 3


def test_nested_call_runs_inline(pool):
    pool.set_threads(3)
    assert pool.nested(ctypes.c_int64(20)) == 400


@pytest.mark.parametrize("bad", [0, 31, 63])
def test_exception_arrives_and_the_pool_lives_on(pool, bad):
    pool.set_threads(3)
    assert pool.throws(ctypes.c_int64(64), ctypes.c_int64(bad)) == 1


def test_several_callers_and_sleeping_workers(pool):
    pool.set_threads(3)
    assert pool.callers(4, 50, ctypes.c_int64(40)) == 0
    for _ in range(20):
        time.sleep(0.001)  # longer than the workers spin: they sleep and must be woken
        assert np.all(cover(pool, 40, 1)[1] == 1)


def run_in_child(pool):
    right = np.all(cover(pool, 500, 1)[1] == 1) and pool.slow(ctypes.c_int64(12)) == 3
    os._exit(0 if right else 1)


def test_child_after_fork_has_a_pool_of_its_own(pool):
    pool.set_threads(3)
    assert np.all(cover(pool, 500, 1)[1] == 1)  # the parent's threads exist: the child has none
    child = multiprocessing.get_context("fork").Process(target=run_in_child, args=(pool,))
    child.start()
    child.join(timeout=20)
    hung = child.is_alive()
    if hung:
        child.kill()
    assert not hung and child.exitcode == 0
    assert np.all(cover(pool, 500, 1)[1] == 1)


def default_threads(probe_path, **variables):
    code = f"import ctypes; print(ctypes.CDLL({str(probe_path)!r}).threads())"
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**env, **variables}, capture_output=True, text=True
    )
    return int(done.stdout)


def test_default_number_of_threads(probe_path):
    assert 1 <= default_threads(probe_path) <= len(os.sched_getaffinity(0))
    assert default_threads(probe_path, OMP_NUM_THREADS="3") == 3
    assert default_threads(probe_path, OMP_NUM_THREADS="3", ADM_RT_NUM_THREADS="5") == 5
    assert default_threads(probe_path, ADM_RT_NUM_THREADS="nonsense", OMP_NUM_THREADS="2") == 2


def test_no_data_race(compile_probe, tmp_path):
    """The same calls under ThreadSanitizer."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    try:
        compile_probe("tsan_probe", [probe], "-fsanitize=thread", shared=False)
    except AssertionError as error:
        pytest.skip(f"this compiler has no ThreadSanitizer: {error}")
    program = compile_probe(
        "pool_tsan", SOURCES, "-fsanitize=thread", "-g", "-DPOOL_PROBE_MAIN", shared=False
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel: " + done.stderr[:200])
    assert done.returncode == 0, done.stderr[-3000:]
