"""Folders of images: order, classes, crops, and what to do about bad files."""

import os

import numpy as np
import pytest
from data_files import encoded, noise_image, write_folder
from PIL import Image

from adm_rt.data import center_crop, open_dataset, random_crop
from adm_rt.data.keyed_random import CROP_DRAWS, uniform
from adm_rt.errors import DataError

PREFIXED = ["cat_1.png", "ant_2.png", "dog_0_a.png", "ant_1.png"]


def test_published_order_and_classes_by_prefix(tmp_path):
    write_folder(tmp_path, [*PREFIXED, "deep/er/cat_9.png", "deep/ant_9.png", "bat_0.PNG"])
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "png").write_text("no ending")
    (tmp_path / "._cat_1.png").write_text("left by another system")
    data = open_dataset(tmp_path, 8, class_cond=True)
    assert data.paths == [
        "ant_1.png",
        "ant_2.png",
        "bat_0.PNG",
        "cat_1.png",
        "deep/ant_9.png",
        "deep/er/cat_9.png",
        "dog_0_a.png",
    ]
    assert data.class_names == ["ant", "bat", "cat", "dog"] and data.num_classes == 4
    assert [data.get(i)[1] for i in range(7)] == [0, 0, 1, 2, 0, 2, 3]
    assert len(data) == data.num_images == 7
    other = write_folder(tmp_path / "other", ["ant_1.png"])
    about = data.describe()
    assert about["contents"] != open_dataset(other, 8, class_cond=True).describe()["contents"]
    image, _ = data.get(3)
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
    assert np.array_equal(image, center_crop(noise_image(12, 10, 0), 8))


def test_classes_by_sub_folder(tmp_path):
    write_folder(tmp_path, ["b/x_1.png", "a/y.png", "c/deep/z.png", "b/0.png"])
    data = open_dataset(tmp_path, 8)
    assert data.class_names == ["a", "b", "c"]
    assert [data.get(i)[1] for i in range(4)] == [0, 1, 1, 2]
    roomy = open_dataset(tmp_path, 8, num_classes=10)
    assert roomy.num_classes == 10 and roomy.class_names is None
    plain = open_dataset(tmp_path, 8, class_cond=False)
    assert plain.num_classes is None and plain.get(1)[1] == -1
    with pytest.raises(DataError, match="labels up to 2; num_classes=2"):
        open_dataset(tmp_path, 8, num_classes=2)


def test_classes_are_numbered_as_the_model_has_them(tmp_path):
    write_folder(tmp_path, ["c/x.png", "a/y.png"])
    data = open_dataset(tmp_path, 8, class_names=("d", "c", "b", "a"))
    assert [data.get(i)[1] for i in range(2)] == [3, 1]
    assert data.num_classes == 4 and data.class_names == ["d", "c", "b", "a"]
    plain = open_dataset(tmp_path, 8, class_cond=False, class_names=("d",))
    assert plain.num_classes is None and plain.class_names is None
    with pytest.raises(DataError, match="class 'c' is not one of the model's .a, b.; name"):
        open_dataset(tmp_path, 8, class_names=("a", "b"))


