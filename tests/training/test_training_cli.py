"""``adm-rt train`` and ``adm_rt.training.train``: from flags to model folders and pictures."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import adm_rt
from adm_rt import models
from adm_rt.cli import build_parser, main
from adm_rt.data import glyphs
from adm_rt.errors import DataError
from adm_rt.training import train

NETWORK = {
    "num_channels": 8,
    "norm_groups": 4,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "attention_resolutions": "4",
    "resblock_updown": True,
    "learn_sigma": True,
    "noise_schedule": "cosine",
}
SIZE = {
    "diffusion": {"image_size": 8},
    "classifier": {"image_size": 8},
    "upsampler": {"large_size": 8, "small_size": 4},
}


def options(what, **more):
    flags = {**NETWORK, **SIZE[what], "batch_size": 4, "lr": 1e-3, "device": "cpu", **more}
    if what == "classifier":
        del flags["learn_sigma"]
    return flags


def as_flags(values):
    return [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("what", SIZE)
def test_the_command_writes_a_model_that_loads(tmp_path, what, capsys):
    out = tmp_path / "run"
    more = {"sample_interval": 2, "log_interval": 1, "ema_rate": "0.9,0.05", "val_data": "digits"}
    if what != "classifier":
        more |= {"sample_count": 4, "sample_steps": 2}
        del more["val_data"]
    command = ["train", what, "--iterations", "3", "--out", str(out)]
    data = ["--data", "digits:train" if what == "classifier" else "glyphs"]
    assert main(command + data + as_flags(options(what, **more))) == 0, capsys.readouterr().err
    text, err = capsys.readouterr()
    classes = 10 if what == "classifier" else 36
    for word in ("parameters", "memory: about", f"{classes} classes", "3 updates", "final"):
        assert word in text, word
    assert "3/3" in err
    module = models.load_model(out / "final")
    assert module.cfg.kind == what and module.cfg.num_classes == classes
    assert module.info.class_names[:3] == ("0", "1", "2")
    other = models.load_model(out / "final_ema_0.05")
    assert any(not torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))
    assert [row["step"] for row in rows(out / "log.csv")] == ["1", "2", "3"]
    assert len((out / "log.jsonl").read_text().splitlines()) >= 3
    if what == "classifier":
        (second, third) = rows(out / "evaluation.csv")
        assert 0 <= float(third["val_top1"]) <= float(third["val_top5"]) <= 1
        assert "val_top5_q3" in second
    else:
        pictures = sorted((out / "samples").iterdir())
        assert [p.name for p in pictures] == ["step_0000002.png", "step_0000003.png"]
        with Image.open(pictures[0]) as image:  # 2 x 2 samples, or 4 columns of 3 rows
            assert image.size == ((134, 134) if what == "diffusion" else (266, 200))


def test_what_is_trained_is_what_sample_reads(tmp_path):
    """The paper's stack: a denoiser, the classifier that guides it, an upsampler."""
    folders = {}
    for what in SIZE:
        size = {"large_size": 16, "small_size": 8} if what == "upsampler" else {}
        folders[what] = train(
            what,
            "digits" if what != "upsampler" else "digits:train",
            iterations=1,
            out=tmp_path / what,
            progress=False,
            sample_interval=0,
            **options(what, **size),
        )
    result = adm_rt.sample(
        str(folders["diffusion"]),
        2,
        ["7", "1"],
        steps=2,
        classifier=str(folders["classifier"]),
        upsampler=str(folders["upsampler"]),
        guidance_scale=1.0,
        progress=False,
    )
    assert result.images.shape == (2, 16, 16, 3) and result.labels.tolist() == [7, 1]


def test_validation_numbers_classes_as_training_does(tmp_path):
    for part, names in (("train", "abc"), ("held", "c"), ("other", "ad")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    seen = []

    def run(held_out):
        flags = options("classifier", iterations=1, out=tmp_path / "run", progress=False)
        return train("classifier", tmp_path / "train", val_data=tmp_path / held_out, **flags)

    with pytest.raises(DataError, match="class 'd' is not one of the model's .a, b, c"):
        run("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "adm_rt.training.evaluations.check_labels", lambda y, *_: seen.extend(y.tolist())
        )
        run("held")
    assert seen == [2]


def test_validation_reads_files_as_training_does(tmp_path):
    for name in ("a_1", "b_1"):  # the sub-folder is not the class
        for part in ("train", "held"):
            (tmp_path / part / "x").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / "x" / f"{name}.png")
    (tmp_path / "held" / "x" / "b_2.png").write_bytes(b"no image")
    flags = options("classifier", iterations=1, out=tmp_path / "run", progress=False)
    flags |= {"val_data": tmp_path / "held", "class_from": "prefix"}
    with pytest.raises(DataError, match="b_2.png: not an image"):
        train("classifier", tmp_path / "train", **flags)
    flags["out"] = tmp_path / "other"
    with pytest.warns(RuntimeWarning, match="skipped .*b_2.png"):
        train("classifier", tmp_path / "train", on_bad="skip", **flags)
    assert rows(tmp_path / "other" / "evaluation.csv")


