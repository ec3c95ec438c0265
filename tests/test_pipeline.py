"""Pipeline: what it calls, what it returns, and what an image depends on."""

import json
import warnings

import numpy as np
import pytest
import torch
from tiny_models import TINY_CLASSES, tiny_network

import adm_rt
from adm_rt import Pipeline, engines, ops
from adm_rt.diffusion import Diffusion
from adm_rt.ops.philox import image_seeds, philox_randint
from adm_rt.samplers import SAMPLERS
from adm_rt.trajectory import automatic_batch_size, from_uint8, to_uint8

QUIET = {"progress": False}
GENERATING = [name for name, sampler in SAMPLERS.items() if not sampler.encodes]


class CountingEngine:
    """The torch engine, counting what is asked of it."""

    def __init__(self, pipeline):
        self.inner = pipeline._engine
        self.denoised, self.gradients, self.times = 0, 0, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def denoise(self, x, t, y=None, low_res=None):
        self.denoised += 1
        self.times.append(t)
        return self.inner.denoise(x, t, y, low_res)

    def classifier_gradient(self, x, t, y):
        self.gradients += 1
        return self.inner.classifier_gradient(x, t, y)


@pytest.fixture
def counted(tiny_pipeline, monkeypatch):
    engine = CountingEngine(tiny_pipeline)
    monkeypatch.setattr(tiny_pipeline, "_engine", engine)
    return tiny_pipeline, engine


@pytest.mark.parametrize("sampler", GENERATING)
def test_an_image_depends_on_its_seed_alone(tiny_pipeline, sampler):
    run = {"steps": 3, "sampler": sampler, "seed": 5, "eta": 0.5 * (sampler == "ddim"), **QUIET}
    whole = tiny_pipeline(5, batch_size=5, **run)
    split = tiny_pipeline(5, batch_size=2, **run)
    assert np.array_equal(whole.labels, split.labels)
    assert np.abs(whole.images.astype(int) - split.images).max() <= 1
    assert whole.images.std() > 10  # not constant images
    alone = tiny_pipeline(seeds=whole.seeds[3:4], **run)
    assert alone.labels.tolist() == [whole.labels[3]]
    assert np.abs(alone.images[0].astype(int) - whole.images[3]).max() <= 1
    assert len({image.tobytes() for image in whole.images}) == 5
    other = tiny_pipeline(5, **{**run, "seed": 6})
    assert (other.images != whole.images).mean() > 0.5


def test_seeds_are_those_documented(tiny_pipeline):
    result = tiny_pipeline(3, steps=1, seed=9, guidance_scale=0, **QUIET)
    assert result.seeds.tolist() == [(9 << 32) | i for i in range(3)]
    assert result.labels.tolist() == philox_randint(image_seeds(9, 3), 5).tolist()


@pytest.mark.parametrize("sampler", GENERATING)
def test_it_is_the_sampler_on_the_documented_noise(tiny_pipeline, sampler):
    result = tiny_pipeline(
        3, [1, 2, 4], steps="ddim5", sampler=sampler, guidance_scale=1.5, seed=2, **QUIET
    )
    seeds = image_seeds(2, 3)
    engine = engines.create("auto", tiny_pipeline.unet, tiny_pipeline.classifier)
    x = SAMPLERS[sampler](
        engine,
        engine.from_numpy(ops.philox_normal(seeds, (3, 16, 16))),
        Diffusion(timestep_respacing="ddim5"),
        engine.from_numpy(np.array([1, 2, 4])),
        1.5,
        noise=seeds,
    )
    assert np.array_equal(result.images, to_uint8(engine.to_numpy(x)))


def test_published_quantisation_truncates():
    x = np.array([-2.0, -1.0, -0.9999, 0.0, 0.5, 0.99999, 1.0, 3.0], np.float32)
    x = np.broadcast_to(x.reshape(1, 1, 1, 8), (1, 3, 1, 8))
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
    every = np.arange(256, dtype=np.uint8)
    images = np.repeat(every.reshape(1, 1, 256, 1), 3, axis=3)
    floats = from_uint8(images)
    assert floats.shape == (1, 3, 1, 256)
    expected = every.astype(np.float64) / 127.5 - 1
    assert np.abs(floats[0, 0, 0] - expected).max() < 1e-7


def test_guidance_defaults_to_the_models_and_0_never_asks_the_classifier(counted):
    pipeline, engine = counted
    assert pipeline(1, steps=3, **QUIET).metadata["guidance_scale"] == 2.0
    assert (engine.denoised, engine.gradients) == (3, 3)
    result = pipeline(1, steps=3, guidance_scale=0, **QUIET)
    assert (engine.denoised, engine.gradients) == (6, 3)
    assert result.metadata["classifier"] is None


