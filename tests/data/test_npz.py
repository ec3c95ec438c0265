"""The .npz files of the field: read, mapped, and refused when they are something else."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from data_files import noise_image

from adm_rt.data import center_crop, open_dataset
from adm_rt.data.npz import read_npz
from adm_rt.errors import DataError

IMAGES = np.stack([np.asarray(noise_image(10, 10, i)) for i in range(6)])
LABELS = np.array([0, 3, 1, 1, 0, 2])


@pytest.fixture
def write(tmp_path):
    def save(save=np.savez, **arrays):
        save(tmp_path / "set.npz", **arrays)
        return tmp_path / "set.npz"

    return save


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_and_labels(write, save, order):
    path = write(save, arr_0=np.asarray(IMAGES, order=order), arr_1=LABELS, mu=np.zeros(3))
    data = open_dataset(path, 10)
    assert (data.num_images, data.num_classes, data.class_names) == (6, 4, None)
    for i in range(6):
        image, label = data.get(i)
        assert np.array_equal(image, IMAGES[i]) and label == LABELS[i]
    assert isinstance(read_npz(path)[0], np.memmap) == (save is np.savez)
    image[:] = 0  # the caller's own
    assert np.array_equal(data.get(5)[0], IMAGES[5])
    small = open_dataset(path, 4)
    assert np.array_equal(small.get(2)[0], center_crop(noise_image(10, 10, 2), 4))


def test_without_labels(write):
    path = write(arr_0=IMAGES)
    assert open_dataset(path, 10).num_classes is None
    assert open_dataset(path, 10).get(0)[1] == -1
    with pytest.raises(DataError, match="has no labels, and class_cond=True.*arr_1"):
        open_dataset(path, 10, class_cond=True)


def test_number_of_classes(write):
    path = write(arr_0=IMAGES, arr_1=LABELS.astype(np.uint8))
    assert open_dataset(path, 10, num_classes=1000).num_classes == 1000
    with pytest.raises(DataError, match="labels up to 3; num_classes=3 allows 0 to 2"):
        open_dataset(path, 10, num_classes=3)
    assert open_dataset(path, 10, class_cond=False).num_classes is None


def test_grey_images_get_three_channels(write):
    grey = open_dataset(write(arr_0=IMAGES[..., :1]), 10).get(1)[0]
    assert np.array_equal(grey, np.repeat(IMAGES[1, ..., :1], 3, 2))


def test_the_files_that_sampling_writes_are_read(tmp_path):
    from adm_rt import SampleResult

    seeds = np.arange(6, dtype=np.int64)
    result = SampleResult(images=IMAGES, labels=LABELS, seeds=seeds, metadata={})
    result.save(tmp_path / "samples.npz")
    data = open_dataset(tmp_path / "samples.npz", 10)
    assert np.array_equal(data.get(3)[0], IMAGES[3]) and data.get(3)[1] == 1


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": IMAGES}, "has no arr_0 .*it has x"),
        ({"arr_0": IMAGES.astype(np.float32)}, "must be uint8 .* float32"),
        ({"arr_0": IMAGES.astype(np.int64)}, "must be uint8 .* int64"),
        ({"arr_0": IMAGES[0]}, r"\[10, 10, 3\]"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"\[6, 3, 10, 10\]"),
        ({"arr_0": IMAGES[:0]}, r"\[0, 10, 10, 3\]"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:5]}, r"arr_1 must be integer labels \[6\]"),
        ({"arr_0": IMAGES, "arr_1": LABELS.astype(float)}, "float64"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:, None]}, r"\[6, 1\]"),
        ({"arr_0": IMAGES, "arr_1": LABELS - 1}, r"the label -1 at 0; the least is 0"),
        ({"arr_0": np.array([{"a": 1}] * 6, dtype=object)}, "pickled"),
        ({"arr_0": IMAGES, "arr_1": np.array([None] * 6)}, "pickled"),
    ],
)
def test_wrong_arrays_are_named(write, arrays, words):
    with pytest.raises(DataError, match=f"set.npz.*{words}"):
        open_dataset(write(**arrays), 10)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def test_pickles_never_run(tmp_path):
    for name in ("arr_0.npy", "arr_1.npy"):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            if name == "arr_1.npy":
                stream = io.BytesIO()
                np.save(stream, IMAGES)
                archive.writestr("arr_0.npy", stream.getvalue())
            archive.writestr(name, pickle.dumps(Bomb()))
        with pytest.raises(DataError, match="x.npz"):
            open_dataset(tmp_path / "x.npz", 10)
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="y.npz is not a readable .npz"):
        open_dataset(tmp_path / "y.npz", 10)


def test_a_header_that_claims_too_much_takes_no_memory(tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        stream = io.BytesIO()
        np.save(stream, IMAGES)
        data = stream.getvalue().replace(b"(6, 10, 10, 3)", b"(6666666666666, 10, 10, 3)")
        with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
            archive.writestr("arr_0.npy", data)
        with pytest.raises(DataError, match="x.npz"):
            open_dataset(tmp_path / "x.npz", 10)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused(write, tmp_path, save):
    whole = write(save, arr_0=IMAGES, arr_1=LABELS).read_bytes()
    path = tmp_path / "damaged.npz"
    rng = np.random.default_rng(2)
    for length in rng.integers(0, len(whole), 60):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged.npz"):
            open_dataset(path, 10)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            data = open_dataset(path, 10)
        except DataError as error:
            refused += 1
            assert "damaged.npz" in str(error)
        else:  # a byte that says nothing about the arrays, such as the time of day
            assert np.array_equal(data.get_many(range(6), range(6))[0], IMAGES)
            assert data.num_classes in (4, None)
    assert refused > 120


def test_a_changed_pixel_far_into_a_mapped_file_is_found(write):
    images = np.tile(IMAGES, (50, 1, 1, 1))
    path = write(arr_0=images)
    data = bytearray(path.read_bytes())
    data[data.rindex(images[-1].tobytes()) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="set.npz is not a readable .npz file: Bad CRC"):
        open_dataset(path, 10)