def test_where_classes_are_looked_for(tmp_path):
    flat = write_folder(tmp_path / "flat", ["img_1.png", "img_2.png"])
    assert open_dataset(flat, 8).num_classes is None  # one prefix tells nothing
    assert open_dataset(flat, 8, class_cond=True).class_names == ["img"]
    bare = write_folder(tmp_path / "bare", ["one.png", "two_2.png"])
    assert open_dataset(bare, 8).num_classes is None
    for options in ({"class_cond": True}, {"class_from": "prefix"}):
        with pytest.raises(DataError, match=r"one.png: the name has no '_'.*sub-folder"):
            open_dataset(bare, 8, **options)
    mixed = write_folder(tmp_path / "mixed", ["a_1.png", "sub/b_1.png"])
    assert open_dataset(mixed, 8).class_names == ["a", "b"]
    with pytest.raises(DataError, match=r"a_1.png: the image lies in no sub-folder"):
        open_dataset(mixed, 8, class_from="folder")
    nested = write_folder(tmp_path / "nested", ["u/b_1.png", "v/a_1.png"])
    assert open_dataset(nested, 8, class_from="prefix").class_names == ["a", "b"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "real", ["a/1_x.png"])
    os.symlink(tmp_path / "real", tmp_path / "real" / "a" / "up")
    os.symlink(tmp_path / "real" / "a", tmp_path / "real" / "b")
    data = open_dataset(tmp_path / "real", 8)
    assert data.paths == ["a/1_x.png", "b/1_x.png"]
    os.symlink(tmp_path / "nothing", tmp_path / "real" / "a" / "2_x.png")
    dangling = open_dataset(tmp_path / "real", 8, on_bad="skip")
    with pytest.raises(FileNotFoundError, match="2_x.png"):  # not silently another image
        dangling.get(dangling.paths.index("a/2_x.png"))


@pytest.mark.parametrize("spec", [str, os.fspath, os.fsencode, lambda path: path])
def test_paths_of_any_kind(tmp_path, spec):
    folder = write_folder(tmp_path / "glyphs", ["1.png"])
    if spec is not os.fsencode:
        assert open_dataset(spec(folder), 8).num_images == 1
    else:
        with pytest.raises(TypeError, match="data must be"):
            open_dataset(spec(folder), 8)


def test_a_folder_called_like_a_built_in_set(tmp_path, monkeypatch):
    write_folder(tmp_path / "glyphs", ["1.png"])
    monkeypatch.chdir(tmp_path)
    assert open_dataset("./glyphs", 8).num_images == 1
    assert open_dataset("glyphs", 8).num_images is None


def test_crop_and_flip_are_functions_of_seed_and_draw(tmp_path):
    write_folder(tmp_path, ["1.png", "2.png"], size=(40, 30))
    make = lambda seed=0: open_dataset(  # noqa: E731
        tmp_path, 16, random_crop=True, random_flip=True, seed=seed
    )
    data, other = make(), make(1)
    np.random.seed(0)
    views = [data.get(0, draw)[0] for draw in range(40)]
    np.random.seed(1)
    again = [make().get(0, draw)[0] for draw in reversed(range(40))][::-1]
    assert np.array_equal(views, again)
    assert len({view.tobytes() for view in views}) > 30
    assert any(not np.array_equal(other.get(0, draw)[0], views[draw]) for draw in range(4))
    for draw, view in enumerate(views):
        u = uniform(0, np.array([draw], np.uint64), 4, CROP_DRAWS)[0]
        whole = random_crop(noise_image(40, 30, 0), 16, u[:3])
        assert np.array_equal(view, whole[:, ::-1] if u[3] < 0.5 else whole)
    # The flip alone: half of the visits, mirrored exactly.
    flip = open_dataset(tmp_path, 16, random_flip=True)
    plain = open_dataset(tmp_path, 16).get(1)[0]
    flipped = 0
    for draw in range(200):
        image = flip.get(1, draw)[0]
        flipped += np.array_equal(image, plain[:, ::-1])
        assert np.array_equal(image, plain) or np.array_equal(image, plain[:, ::-1])
    assert 70 < flipped < 130
    assert np.array_equal(open_dataset(tmp_path, 16).get(1, 99)[0], plain)


@pytest.fixture
def damaged_folder(tmp_path):
    """Six images; number 1 is cut off, 2 is text, 5 is empty."""
    write_folder(tmp_path, [f"{i}.png" for i in range(6)])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_text("hello")
    (tmp_path / "5.png").write_bytes(b"")
    return tmp_path


def test_bad_images_are_named(damaged_folder):
    data = open_dataset(damaged_folder, 8)
    assert data.get(0)[0].shape == (8, 8, 3)
    with pytest.raises(DataError, match=r"1\.png: the image is damaged .*on_bad='skip'"):
        data.get(1)
    with pytest.raises(DataError, match=r"2\.png: not an image"):
        data.get(2)


