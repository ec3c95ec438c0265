"""Batches: a pure function of (seed, step), the same for any ranks, workers and history."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from adm_rt.data import BatchStream, Dataset, glyphs, open_dataset
from adm_rt.data.workers import Workers
from adm_rt.errors import DataError


class Numbered(Dataset):
    """Image i is filled with i; `seen` records every visit."""

    def __init__(self, num_images, bad=(), pause=0.0):
        super().__init__("numbered", 2, num_images, num_classes=num_images)
        self.broken, self.pause, self.seen = set(bad), pause, []

    def _read(self, index):
        self.seen.append(index)
        time.sleep(self.pause)
        if index in self.broken:
            raise DataError("it is broken")
        return np.full((2, 2, 3), index, np.uint8), index


def order(stream, steps, start=0):
    """Labels of steps start .. start + steps - 1."""
    return np.concatenate([stream.batch(step)[1].numpy() for step in range(start, start + steps)])


def equal(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_values_are_the_published_ones():
    stream = BatchStream(open_dataset("glyphs", 8, seed=4), 5, seed=0)
    images, labels, first = stream.batch(3)
    pixels, kinds = glyphs(5, 8, seed=4, first=15)
    expected = np.transpose(pixels.astype(np.float32) / 127.5 - 1, (0, 3, 1, 2))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64 and first == 0
    assert images.is_contiguous() and np.array_equal(images.numpy(), expected)
    assert np.array_equal(labels.numpy(), kinds)
    assert float(images.min()) >= -1 and float(images.max()) <= 1
    assert stream.steps_per_epoch is None


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_every_epoch_meets_every_image_once(batch_size):
    stream = BatchStream(Numbered(10), batch_size, seed=1)
    assert stream.steps_per_epoch == 10 / batch_size
    met = order(stream, -(-40 // batch_size))[:40].reshape(4, 10)
    assert (np.sort(met, 1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in met.tolist()}) == 4
    # The order is one sequence whatever the batches, so the last batch runs on into the next epoch.
    assert np.array_equal(met.ravel(), order(BatchStream(Numbered(10), 4, seed=1), 10))
    assert not np.array_equal(met.ravel(), order(BatchStream(Numbered(10), 4, seed=2), 10))


def test_a_set_smaller_than_the_batch_is_repeated():
    images, labels, _ = BatchStream(Numbered(3), 8, seed=0).batch(0)
    assert len(images) == 8 and sorted(labels[:3]) == [0, 1, 2] == sorted(labels[3:6])
    assert (BatchStream(Numbered(1), 4, seed=0).batch(9)[1] == 0).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("name", ["numbered", "glyphs"])
def test_ranks_share_a_batch(world_size, name):
    data = Numbered(17) if name == "numbered" else open_dataset("glyphs", 8)
    stream = BatchStream(data, 10, seed=0)
    for step in (0, 1, 5):
        whole = stream.batch(step)
        parts = [stream.batch(step, rank, world_size) for rank in range(world_size)]
        sizes = [len(images) for images, _, _ in parts]
        assert max(sizes) - min(sizes) <= 1
        assert [first for _, _, first in parts] == [0, *np.cumsum(sizes)[:-1]]
        assert torch.equal(torch.cat([images for images, _, _ in parts]), whole[0])
        assert torch.equal(torch.cat([labels for _, labels, _ in parts]), whole[1])


def test_a_batch_does_not_depend_on_what_was_asked_before():
    stream = BatchStream(Numbered(17), 5, seed=3)
    forward = [stream.batch(step) for step in range(8)]
    fresh = BatchStream(Numbered(17), 5, seed=3)
    for step in (7, 0, 3, 3):
        assert equal(fresh.batch(step), forward[step])
    far = 10**15  # nothing is made for the steps in between
    assert np.array_equal(order(fresh, 2, far), order(stream, 2, far))


def test_the_draw_is_the_position_so_each_epoch_is_cropped_anew(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(4))
    data = open_dataset(tmp_path / "a.npz", 8, random_crop=True, random_flip=True, seed=6)
    stream = BatchStream(data, 4, seed=0)
    views = {k: set() for k in range(4)}
    for step in range(10):
        indices, draws = stream.indices(step)
        assert draws.tolist() == [4 * step, 4 * step + 1, 4 * step + 2, 4 * step + 3]
        batch, labels, _ = stream.batch(step)
        assert torch.equal(labels, torch.from_numpy(indices))
        for row, (image, label) in enumerate(zip(batch, labels.tolist(), strict=True)):
            views[label].add(image.numpy().tobytes())
            pixels = data.get(label, 4 * step + row)[0].astype(np.float32) / 127.5 - 1
            assert np.array_equal(image.numpy(), pixels.transpose(2, 0, 1))
    assert all(len(view) >= 5 for view in views.values())


def test_without_shuffling_the_order_is_the_sets():
    stream = BatchStream(Numbered(5), 3, seed=0, shuffle=False)
    assert order(stream, 4).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("name", ["numbered", "glyphs"])
def test_workers_do_not_change_the_values(workers, name):
    make = lambda: Numbered(23) if name == "numbered" else open_dataset("glyphs", 8)  # noqa: E731
    plain, ahead = BatchStream(make(), 9, 1), BatchStream(make(), 9, 1, workers=workers)
    for step in (0, 1, 2, 7, 8, 2, 2):
        assert equal(plain.batch(step), ahead.batch(step)), step
        assert equal(plain.batch(step, 1, 2), ahead.batch(step, 1, 2)), step
        assert equal(plain.batch(step, 9, 10), ahead.batch(step, 9, 10)), step  # or none at all
    ahead.close()
    assert equal(plain.batch(4), ahead.batch(4))


def test_workers_read_ahead():
    data = Numbered(12)
    stream = BatchStream(data, 4, seed=0, workers=2)
    stream.batch(0)
    deadline = time.monotonic() + 30
    while len(data.seen) < 8 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(data.seen) == 8  # this step and the next, not the one after
    assert sorted(data.seen) == sorted([*stream.indices(0)[0], *stream.indices(1)[0]])
    stream.close()


def test_an_error_comes_with_the_step_it_belongs_to():
    data = Numbered(12)
    stream = BatchStream(data, 4, seed=0, workers=2)
    data.broken = {int(stream.indices(2)[0][1])}
    stream.batch(0), stream.batch(1)  # the second has already met the error
    for _ in range(2):
        with pytest.raises(DataError, match="numbered, image .*: it is broken"):
            stream.batch(2)
    data.broken = set()
    assert equal(stream.batch(2), BatchStream(Numbered(12), 4, 0).batch(2))


def test_skipped_images_are_the_same_with_workers():
    def make():
        data = Numbered(20, bad=(3, 4, 19))
        data.on_bad = "skip"
        return data

    plain, ahead = make(), make()
    streams = BatchStream(plain, 6, 0), BatchStream(ahead, 6, 0, workers=4)
    with pytest.warns(RuntimeWarning, match="skipped numbered, image"):
        for step in range(7):
            assert equal(streams[0].batch(step), streams[1].batch(step))
    assert plain.bad == ahead.bad and len(plain.bad) == 3


def test_what_has_not_begun_is_cancelled_by_close():
    pool, begun, go = Workers(1), threading.Event(), threading.Event()
    first = pool.submit(lambda: begun.set() or go.wait(30))
    others = [pool.submit(threading.get_ident) for _ in range(3)]
    assert begun.wait(30)
    closing = threading.Thread(target=pool.close)
    closing.start()
    while not pool._closing.is_set():
        assert closing.is_alive()
        time.sleep(0.001)
    go.set()
    closing.join(30)
    assert first.result(30) and all(future.cancelled() for future in others)


def test_threads_end_with_the_stream():
    before = threading.active_count()
    stream = BatchStream(Numbered(50), 8, 0, workers=3)
    stream.batch(0)
    assert threading.active_count() == before + 3
    del stream
    assert threading.active_count() == before


def test_descriptions_tell_streams_apart(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=images, arr_1=np.arange(4))
    changed = images.copy()
    changed[3, 7, 7, 0] ^= 1
    np.savez(tmp_path / "pixel.npz", arr_0=changed, arr_1=np.arange(4))
    np.savez(tmp_path / "labels.npz", arr_0=images, arr_1=np.arange(4)[::-1])

    def about(name="a.npz", order_seed=0, size=8, **options):
        data = open_dataset(tmp_path / name, size, **options)
        return json.dumps(BatchStream(data, 2, order_seed, workers=1).describe())

    assert about() == about("b.npz")  # a set may move
    others = [
        about("pixel.npz"),
        about("labels.npz"),
        about(order_seed=1),
        about(size=9),
        about(seed=1),
        about(random_flip=True),
        about(random_crop=True),
        about(on_bad="skip"),
        about(class_cond=False),
        about(num_classes=9),
    ]
    assert len({about(), *others}) == 11
    assert BatchStream(open_dataset("glyphs", 8), 4, 0).describe()["dataset"]["kind"] == "Glyphs"


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    return done


SLOW_SET = """
import os, signal, sys, threading, time
import numpy as np
from adm_rt.data import BatchStream, Dataset
class Slow(Dataset):
    def _read(self, index):
        if index == 0 and PAUSE: print("reading", flush=True)
        time.sleep(PAUSE)
        return np.full((2, 2, 3), index % 256, np.uint8), None
