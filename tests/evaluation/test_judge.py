"""The judge learns, is reproducible, keeps apart from ADM's blocks, and survives its file."""

import subprocess
import sys

import numpy as np
import pytest

from adm_rt.data import glyphs
from adm_rt.errors import CheckpointError

torch = pytest.importorskip("torch")

from adm_rt.evaluation import judge as judging  # noqa: E402
from adm_rt.evaluation import load_judge, save_judge, train_judge  # noqa: E402


def test_a_short_training_reads_most_held_out_glyphs(judge):
    report = judging.held_out_report(judge, 1000)
    assert report["accuracy"] > 0.85, report
    assert sum(report["confusions"].values()) <= 1000 * (1 - report["accuracy"]) + 0.5


def test_training_is_reproducible_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_judge(seed=1, steps=2, batch_size=8, width=4)
    assert torch.equal(before, torch.get_rng_state())
    again = train_judge(seed=1, steps=2, batch_size=8, width=4)
    other = train_judge(seed=2, steps=2, batch_size=8, width=4)
    images, _ = glyphs(8)
    assert np.array_equal(first.examine(images)[1], again.examine(images)[1])
    assert not np.array_equal(first.examine(images)[1], other.examine(images)[1])


def test_examine_does_not_depend_on_the_batch_size(judge):
    images, _ = glyphs(40, 16, seed=3)
    classes, features = judge.examine(images)
    classes_7, features_7 = judge.examine(images, batch_size=7)
    assert classes.dtype == np.int64 and features.shape == (40, 64)
    assert np.array_equal(classes, classes_7)
    np.testing.assert_allclose(features, features_7, rtol=1e-4, atol=1e-4)


def test_a_saved_judge_is_the_same_judge(judge, tmp_path):
    path = tmp_path / "judge.safetensors"
    save_judge(judge, path)
    assert [p.name for p in tmp_path.iterdir()] == ["judge.safetensors"]
    images, _ = glyphs(20, 16, seed=4)
    assert np.array_equal(load_judge(path).examine(images)[1], judge.examine(images)[1])
    assert load_judge(path).training_arguments == judge.training_arguments


def test_a_judge_is_trained_once_and_kept_where_told(tmp_path, monkeypatch):
    path = tmp_path / "small.safetensors"
    made = judging.cached_judge(path, steps=1, batch_size=4, width=4)
    monkeypatch.setattr(judging, "train_judge", None)  # a second training would fail
    for training in ({}, {"steps": 1, "width": 4}):
        kept = judging.cached_judge(path, **training)
        assert kept.training_arguments == made.training_arguments
    for training, words in (
        ({"image_size": 64}, "image_size=32, not 64"),
        ({"steps": 2}, "steps=1"),
    ):
        with pytest.raises(ValueError, match=words):
            judging.cached_judge(path, **training)


def test_a_damaged_judge_is_refused(judge, tmp_path):
    path = tmp_path / "judge.safetensors"
    save_judge(judge, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not a judge"):
        load_judge(path)
    torch_save = pytest.importorskip("safetensors.torch").save_file
    torch_save({"weight": torch.zeros(3)}, path)  # another model's file
    with pytest.raises(CheckpointError, match="is not a judge"):
        load_judge(path)
    path.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="is not a judge"):
        load_judge(path)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 16, 16, 3)), np.zeros((2, 64, 64, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)],
)
def test_images_of_another_kind_are_refused(judge, images):
    with pytest.raises(ValueError, match=r"uint8 \[N, 16, 16, 3\]"):
        judge.examine(images)


def test_bad_training_arguments_are_named():
    for arguments, words in (
        ({"steps": 0}, "steps=0"),
        ({"steps": 1, "batch_size": 1}, "batch_size=1"),
        ({"steps": 1, "image_size": 20}, "image_size=20"),
    ):
        with pytest.raises(ValueError, match=words):
            train_judge(**arguments)


def test_the_judge_shares_no_layer_with_the_models():
    code = (
        "import sys; from adm_rt.evaluation import judge; judge.Judge(); "
        "print([m for m in sys.modules if m.startswith(('adm_rt.models', 'adm_rt.ops'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_metrics_need_no_torch():
    code = "import sys; import adm_rt.evaluation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