def test_a_run_in_out_is_continued(tmp_path):
    def run(name, iterations, **more):
        flags = options("diffusion", iterations=iterations, out=tmp_path / name, **more)
        return train("diffusion", "digits", progress=False, sample_interval=0, **flags)

    whole = models.load_model(run("whole", 4)).state_dict()
    run("parts", 2)
    parts = models.load_model(run("parts", 4)).state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(ValueError, match="another configuration.*task.class_dropout"):
        run("parts", 6, class_dropout=0.5)


def test_the_callback_sees_each_update_and_may_end_the_run(tmp_path):
    seen = []

    def callback(step, values):
        seen.append((step, values["loss"], values["lr"]))
        return step < 3

    flags = options("diffusion", iterations=50, out=tmp_path / "run")
    final = train("diffusion", "digits", callback=callback, progress=False, **flags)
    assert [step for step, *_ in seen] == [1, 2, 3] and all(loss > 0 for _, loss, _ in seen)
    assert final.is_dir()
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_0000003"]


def test_class_dropout_trains_a_null_class(tmp_path):
    flags = options("diffusion", iterations=1, out=tmp_path / "run", class_dropout=0.1)
    final = train("diffusion", "digits", progress=False, sample_interval=0, **flags)
    cfg = models.load_model(final).cfg
    assert cfg.null_class and cfg.embedding_rows == 11
    result = adm_rt.sample(str(final), 2, 3, steps=2, cfg_scale=2.0, progress=False)
    assert len(result) == 2


