"""Bad input: every case is a clear error that names things, and nothing is written."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from tiny_models import tiny_network

import adm_rt
from adm_rt import Pipeline
from adm_rt.cli import main
from adm_rt.errors import CheckpointError, NonFiniteError
from adm_rt.models import save_model

QUIET = {"progress": False}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder that must stay empty."""
    place = tmp_path / "workplace"
    place.mkdir()
    monkeypatch.chdir(place)
    yield place
    assert os.listdir(place) == []


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "damaged")


def cli(capsys, *arguments):
    """(exit code, the one line on stderr)."""
    code = main(["sample", *map(str, arguments)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("adm-rt: error: "), lines
    return code, lines[0]


# ---- the arguments, in Python and on the command line ----

BAD = [
    ({"classes": 5}, "classes: 5 is out of range for tiny; allowed: 0..4"),
    ({"classes": -1}, "classes: -1 is out of range"),
    ({"classes": "Z"}, "classes: 'Z' is not a class of tiny.*'A', 'B'"),
    ({"steps": 0}, "steps=0 is out of range; allowed: 1"),
    ({"steps": 1001}, r"steps=1001 is out of range; allowed: 1\.\.1000"),
    ({"steps": "ddim37"}, "steps='ddim37'.*'ddim36' or 'ddim38'"),
    ({"steps": "fast"}, "steps='fast'"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf must be a finite number"),
    ({"guidance_scale": -1.0}, "guidance_scale=-1 is out of range"),
    ({"sampler": "dpm"}, "sampler='dpm' is unknown; allowed: .*'dpmpp_2m'"),
    ({"sampler": "ddim_reverse"}, "ddim_reverse.*turns images into noise"),
    ({"eta": 0.5}, "eta=0.5: 'dpmpp_2m' has no eta.*'ddim'"),
    ({"eta": 2.0, "sampler": "ddim"}, r"eta=2 is out of range; allowed: 0\.\.1|0\.0\.\.1\.0"),
    ({"thresholding": "dinamic"}, "thresholding='dinamic' is unknown.*'dynamic'"),
    ({"guidance_interval": (600, 200)}, "guidance_interval"),
    ({"guidance_every": 0}, "guidance_every=0 is out of range"),
    ({"cfg_scale": 2.0}, "cfg_scale=2: tiny was trained without a null class"),
    ({"batch_size": 0}, "batch_size=0 is out of range"),
    ({"num_images": 0}, "num_images=0 is out of range"),
    ({"seed": -1}, "seed=-1 is out of range"),
    ({"seed": 2**31}, "seed=2147483648 is out of range"),
    ({"upsampler_steps": 5}, "this pipeline has no upsampler"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_arguments_stop_before_any_work(
    tiny_pipeline, tiny_folder, bad, message, workplace, monkeypatch, capsys
):
    def no_work(*args, **kwargs):
        raise AssertionError("the network ran")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_pipeline._engine, "denoise", no_work, raising=False)
        with pytest.raises((ValueError, TypeError), match=message):
            tiny_pipeline(**{"num_images": 2, **bad}, **QUIET)
    with pytest.raises((ValueError, TypeError), match=message):
        adm_rt.sample(tiny_folder, **{"num_images": 2, **bad}, **QUIET)
    flags = []
    for name, value in {"num_images": 2, **bad}.items():
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        flags.append(f"--{name.replace('_', '-')}={value}")
    code, line = cli(capsys, "--model", tiny_folder, *flags)
    assert code == 1
    assert message.split("=")[0].split(":")[0].split(".")[0] in line


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_images": 2.5}, "num_images=2.5 must be an integer"),
        ({"num_images": True}, "num_images=True must be an integer"),
        ({"steps": 2.0}, "steps=2.0 must be an integer"),
        ({"steps": None}, "steps=None must be an integer"),
        ({"guidance_scale": "2"}, "guidance_scale='2' must be a number"),
        ({"classes": 1.5}, "classes: 1.5 is neither"),
        ({"classes": []}, "classes=.. is empty"),
        ({"classes": [], "num_images": None}, "classes=.. is empty"),
        ({"seeds": [], "num_images": None}, "seeds=.. is empty"),
        ({"classes": [[1, 2], [1]]}, r"classes: \[1, 2\] is neither"),
        ({"classes": "a"}, "'a' is not a class of tiny.*Did you mean 'A'"),
        ({"classes": torch.tensor([0, 5])}, "classes: 5 is out of range"),
        ({"sampler": "DDIM"}, "sampler='DDIM' is unknown.*Did you mean 'ddim'"),
        ({"classes": [1, 2, 3]}, "classes holds 3 classes for num_images=2"),
        ({"seeds": [1, 2, 3]}, "seeds holds 3 seeds for num_images=2"),
        ({"seeds": 7}, "seeds=7 must be a list"),
        ({"seeds": [1, -2]}, "seeds=-2 is out of range"),
        ({"callback": 3}, "callback=3 must be callable"),
        ({"guidance_interval": 5}, "guidance_interval=5 must be a pair"),
        ({"guidance_interval": "17"}, "guidance_interval='17' must be a pair"),
    ],
    ids=str,
)
def test_wrong_types(tiny_pipeline, bad, message, workplace):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_pipeline(**{"num_images": 2, **bad}, **QUIET)


def test_an_unknown_argument_is_named(tiny_folder):
    with pytest.raises(ValueError, match="argument='guidance' is unknown.*'guidance_every'"):
        adm_rt.sample(tiny_folder, guidance=2.0)


def test_upscale_arguments(tiny_stack, tiny_pipeline):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="labels are missing.*class-conditional"):
        tiny_stack.upscale(images, **QUIET)
    with pytest.raises(ValueError, match=r"uint8 \[2, 8, 8, 3\].*takes uint8\s+\[N, 16, 16, 3\]"):
        tiny_stack.upscale(images[:, :8, :8], [0, 1], **QUIET)
    with pytest.raises(ValueError, match="float32"):
        tiny_stack.upscale(images.astype(np.float32), [0, 1], **QUIET)
    with pytest.raises(ValueError, match="labels: 5 is out of range"):
        tiny_stack.upscale(images, [0, 5], **QUIET)
    with pytest.raises(ValueError, match="labels holds 3 classes for num_images=2"):
        tiny_stack.upscale(images, [0, 1, 2], **QUIET)
    with pytest.raises(ValueError, match="seeds holds 1 seeds for num_images=2"):
        tiny_stack.upscale(images, [0, 1], seeds=[4], **QUIET)
    with pytest.raises(ValueError, match="tiny has no upsampler"):
        tiny_pipeline.upscale(images, [0, 1], **QUIET)


# ---- models ----


def test_unknown_model_names_the_nearest(workplace, capsys):
    with pytest.raises(ValueError, match=r"model='256x256_difusion'.*'256x256_diffusion'"):
        adm_rt.sample("256x256_difusion", **QUIET)
    code, line = cli(capsys, "--model", "glyps32")
    assert code == 1 and "'glyps32' is neither a shipped model" in line
    assert "lsun_bedroom" in line


@pytest.mark.parametrize("name", ["m" * 5000, "m\0", "~nobody_of_that_name/m"])
def test_names_that_no_file_can_have(name, workplace):
    with pytest.raises(ValueError, match="is neither a shipped model nor") as caught:
        adm_rt.load(name)
    assert len(str(caught.value)) < 1000


def test_a_loaded_network_is_no_model_name(tiny_folder, tiny_pipeline):
    with pytest.raises(TypeError, match="^classifier=NoisyClassifier must be .*Pipeline"):
        adm_rt.load(tiny_folder, classifier=tiny_pipeline.classifier)


def test_a_preset_without_its_weights_says_how_to_get_them(tiny_folder):
    with pytest.raises(ValueError, match="weights of '128x128_diffusion' do not ship.*download"):
        adm_rt.load("128x128_diffusion")
    with pytest.raises(ValueError, match="classifier='64x64_classifier'.*do not ship"):
        adm_rt.load(tiny_folder, "64x64_classifier")


def test_truncated_weights(damaged, workplace, capsys):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="model.safetensors.*damaged"):
        adm_rt.sample(damaged, **QUIET)
    code, line = cli(capsys, "--model", damaged)
    assert code == 1 and "model.safetensors" in line and "damaged" in line


