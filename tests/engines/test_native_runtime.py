"""The native engine in a process: threads, fork, Ctrl-C, memory, and no torch."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from native_cases import inputs_of
from tiny_models import TINY_CLASSES, tiny_network

import adm_rt
from adm_rt import engines

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a classifier in it."""
    pipeline = adm_rt.Pipeline(
        tiny_network(),
        tiny_network("classifier"),
        settings={"class_names": list(TINY_CLASSES), "guidance_scale": 2.0},
    )
    return pipeline.save_pretrained(tmp_path_factory.mktemp("native") / "tiny")


def run_python(program, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sampling_imports_no_torch(folder, tmp_path):
    program = """
import sys, adm_rt
result = adm_rt.sample(sys.argv[1], classes=["A", "E"], steps=2, progress=False)
assert result.metadata["engine"] == "native" and result.metadata["guidance_scale"] == 2.0
result.save(sys.argv[2])
pipeline = adm_rt.load(sys.argv[1])
pipeline.save_pretrained(sys.argv[3])
assert adm_rt.load(sys.argv[3])(2, ["A", "E"], steps=2, progress=False).images.tobytes() == \\
    result.images.tobytes()
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch"))
"""
    assert run_python(program, folder, tmp_path / "a.npz", tmp_path / "copy").strip() == "[]"


def test_many_threads_give_the_serial_result(folder):
    pipeline = adm_rt.load(folder)
    expected = [pipeline(2, steps=3, seed=seed, **QUIET).images for seed in range(6)]
    results = [None] * 6

    def work(seed):
        results[seed] = pipeline(2, steps=3, seed=seed, **QUIET).images

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed in range(6):
        assert np.array_equal(results[seed], expected[seed]), seed


def test_engines_of_the_same_weights_share_them(folder):
    first, second = adm_rt.load(folder), adm_rt.load(folder)
    assert first.engine._unet.plans is second.engine._unet.plans
    network = tiny_network()
    other = engines.create("native", network)
    assert other._unet.plans is engines.create("native", network)._unet.plans
    network.out[2].bias.data += 1
    changed = engines.create("native", network)
    assert changed._unet.plans is not other._unet.plans
    x, y, _ = inputs_of(network.cfg)
    assert not np.array_equal(changed.denoise(x, 1, y), other.denoise(x, 1, y))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_gives_the_same_images(folder):
    # In a process of its own: pytest's may hold torch's threads.
    program = """
import os, sys, threading, adm_rt
from adm_rt import _C
_C.set_num_threads(3)
pipeline = adm_rt.load(sys.argv[1])
run = lambda: pipeline(2, steps=2, progress=False).images.tobytes()
expected, stop = run(), threading.Event()
def busy():
    while not stop.is_set():
        run()
thread = threading.Thread(target=busy)
thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        fresh = adm_rt.load(sys.argv[1])(2, steps=2, progress=False).images.tobytes()
        os._exit(0 if run() == expected == fresh else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
assert run() == expected
"""
    run_python(program, folder)


def test_ctrl_c_ends_a_call_soon_and_leaves_the_engine_usable():
    network = tiny_network(image_size=64, num_channels=64, num_head_channels=64)
    engine = engines.create("native", network)
    x, y, _ = inputs_of(network.cfg, count=1)
    expected = engine.denoise(x, 7.0, y)
    many, labels = np.repeat(x, 24, axis=0), np.repeat(y, 24)
    start = time.perf_counter()
    engine.denoise(many, 7.0, labels)
    whole = time.perf_counter() - start
    sent = []

    def interrupt():
        time.sleep(0.25 * whole)
        sent.append(time.perf_counter())
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(50):
            engine.denoise(many, 7.0, labels)
    late = time.perf_counter() - sent[0]
    thread.join()
    # Not an absolute time: the machine may be busy. A run that is not polled would end at 0.75.
    assert late < 0.5 * whole, f"{late:.3f} s after the signal; a whole call takes {whole:.3f} s"
    assert np.array_equal(engine.denoise(x, 7.0, y), expected)


def test_memory_does_not_grow_over_many_calls(folder):
    # VmRSS after a few hundred small calls against after many more. In a process of its own.
    program = """
import gc, sys, adm_rt
pipeline = adm_rt.load(sys.argv[1])
def resident():
    gc.collect()
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))
def call(seed):
    pipeline(1, steps=1, seed=seed, guidance_scale=2.0 * (seed % 2), progress=False)
for seed in range(100):
    call(seed)
before = resident()
for seed in range(100, 900):
    call(seed)
print(resident() - before)
"""
    grown = int(run_python(program, folder))
    assert grown < 512, f"{grown} KiB more after 800 calls"


def test_arenas_are_returned_when_the_engines_are_gone(folder):
    program = """
import sys, adm_rt
from adm_rt import _C
pipeline = adm_rt.load(sys.argv[1])
pipeline(4, steps=1, progress=False)
assert _C.engine_arena_bytes() > 0
del pipeline
import gc; gc.collect()
assert _C.engine_arena_bytes() == 0
"""
    run_python(program, folder)


def test_threads_take_no_more_scratch_memory_than_planned(folder):
    program = """
import sys, adm_rt
from adm_rt import _C
from adm_rt.engines.native_engine import planned_bytes
_C.set_num_threads(1)
pipeline = adm_rt.load(sys.argv[1])
assert _C.engine_scratch_bytes() == 0
pipeline(9, steps=1, progress=False)
networks = pipeline.unet.cfg, pipeline.classifier.cfg
planned = max(planned_bytes(cfg)["per_thread"] for cfg in networks)
print(_C.engine_scratch_bytes(), planned)
"""
    held, planned = map(int, run_python(program, folder).split())
    assert 0.25 * planned < held <= planned


def test_glyphs32_is_within_a_level_of_the_torch_engine():
    run = {"num_images": 4, "steps": 25, "seed": 3, **QUIET}
    native = adm_rt.sample("glyphs32", engine="native", **run)
    torch = adm_rt.sample("glyphs32", engine="torch", **run)
    assert native.metadata["engine"] == "native" and torch.metadata["engine"] == "torch"
    difference = np.abs(native.images.astype(int) - torch.images)
    assert (difference <= 1).mean() >= 0.999, f"{(difference <= 1).mean():.5f} within a level"