def test_guidance_interval_and_every(counted):
    pipeline, engine = counted
    pipeline(1, steps=8, sampler="ddim", guidance_every=3, **QUIET)
    assert engine.gradients == 3
    engine.gradients = 0
    pipeline(1, steps=5, sampler="ddim", guidance_interval=(200, 600), **QUIET)
    # "5" keeps 0, 250, 500, 749, 999
    assert engine.gradients == 2


def test_the_models_own_guidance_interval(counted, monkeypatch):
    pipeline, engine = counted
    monkeypatch.setitem(pipeline.settings, "guidance_interval", [200, 600])
    for interval, gradients in (("auto", 2), (None, 5), ((700, 999), 2), ((0, 999), 5)):
        engine.gradients = 0
        result = pipeline(1, steps=5, sampler="ddim", guidance_interval=interval, **QUIET)
        assert engine.gradients == gradients, interval
        used = result.metadata["guidance_interval"]
        assert used == {"auto": (200, 600)}.get(interval, interval)
    monkeypatch.setitem(pipeline.settings, "guidance_interval", [600, 200])
    with pytest.raises(ValueError, match="guidance_interval=.600, 200. is empty"):
        pipeline(1, steps=5, **QUIET)


@pytest.mark.parametrize(
    ("steps", "sampler", "times"),
    [
        (5, "ddim", [999, 749, 500, 250, 0]),
        ("ddim4", "ddpm", [750, 500, 250, 0]),
        ("2,1", "ddpm", [500, 499, 0]),
        (4, "dpmpp_2m", [999, 749.25, 499.5, 249.75]),
    ],
)
def test_the_timestep_grid_is_run_and_reported(counted, steps, sampler, times):
    pipeline, engine = counted
    result = pipeline(3, steps=steps, sampler=sampler, batch_size=2, **QUIET)
    assert result.metadata["timesteps"] == times
    assert engine.times == times * 2


def test_metadata_is_json_and_complete(tiny_pipeline):
    result = tiny_pipeline(
        np.int64(2), np.array([1, 2]), steps=np.int64(2), guidance_scale=np.float32(1.5), **QUIET
    )
    told = json.loads(json.dumps(result.metadata))
    assert told["adm_rt"] == adm_rt.__version__
    for name, value in {
        "model": "tiny",
        "sampler": "dpmpp_2m",
        "steps": 2,
        "guidance_scale": 1.5,
        "thresholding": "static",
        "engine": "native",
        "dtype": "float32",
        "seed": 0,
    }.items():
        assert told[name] == value
    assert told["diffusion"]["noise_schedule"] == "linear"


def test_classes_by_index_name_and_list(tiny_pipeline):
    def labels(*args, **kwargs):
        return tiny_pipeline(*args, steps=1, guidance_scale=0, **kwargs, **QUIET).labels.tolist()

    assert labels(3, 4) == [4, 4, 4]
    assert labels(2, "C") == [2, 2]
    assert labels(None, ["A", 3]) == [0, 3]
    assert labels(5, ["A", "B"]) == [0, 1, 0, 1, 0]
    assert labels(None, None, seeds=[11, 12]) == philox_randint(np.array([11, 12]), 5).tolist()
    assert len(labels()) == 16


def test_classes_may_be_tensors(tiny_pipeline):
    made = tiny_pipeline(3, torch.tensor([4, 2]), steps=1, **QUIET)
    np.testing.assert_array_equal(made.labels, [4, 2, 4])
    assert tiny_pipeline(1, torch.tensor(3), steps=1, **QUIET).labels[0] == 3
    assert tiny_pipeline(1, np.array(3), steps=1, **QUIET).labels[0] == 3


def test_callback_sees_x0_and_can_stop(tiny_pipeline):
    seen = []

    def callback(step, total, t, x0):
        seen.append((step, total, t, x0.shape, x0.dtype))
        return not (len(seen) == 6)

    result = tiny_pipeline(
        6, steps=4, sampler="ddim", batch_size=2, callback=callback, guidance_scale=0, **QUIET
    )
    assert [s[0] for s in seen] == [0, 1, 2, 3, 0, 1]
    assert seen[0][1:] == (4, 999.0, (2, 3, 16, 16), np.float32)
    assert len(result) == 4 and len(result.labels) == 4 and len(result.seeds) == 4
    assert result.metadata["stopped"] == {"step": 1, "steps": 4, "image": 2}
    whole = tiny_pipeline(6, steps=4, sampler="ddim", batch_size=2, guidance_scale=0, **QUIET)
    assert np.array_equal(result.images[:2], whole.images[:2])
    assert "stopped" not in whole.metadata


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_callback_may_change_its_x0(engine):
    pipeline = Pipeline(tiny_network(), engine=engine)

    def to_pixels(step, total, t, x0):
        x0 += 1
        x0 *= 127.5

    changed = pipeline(1, steps=3, sampler="dpmpp_2m", callback=to_pixels, **QUIET)
    assert np.array_equal(changed.images, pipeline(1, steps=3, sampler="dpmpp_2m", **QUIET).images)


