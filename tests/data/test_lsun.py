"""LSUN databases, made small."""

import os
import subprocess
import sys

import numpy as np
import pytest
from data_files import encoded, noise_image

from adm_rt.data import BatchStream, lsun_crop, open_dataset, random_crop
from adm_rt.data.keyed_random import CROP_DRAWS, uniform
from adm_rt.errors import DataError, MissingExtraError

lmdb = pytest.importorskip("lmdb", reason="the lmdb package is not installed")


def write_database(folder, values):
    environment = lmdb.open(str(folder), map_size=1 << 22)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    environment.close()
    return folder


@pytest.fixture
def bedrooms(tmp_path):
    """Five webp images under keys of different lengths, one of them with a zero byte at its end."""
    keys = [b"b7", b"a0", b"a", b"a0\0", b"\xff\xfe"]
    pictures = {
        key: encoded(noise_image(30 + i, 20, i), "webp", lossless=True)
        for i, key in enumerate(keys)
    }
    return write_database(tmp_path / "bedroom_train_lmdb", pictures)


def test_images_in_the_order_of_their_keys(bedrooms):
    data = open_dataset(bedrooms, 16)
    assert data.num_images == 5 and data.num_classes is None
    for i, seed in enumerate([2, 1, 3, 0, 4]):
        image, label = data.get(i)
        assert label == -1
        assert np.array_equal(image, lsun_crop(noise_image(30 + seed, 20, seed), 16))
    u = uniform(9, np.array([5], np.uint64), 4, CROP_DRAWS)[0]
    crop = open_dataset(bedrooms, 16, random_crop=True, seed=9)
    assert np.array_equal(crop.get(2, 5)[0], random_crop(noise_image(33, 20, 3), 16, u))


def test_two_sets_threads_and_a_fork_share_one_database(bedrooms):
    one, two = open_dataset(bedrooms, 8), open_dataset(f"{bedrooms}/.", 8)
    stream, plain = BatchStream(one, 4, 0, workers=3), BatchStream(two, 4, 0)
    for step in range(5):
        assert (stream.batch(step)[0] == plain.batch(step)[0]).all()
    code = (
        "import os, sys; from adm_rt.data import open_dataset\n"
        "data = open_dataset(sys.argv[1], 8); first = data.get(0)[0]; pid = os.fork()\n"
        "if pid == 0: os._exit(0 if (data.get(0)[0] == first).all() else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, bedrooms], timeout=60).returncode == 0


def test_bad_databases(tmp_path, bedrooms):
    with pytest.raises(DataError, match="has no labels.*one database per class"):
        open_dataset(bedrooms, 8, class_cond=True)
    with pytest.raises(DataError, match="the database is empty"):
        open_dataset(write_database(tmp_path / "empty", {}), 8)
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "data.mdb").write_bytes(b"hello" * 4000)
    with pytest.raises(DataError, match="fake is not a readable LMDB database"):
        open_dataset(fake, 8)
    values = write_database(tmp_path / "text", {b"k1": b"hello", b"k2": b""})
    for i in (0, 1):
        with pytest.raises(DataError, match=f"text, key k{i + 1}: not an image"):
            open_dataset(values, 8).get(i)


def test_a_cut_off_database_is_refused_before_it_kills_the_process(bedrooms):
    size = os.path.getsize(bedrooms / "data.mdb")
    for keep in (size - 4096, size // 2 // 4096 * 4096, 8192, 100, 0):
        os.truncate(bedrooms / "data.mdb", keep)
        with pytest.raises(DataError, match="cut off|not a readable"):
            open_dataset(bedrooms, 8)


def test_without_lmdb_the_extra_is_named(bedrooms, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MissingExtraError, match=r'pip install "adm_rt\[lmdb\]"'):
        open_dataset(bedrooms, 8)