PAUSE = 0.0
data = Slow("slow", 2, 100000)
stream = BatchStream(data, 2000, 0, workers=2, shuffle=False)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not on this system")
def test_a_forked_child_makes_threads_of_its_own():
    done = run(
        SLOW_SET + "images = stream.batch(0)[0]\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    same = bool((stream.batch(0)[0] == images).all()); stream.batch(1); stream.close()\n"
        "    os._exit(0 if same else 3)\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "stream.batch(1); print('end', code)"
    )
    assert done.stdout.strip() == "end 0", done.stderr


def test_ctrl_c_ends_the_program_at_once():
    # 2000 images of 0.1 s are waited for by two threads, and as many are ahead.
    code = SLOW_SET + "PAUSE = 0.1\nstream.batch(0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.count("KeyboardInterrupt") == 1 and errors.count("Traceback") == 1


def test_a_program_that_ends_does_not_wait_for_what_is_ahead():
    # Step 1 is ready, step 2 has begun and would take 300 s.
    code = SLOW_SET + "stream.batch(0); time.sleep(1); PAUSE = 0.3; stream.batch(1)\nprint('end')"
    done = run(code)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "end\n")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda d: BatchStream(d, 0, 0), ValueError, "batch_size"),
        (lambda d: BatchStream(d, 2.0, 0), TypeError, "batch_size"),
        (lambda d: BatchStream(d, 2, -1), ValueError, "seed"),
        (lambda d: BatchStream(d, 2, 0, workers=-1), ValueError, "workers"),
        (lambda d: BatchStream(d, 2, 0, workers=1000), ValueError, "workers .* 0 to 256"),
        (lambda d: BatchStream(d, 2, 0).batch(-1), ValueError, "step"),
        (lambda d: BatchStream(d, 2, 0).batch(0, 2, 2), ValueError, "rank .* 0 to 1, got 2"),
        (lambda d: BatchStream(d, 2, 0).batch(0, 0, 0), ValueError, "world_size"),
        (lambda d: BatchStream([1, 2], 2, 0), TypeError, "dataset must be .*open_dataset"),
    ],
)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make(Numbered(4))