def test_classifier_free_guidance():
    pipeline = Pipeline(tiny_network(null_class=True))
    plain = pipeline(2, 3, steps=3, **QUIET)
    one = pipeline(2, 3, steps=3, cfg_scale=1, **QUIET)
    assert np.array_equal(plain.images, one.images)
    strong = pipeline(2, 3, steps=3, cfg_scale=4, **QUIET)
    assert not np.array_equal(plain.images, strong.images)


@pytest.mark.parametrize(
    ("steps", "sampler", "scale", "warns"),
    [(2, "ddim", 1.0, True), ("ddim2", "ddim", 1.0, False), (2, "ddim", 0.0, False)]
    + [(2, "dpmpp_2m", 1.0, False)],
)
def test_guided_ddim_warns_where_its_first_step_explodes(steps, sampler, scale, warns):
    unet = tiny_network("diffusion", noise_schedule="cosine")
    pipeline = Pipeline(unet, tiny_network("classifier"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline(1, steps=steps, sampler=sampler, guidance_scale=scale, **QUIET)
    assert [("steps='ddim2'" in str(w.message)) for w in caught] == [True] * warns


@pytest.mark.parametrize(
    ("steps", "sampler", "warns"),
    [("2,1", "dpmpp_2m", True), ("2,1", "unipc", True), ("2,1", "ddpm", False)]
    + [("2,1", "ddim", False), ("3", "dpmpp_2m", False), ("ddim3", "unipc", False)],
)
def test_sections_that_a_sampler_has_no_use_for_are_said(tiny_stack, steps, sampler, warns):
    def said(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny_stack(1, guidance_scale=0, **options, **QUIET)
        return [str(w.message).split(":")[0] for w in caught]

    assert said(steps=steps, sampler=sampler, upsampler_steps=1) == ["steps='2,1'"] * warns
    above = {"upsampler_steps": steps, "upsampler_sampler": sampler}
    assert said(steps=1, **above) == ["upsampler_steps='2,1'"] * warns


def test_unconditional_models_have_labels_only_when_guided():
    unet = tiny_network(class_cond=False)
    pipeline = Pipeline(unet, tiny_network("classifier"), settings={"guidance_scale": 1.0})
    guided = pipeline(2, 3, steps=2, **QUIET)
    assert guided.labels.tolist() == [3, 3]
    assert pipeline(2, steps=2, guidance_scale=0, **QUIET).labels is None
    assert Pipeline(unet)(2, steps=2, **QUIET).labels is None


def test_thresholding_changes_the_images(tiny_pipeline):
    runs = {
        how: tiny_pipeline(2, 1, steps=4, sampler="ddpm", thresholding=how, **QUIET).images
        for how in ("static", "dynamic", "none")
    }
    assert not np.array_equal(runs["static"], runs["dynamic"])
    assert not np.array_equal(runs["static"], runs["none"])


def test_the_stack_is_the_two_stages_in_turn(tiny_stack, tiny_pipeline):
    run = {"steps": 3, "seed": 4, **QUIET}
    whole = tiny_stack(3, upsampler_steps=2, upsampler_sampler="ddim", **run)
    assert whole.images.shape == (3, 32, 32, 3)
    base = tiny_pipeline(3, **run)
    up = tiny_stack.upscale(
        base.images, base.labels, steps=2, sampler="ddim", seeds=base.seeds, progress=False
    )
    assert np.array_equal(up.images, whole.images) and np.array_equal(up.labels, whole.labels)
    split = tiny_stack.upscale(
        base.images, base.labels, steps=2, sampler="ddim", seed=4, batch_size=1, progress=False
    )
    assert np.abs(split.images.astype(int) - whole.images).max() <= 1
    told = whole.metadata["upsampler"]
    assert (told["sampler"], told["timesteps"]) == ("ddim", [999.0, 0.0])
    assert len(whole.metadata["timesteps"]) == 3


def test_the_upsampler_sees_the_published_values_and_other_noise(tiny_stack, monkeypatch):
    inner, calls = tiny_stack._upscaler.engine, []

    class Spy:
        def __getattr__(self, name):
            return getattr(inner, name)

        def denoise(self, x, t, y=None, low_res=None):
            calls.append((x.copy(), y, low_res))
            return inner.denoise(x, t, y, low_res)

    monkeypatch.setattr(tiny_stack._upscaler, "engine", Spy())
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    tiny_stack.upscale(images, [1, 4], steps=1, seed=3, progress=False)
    x, y, low = calls[0]
    expected = images.transpose(0, 3, 1, 2) / 127.5 - 1
    assert np.abs(low - expected).max() < 1e-6 and y.tolist() == [1, 4]
    base_noise = ops.philox_normal(image_seeds(3, 2), (3, 32, 32))
    assert np.abs(np.corrcoef(x.ravel(), base_noise.ravel())[0, 1]) < 0.1


def test_stopping_in_the_base_stage_skips_the_upsampler(tiny_stack):
    result = tiny_stack(2, steps=3, callback=lambda step, *rest: step < 1, **QUIET)
    assert result.images.shape == (2, 16, 16, 3) and "upsampler" not in result.metadata


def test_save_pretrained_round_trip(tiny_stack, tmp_path):
    folder = tiny_stack.save_pretrained(tmp_path / "stack")
    back = Pipeline.from_pretrained(folder)
    assert back.class_names == list(TINY_CLASSES)
    run = {"classes": "B", "steps": 2, **QUIET}
    assert np.array_equal(back(2, **run).images, tiny_stack(2, **run).images)
    half = tiny_stack.save_pretrained(tmp_path / "half", dtype="float16")
    assert half.stat() and Pipeline.from_pretrained(half)(1, steps=1, **QUIET).images.any()
    with pytest.raises(ValueError, match="not empty"):
        tiny_stack.save_pretrained(folder)


def test_parts_can_be_left_out_or_replaced(tiny_folder, tiny_upsampler_folder):
    assert Pipeline.from_pretrained(tiny_folder).classifier is not None
    bare = Pipeline.from_pretrained(tiny_folder, classifier="none")
    assert bare.classifier is None
    assert bare(1, steps=1, **QUIET).metadata["guidance_scale"] == 0
    stack = Pipeline.from_pretrained(tiny_folder, upsampler=tiny_upsampler_folder)
    assert stack(1, steps=1, **QUIET).images.shape == (1, 32, 32, 3)
    alone = Pipeline.from_pretrained(tiny_upsampler_folder)
    with pytest.raises(ValueError, match=r"upsampler: call upscale\(images\)"):
        alone(1)


def test_sample_is_the_whole_in_one_call(tiny_folder, tmp_path):
    run = {"steps": 2, "seed": 3, **QUIET}
    result = adm_rt.sample(tiny_folder, classes=["A", "B"], output=tmp_path / "x.npz", **run)
    assert result.labels.tolist() == [0, 1]
    assert np.array_equal(adm_rt.load(tiny_folder)(classes=["A", "B"], **run).images, result.images)
    assert np.array_equal(adm_rt.SampleResult.load(tmp_path / "x.npz").images, result.images)


def test_half_precision_models_say_that_float32_is_used():
    pipeline = Pipeline(tiny_network(use_fp16=True))
    assert pipeline.notes == ["the model asks for use_fp16; float32 is used"]


def test_automatic_batch_size():
    assert automatic_batch_size(16, 1 << 20, 1 << 30) == 16
    assert automatic_batch_size(500, 1 << 20, 8 << 30) == 32
    assert automatic_batch_size(16, 1 << 30, 8 << 30) == 2
    assert automatic_batch_size(16, 1 << 40, 1 << 30) == 1


def test_zoo_names_bring_their_classifier_scale_and_class_names(tmp_path, monkeypatch, capsys):
    from adm_rt import cli, locate
    from adm_rt.models import save_model

    names = list(TINY_CLASSES)
    metadata = {"classifier": "toy_classifier", "guidance_scale": 3.5, "sampler": "ddpm"}
    save_model(tmp_path / "toy", tiny_network(), class_names=names, metadata=metadata)
    save_model(tmp_path / "toy_classifier", tiny_network("classifier", seed=1))
    monkeypatch.setattr(locate, "ZOO", tmp_path)
    assert locate.zoo_models() == ["toy", "toy_classifier"]
    assert locate.zoo_models("diffusion") == ["toy"]
    result = adm_rt.sample("toy", classes=["D", "A"], steps=2, **QUIET)
    assert result.labels.tolist() == [3, 0]
    assert result.metadata["guidance_scale"] == 3.5
    assert result.metadata["sampler"] == "ddpm"
    other = adm_rt.sample("toy", 1, steps=2, sampler="dpmpp_2m", **QUIET)
    assert other.metadata["sampler"] == "dpmpp_2m"
    assert (result.metadata["model"], result.metadata["classifier"]) == ("toy", "toy_classifier")
    with pytest.raises(ValueError, match=r"shipped model \(toy\).*Did you mean 'toy"):
        adm_rt.load("toyy")
    assert cli.main(["info", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["default_settings"]["class_names"] == names
    # a path is a path: a folder of the same name elsewhere is asked for with ./
    monkeypatch.chdir(tmp_path)
    assert adm_rt.load("./toy_classifier/../toy").num_classes == 5