def test_bad_images_are_replaced_by_the_next_and_counted(damaged_folder):
    data = open_dataset(damaged_folder, 8, on_bad="skip")
    with pytest.warns(RuntimeWarning, match="skipped .*1.png: the image is damaged"):
        first = data.get(1)[0]
    with pytest.warns(RuntimeWarning, match="5.png"):
        last = data.get(5)[0]
    assert np.array_equal(first, data.get(3)[0])
    assert np.array_equal(last, data.get(0)[0])
    assert [os.path.basename(where) for where in data.bad] == ["1.png", "2.png", "5.png"]
    for order in (range(6), reversed(range(6))):  # whatever was met before
        fresh = open_dataset(damaged_folder, 8, on_bad="skip")
        with pytest.warns(RuntimeWarning):
            images = {i: fresh.get(i)[0].tobytes() for i in order}
        assert images[1] == images[2] == images[3] and images[5] == images[0]
        assert len(fresh.bad) == 3


def test_a_folder_of_bad_images_ends(tmp_path):
    for i in range(15):
        (tmp_path / f"{i:02}.png").write_text("hello")
    data = open_dataset(tmp_path, 8, on_bad="skip")
    with pytest.warns(RuntimeWarning) as caught:
        with pytest.raises(DataError, match="none of 15 images in a row .* can be read"):
            data.get(3)
    assert len(caught) == 10 and "only counted" in str(caught[-1].message)
    assert len(data.bad) == 15


def test_too_thin_an_image_is_bad(tmp_path):
    (tmp_path / "strip.png").write_bytes(encoded(Image.new("L", (40000, 1))))
    with pytest.raises(DataError, match=r"strip.png: the image is 40000x1, too long"):
        open_dataset(tmp_path, 64).get(0)


def test_small_images_are_enlarged(tmp_path):
    write_folder(tmp_path, ["1.png"], size=(5, 4))
    image, _ = open_dataset(tmp_path, 32).get(0)
    assert np.array_equal(image, center_crop(noise_image(5, 4, 0), 32))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"image_size": 0}, ValueError, "image_size .* 1 to"),
        ({"image_size": "64"}, TypeError, "image_size must be an integer"),
        ({"on_bad": "ignore"}, ValueError, "'error' or 'skip', got 'ignore'"),
        ({"seed": -1}, ValueError, "seed"),
        ({"random_crop": 1}, TypeError, "random_crop must be True or False"),
        ({"random_flip": "no"}, TypeError, "random_flip"),
        ({"class_cond": "yes"}, TypeError, "class_cond"),
        ({"class_from": "suffix"}, ValueError, "class_from"),
        ({"exif_rotation": 2}, TypeError, "exif_rotation"),
        ({"num_classes": 0}, ValueError, "num_classes"),
        ({"num_classes": 3}, DataError, "has no labels, and num_classes=3"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, error, words):
    write_folder(tmp_path, ["1.png"])
    with pytest.raises(error, match=words):
        open_dataset(tmp_path, **{"image_size": 8, **options})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "none", r"no such file or folder; allowed: glyphs, digits"),
        (lambda p: "", "''.*no such file"),
        (lambda p: "a\0b", "no such file"),
        (lambda p: "x" * 5000, "no such file"),
        (lambda p: p, r"no images in this folder or below it .*png"),
        (lambda p: (p / "x.zip").write_text("") or p / "x.zip", "is a file, but not an .npz"),
    ],
)
def test_bad_paths_are_named(tmp_path, make, words):
    with pytest.raises(DataError, match=words):
        open_dataset(make(tmp_path), 8)


@pytest.mark.parametrize("index", [-1, 2, 1.0, "0"])
def test_bad_indices_are_named(tmp_path, index):
    write_folder(tmp_path, ["1.png", "2.png"])
    with pytest.raises((ValueError, TypeError), match="index"):
        open_dataset(tmp_path, 8).get(index)
    with pytest.raises((ValueError, TypeError), match="draw"):
        open_dataset(tmp_path, 8).get(0, -1)