@pytest.mark.parametrize("name", ["model.safetensors", "classifier/model.safetensors"])
def test_a_flipped_bit(damaged, workplace, capsys, name):
    path = damaged / name
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*sha256"):
        adm_rt.sample(damaged, **QUIET)
    code, line = cli(capsys, "--model", damaged)
    assert code == 1 and "sha256" in line


class Payload:
    """Unpickling this would make a file."""

    def __reduce__(self):
        return os.mkdir, ("pickle_was_run",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_with_code_in_it_is_not_run(how, tmp_path, workplace, capsys):
    path = tmp_path / "evil.pt"
    with open(path, "wb") as file:
        if how == "pickle":
            pickle.dump({"weight": Payload()}, file)
        else:
            torch.save({"weight": Payload()}, file)
    with pytest.raises(CheckpointError, match="evil.pt"):
        adm_rt.sample(path, **QUIET)
    code, line = cli(capsys, "--model", path)
    assert code == 1 and "evil.pt" in line


def test_a_truncated_pt(tmp_path, workplace, capsys):
    path = tmp_path / "cut.pt"
    torch.save(tiny_network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    code, line = cli(capsys, "--model", path)
    assert code == 1 and "cut.pt" in line


def test_a_classifier_of_another_size_or_other_classes(tiny_folder, tmp_path, workplace, capsys):
    large = save_model(tmp_path / "large", tiny_network("classifier", image_size=32))
    other = save_model(tmp_path / "other", tiny_network("classifier", num_classes=7))
    with pytest.raises(ValueError, match="made for 32x32 images, but the model makes 16x16"):
        adm_rt.sample(tiny_folder, classifier=large, **QUIET)
    code, line = cli(capsys, "--model", tiny_folder, "--classifier", other)
    assert code == 1 and "knows 7 classes, but the model has 5" in line


def test_models_in_the_wrong_place(tiny_folder, tiny_upsampler_folder):
    with pytest.raises(ValueError, match="is a classifier; give a diffusion model"):
        adm_rt.load(tiny_folder / "classifier")
    with pytest.raises(ValueError, match="not a classifier"):
        adm_rt.load(tiny_folder, classifier=tiny_folder)
    with pytest.raises(ValueError, match="not an upsampler"):
        adm_rt.load(tiny_folder, upsampler=tiny_folder)


def test_an_upsampler_of_another_size():
    with pytest.raises(ValueError, match="enlarges 8x8 images, but the model makes 16x16"):
        Pipeline(tiny_network(), upsampler=tiny_network("upsampler", small_size=8))


def test_guidance_without_a_classifier(workplace):
    with pytest.raises(ValueError, match="guidance_scale=2 needs a classifier"):
        Pipeline(tiny_network())(1, guidance_scale=2.0, **QUIET)


@pytest.mark.parametrize("name", ["engine", "device", "dtype"])
def test_engine_device_and_dtype(tiny_folder, name, workplace, capsys):
    with pytest.raises(ValueError, match=f"{name}='quantum'"):
        adm_rt.sample(tiny_folder, **{name: "quantum"}, **QUIET)
    code, line = cli(capsys, "--model", tiny_folder, f"--{name}", "quantum")
    assert code == 1 and "quantum" in line


# ---- output ----


@pytest.mark.parametrize(
    ("output", "reason"),
    [("/proc/x.npz", "cannot be written"), ("x.jpg", "unknown suffix"), ("/dev/null/x", "null")],
)
def test_an_unwritable_output_stops_before_any_work(
    tiny_folder, output, reason, workplace, monkeypatch, capsys
):
    def no_loading(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Pipeline, "from_pretrained", no_loading)
    with pytest.raises(ValueError, match=reason):
        adm_rt.sample(tiny_folder, output=output, **QUIET)
    code, line = cli(capsys, "--model", tiny_folder, "--output", output)
    assert code == 1 and output in line and reason in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tiny_folder, tmp_path):
    place = tmp_path / "read_only"
    place.mkdir(mode=0o555)
    with pytest.raises(ValueError, match="no file can be made in .*read_only"):
        adm_rt.sample(tiny_folder, output=place / "x.npz", **QUIET)


# ---- values that stop being numbers ----


def broken_network(kind="diffusion", value=float("nan")):
    network = tiny_network(kind)
    with torch.no_grad():
        next(network.out.parameters()).fill_(value)
    return network


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", ["static", "none"])
def test_non_finite_samples_name_image_and_step(value, clip):
    pipeline = Pipeline(broken_network(value=value))
    with pytest.raises(NonFiniteError, match="model's output.*image 0 at step 1.*nothing was wri"):
        pipeline(2, steps=3, thresholding=clip, **QUIET)


def test_a_non_finite_gradient():
    pipeline = Pipeline(tiny_network(), broken_network("classifier"))
    with pytest.raises(NonFiniteError, match="classifier's gradient.*image 0 at step 1"):
        pipeline(2, steps=3, **QUIET)


def test_the_first_bad_image_and_its_step_are_named(tiny_pipeline, monkeypatch):
    inner, calls = tiny_pipeline._engine, []

    class Failing:
        def __getattr__(self, name):
            return getattr(inner, name)

        def denoise(self, x, t, y=None, low_res=None):
            out = inner.denoise(x, t, y, low_res).copy()
            calls.append(t)
            if len(calls) == 6:  # second batch, third step
                out[1, 0, 3, 3] = float("nan")
            return out

    monkeypatch.setattr(tiny_pipeline, "_engine", Failing())
    with pytest.raises(NonFiniteError, match="image 3 at step 3 of 3 of sampling .1 of 2 images"):
        tiny_pipeline(4, steps=3, batch_size=2, guidance_scale=0, **QUIET)


def test_the_command_writes_nothing_when_samples_are_not_finite(
    tiny_folder, workplace, capsys, monkeypatch
):
    load = Pipeline.from_pretrained.__func__

    def broken(cls, *args, **kwargs):
        pipeline = load(cls, *args, **kwargs)
        broken = np.full((2, 6, 16, 16), np.nan, np.float32)
        monkeypatch.setattr(pipeline.engine, "denoise", lambda *args: broken)
        return pipeline

    monkeypatch.setattr(Pipeline, "from_pretrained", classmethod(broken))
    code, line = cli(capsys, "--model", tiny_folder, "-n", 2, "--steps", 2, "--quiet")
    assert code == 1 and "not finite in image 0 at step 1" in line