def test_data_without_labels_train_a_model_without_classes(tmp_path):
    images, _ = glyphs(6, 8)
    np.savez(tmp_path / "images.npz", images)
    flags = options("diffusion", iterations=1, out=tmp_path / "run")
    data = str(tmp_path / "images.npz")
    final = train("diffusion", data, progress=False, sample_interval=0, **flags)
    assert not models.load_model(final).cfg.class_cond
    with pytest.raises(DataError, match="no labels"):
        train("classifier", data, **options("classifier", iterations=1, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def parse(*arguments):
    return vars(build_parser("train").parse_args(["train", *arguments]))


def test_guided_diffusions_flags():
    """image_train.py's and classifier_train.py's command lines, as its README has them."""
    values = parse(
        *"diffusion --iterations 10 --out x --data_dir d --attention_resolutions 32,16,8".split(),
        *"--class_cond True --diffusion_steps 1000 --image_size 256 --learn_sigma True".split(),
        *"--noise_schedule linear --num_channels 256 --num_head_channels 64".split(),
        *"--num_res_blocks 2 --resblock_updown True --use_fp16 True".split(),
        *"--use_scale_shift_norm True --batch_size 256 --microbatch -1 --lr 1e-4".split(),
        *"--ema_rate 0.9999,0.999 --schedule_sampler loss-second-moment".split(),
        *"--save_interval 10000 --log_interval 10 --weight_decay 0.0 --lr_anneal_steps 5".split(),
    )
    assert values["data"] == "d" and values["use_fp16"] is True and values["microbatch"] == -1
    assert values["class_cond"] is True and values["ema_rate"] == "0.9999,0.999"
    values = parse(
        *"classifier --iterations 300000 --out x --data_dir d --val_data_dir v".split(),
        *"--anneal_lr True --batch_size 256 --lr 3e-4 --save_interval 10000".split(),
        *"--weight_decay 0.05 --image_size 128 --classifier_attention_resolutions 32,16,8".split(),
        *"--classifier_depth 2 --classifier_width 128 --classifier_pool attention".split(),
        *"--classifier_resblock_updown True --classifier_use_scale_shift_norm True".split(),
        *"--eval_interval 5 --classifier_use_fp16 True".split(),
    )
    assert values["num_channels"] == 128 and values["pool"] == "attention"
    assert values["val_data"] == "v" and values["sample_interval"] == 5
    assert values["use_fp16"] is True


def test_flags_with_other_names_mean_the_same(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("adm_rt.training.run.train", lambda **values: seen.update(values))
    flags = "--iterations 9 --out x --use_fp16 1 --anneal_lr 1 --microbatch -1".split()
    assert main(["train", "classifier", *flags]) == 0
    assert seen == {
        "what": "classifier",
        "iterations": 9,
        "out": "x",
        "precision": "fp16",
        "lr_anneal_steps": 9,
        "microbatch": 0,
    }


@pytest.mark.parametrize("what", SIZE)
def test_iterations_and_out_are_required(what, capsys):
    for given, missing in ((["--out", "x"], "--iterations"), (["--iterations", "1"], "--out")):
        assert main(["train", what, *given]) == 2
        assert missing in capsys.readouterr().err


@pytest.mark.parametrize(
    "what, change, said",
    [
        ("denoiser", {}, "what='denoiser'"),
        ("diffusion", {"lerning_rate": 1}, "unknown argument 'lerning_rate'"),
        ("diffusion", {"num_chanels": 1}, "Did you mean 'num_channels'"),
        ("diffusion", {"data": "nowhere"}, "data='nowhere'"),
        ("diffusion", {"num_classes": 3}, "num_classes=3"),
        ("diffusion", {"class_cond": False, "class_dropout": 0.5}, "class_dropout=0.5 needs"),
        ("diffusion", {"snr_weight": True}, "snr_weight is for the mse of x0.*predict_xstart"),
        ("diffusion", {"val_data": "digits"}, "val_data is for classifiers"),
        ("diffusion", {"preset": "64x64_classifier"}, "of kind 'classifier'"),
        ("classifier", {"class_cond": True}, "not for classifiers"),
        ("upsampler", {"image_size": 8}, "image_size: an upsampler"),
        ("upsampler", {"small_size": 9}, "small_size=9"),
        ("diffusion", {"iterations": 0}, "iterations=0"),
        ("diffusion", {"batch_size": 10**12}, "batch_size=1000000000000.*make it smaller"),
        ("diffusion", {"random_flip": True}, "random_flip"),
        ("diffusion", {"sample_interval": 1, "sample_count": 0}, "sample_count=0"),
        ("diffusion", {"sample_interval": 1, "sample_steps": 0}, "sample_steps=0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, what, change, said):
    flags = options(what if what in SIZE else "diffusion")
    values = {"data": "digits", "iterations": 1, "out": tmp_path / "run", **flags, **change}
    with pytest.raises((ValueError, TypeError, MemoryError), match=said):
        train(what, **values)
    assert not (tmp_path / "run").exists()


def test_a_resume_checkpoint_is_explained(capsys):
    assert main("train diffusion --iterations 1 --out x --resume_checkpoint m.pt".split()) == 2
    assert "--init MODEL" in capsys.readouterr().err


def test_published_defaults_of_a_classifier(tmp_path):
    flags = {"iterations": 1, "out": tmp_path / "run", "device": "cpu", "batch_size": 2}
    flags |= {"classifier_width": 32, "classifier_depth": 1, "image_size": 8, "channel_mult": "2,2"}
    cfg = models.load_model(train("classifier", "digits", progress=False, **flags)).cfg
    assert (cfg.num_channels, cfg.num_res_blocks, cfg.num_head_channels) == (32, 1, 64)
    assert cfg.resblock_updown and cfg.attention_resolutions == "32,16,8"


def test_random_crops_and_flips_are_as_published(tmp_path, monkeypatch):
    seen = []

    def open_dataset(spec, image_size, **values):
        seen.append((spec, values["random_crop"], values["random_flip"]))
        raise DataError("enough")

    monkeypatch.setattr("adm_rt.training.run.open_dataset", open_dataset)
    for what in SIZE:
        for data in ("photos", "glyphs", "digits:train"):
            with pytest.raises(DataError):
                train(what, data, iterations=1, out=tmp_path / "run", **SIZE[what])
    assert seen[0] == ("photos", False, True)
    assert seen[3] == ("photos", True, True)
    assert seen[6] == ("photos", False, True)
    assert {tuple(flags) for name, *flags in seen if name != "photos"} == {(False, False)}


def test_a_checkpoint_says_what_made_it(tmp_path):
    train(
        "diffusion",
        "digits",
        progress=False,
        **options("diffusion", iterations=1, out=tmp_path / "run"),
    )
    (checkpoint,) = (tmp_path / "run").glob("step_*")
    text = json.loads((checkpoint / "state.json").read_text())
    assert text["config"]["task"]["type"] == "DiffusionTask" and text["config"]["task"]["data"]
