"""SampleResult: what is written, that others can read it, and that it is written whole or not."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from adm_rt.result import SampleResult, check_output


@pytest.fixture
def result():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    metadata = {"model": "m", "sampler": "ddim", "timesteps": [999.0, 0.5], "none": None}
    return SampleResult(images, np.array([3, 1, 4, 1, 5]), np.arange(5) + (7 << 32), metadata)


def test_npz_is_what_evaluators_read(result, tmp_path):
    path = result.save(tmp_path / "x.npz")
    # OpenAI's evaluator streams arr_0.npy out of the zip archive and looks for a key "mu".
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist()[0] == "arr_0.npy"
        with archive.open("arr_0.npy") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    assert (shape, fortran, dtype) == ((5, 8, 6, 3), False, np.uint8)
    with np.load(path, allow_pickle=False) as arrays:
        assert "mu" not in arrays
        assert np.array_equal(arrays["arr_0"], result.images)
        assert arrays["arr_1"].dtype == np.int64
        assert np.array_equal(arrays["arr_1"], result.labels)
        assert json.loads(str(arrays["adm_rt"])) == result.metadata


def test_npz_round_trip(result, tmp_path):
    back = SampleResult.load(result.save(tmp_path / "x.npz"))
    for name in ("images", "labels", "seeds"):
        assert np.array_equal(getattr(back, name), getattr(result, name))
    assert back.metadata == result.metadata


def test_same_samples_give_the_same_bytes(result, tmp_path):
    first, second = result.save(tmp_path / "a.npz"), result.save(tmp_path / "b.npz")
    assert first.read_bytes() == second.read_bytes()


def test_no_labels_no_arr_1(result, tmp_path):
    result.labels = None
    path = result.save(tmp_path / "x.npz")
    with np.load(path) as arrays:
        assert "arr_1" not in arrays
    assert SampleResult.load(path).labels is None


def test_reads_the_npz_of_other_programs(result, tmp_path):
    np.savez(tmp_path / "theirs.npz", result.images, result.labels)
    back = SampleResult.load(tmp_path / "theirs.npz")
    assert np.array_equal(back.images, result.images)
    assert np.array_equal(back.labels, result.labels)
    assert back.seeds.tolist() == [0, 1, 2, 3, 4] and back.metadata == {}


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_npz(content, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz.*cannot be read"):
        SampleResult.load(path)


def test_an_npz_with_objects_is_not_unpickled(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="x.npz.*cannot be read"):
        SampleResult.load(path)


def test_an_npz_without_images(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"arr_0.*\['mu'\]"):
        SampleResult.load(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (5, 3, 2), (16, 4, 4)]
)
def test_grid_is_near_square_and_in_order(count, columns, rows):
    values = np.arange(count, dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (count, 8, 6, 3))
    grid = SampleResult(images, None, values).grid(padding=2)
    assert grid.size == (columns * 8 + 2, rows * 10 + 2)
    pixels = np.asarray(grid)
    for index in range(count):
        top, left = 2 + index // columns * 10, 2 + index % columns * 8
        assert (pixels[top : top + 8, left : left + 6] == index).all()
    assert (pixels[:2] == 255).all() and (pixels[:, :2] == 255).all()


def test_png_carries_its_parameters(result, tmp_path):
    with Image.open(result.save(tmp_path / "x.png")) as image:
        told = json.loads(image.text["adm_rt"])
        assert np.array_equal(np.asarray(image), np.asarray(result.grid()))
    assert told["labels"] == result.labels.tolist() and told["seeds"] == result.seeds.tolist()
    assert told["timesteps"] == [999.0, 0.5] and told["sampler"] == "ddim"


def test_folder_of_pngs(result, tmp_path):
    folder = result.save(tmp_path / "new" / "samples")
    names = sorted(os.listdir(folder))
    assert names[0] == f"00000_seed{7 << 32}_class3.png" and names[-1] == "metadata.json"
    assert len(names) == 6
    for index, name in enumerate(names[:5]):
        with Image.open(folder / name) as image:
            assert np.array_equal(np.asarray(image), result.images[index])
            assert json.loads(image.text["adm_rt"])["seeds"] == [result.seeds[index]]
    told = json.loads((folder / "metadata.json").read_text())
    assert told["model"] == "m" and told["labels"] == result.labels.tolist()
    assert os.listdir(folder.parent) == ["samples"]


def test_an_empty_folder_is_taken_and_a_full_one_refused(result, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    result.save(folder)
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match="samples.*not empty; name a new one"):
        result.save(folder)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("name", ["x.npz", "x.png", "folder"])
def test_a_failing_disk_leaves_nothing(result, tmp_path, monkeypatch, name):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_failing_disk_keeps_the_old_file(result, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        result.save(path)
    assert os.listdir(tmp_path) == ["x.npz"] and path.read_bytes() == b"old"


def test_files_get_the_usual_permissions(result, tmp_path):
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode & 0o777
    for name in ("x.npz", "x.png"):
        assert result.save(tmp_path / name).stat().st_mode & 0o777 == usual


@pytest.mark.parametrize("name", ["x.jpg", "x.npy", "folder/x.tiff"])
def test_unknown_suffix(result, tmp_path, name):
    with pytest.raises(ValueError, match=r"unknown suffix.*\.npz, \.png"):
        result.save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.npz").mkdir()
    for path, reason in [
        (tmp_path / "file" / "x.npz", "is not a folder"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "folder.npz", "is a folder"),
        ("/proc/adm_rt/x.npz", "no file can be made in /proc"),
        ("", "empty"),
        ("x\0.npz", "NUL"),
        (tmp_path / ("x" * 300 + ".npz"), "too long"),
        (tmp_path / ("x" * 300) / "x.npz", "too long"),
    ]:
        with pytest.raises(ValueError, match=reason):
            check_output(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.npz"]


@pytest.mark.parametrize("path", [5, None, b"x.npz"], ids=repr)
def test_a_path_of_another_type_is_named(path):
    with pytest.raises(TypeError, match="output="):
        check_output(path)


def test_the_longest_name_can_be_written(result, tmp_path):
    name = "x" * 251 + ".npz"
    result.save(tmp_path / name)
    result.save(tmp_path / ("y" * 255))
    assert sorted(os.listdir(tmp_path)) == [name, "y" * 255]


def test_dots_in_a_path_make_no_folders(tmp_path):
    """With "missing/.." taken literally, saving would create "missing" on the way."""
    assert check_output(tmp_path / "missing" / ".." / "x.npz") == tmp_path / "x.npz"


def test_checking_a_path_makes_nothing(tmp_path):
    assert check_output(tmp_path / "a" / "b" / "x.npz") == tmp_path / "a" / "b" / "x.npz"
    assert os.listdir(tmp_path) == []


def test_wrong_arrays_are_named():
    with pytest.raises(ValueError, match=r"images must be uint8.*float32 \[1, 4, 4, 3\]"):
        SampleResult(np.zeros((1, 4, 4, 3), np.float32), None, [0])
    with pytest.raises(ValueError, match=r"labels has shape \[3\] for 2 images"):
        SampleResult(np.zeros((2, 4, 4, 3), np.uint8), [1, 2, 3], [0, 1])
    with pytest.raises(ValueError, match="labels must be integers, not float64"):
        SampleResult(np.zeros((2, 4, 4, 3), np.uint8), [1, 2.5], [0, 1])


def test_too_many_images_for_a_grid_are_refused_before_they_are_made(tmp_path):
    assert check_output(tmp_path / "x.npz", 5000)
    with pytest.raises(ValueError, match="holds at most 1024 images, not 1025; use .npz or a"):
        check_output(tmp_path / "x.png", 1025)
