"""Runs as replays of recorded steps: the same bits as step by step, on a GPU made of CPU memory."""

import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from tiny_models import tiny_network

from adm_rt import Pipeline
from adm_rt.diffusion import Diffusion
from adm_rt.engines.captured_run import RunRecorder
from adm_rt.engines.torch_engine import TorchEngine
from adm_rt.samplers import SAMPLERS

OPTIONS = [  # sampler, options, how many kinds of step
    ("ddpm", {}, 1),
    ("ddpm", {"clip": "dynamic"}, 1),
    ("ddim", {"eta": 0.7, "guidance_interval": (200, 800), "guidance_every": 2}, 3),
    ("ddim", {"guidance_every": 3, "clip": "none"}, 2),
    ("ddim_reverse", {}, 1),
    ("dpmpp_2m", {}, 1),
    ("dpmpp_2m", {"clip": "dynamic", "quantile": 0.9, "guidance_interval": (300, 999)}, 2),
    ("dpmpp_2m", {"cfg_scale": 2.0, "null_label": 4}, 1),
    ("dpmpp_2m", {"cfg_scale": 2.0, "null_label": 4, "guidance_interval": (0, 500)}, 2),
    ("unipc", {}, 1),
    ("unipc", {"clip": "none", "guidance_every": 2}, 2),
]


class Simple:
    """An engine whose networks are a line each; x, t and y all count."""

    def __init__(self, gpu=None, channels=6):
        self.notes, self._channels = [], channels
        self.recorder = RunRecorder(self, gpu or FakeGpu(), channels)
        self.run_captured = self.recorder.run

    def denoise(self, x, t, y=None, low_res=None):
        t = t.reshape(-1, 1, 1, 1) if isinstance(t, torch.Tensor) else torch.tensor(t)
        shift = t.float() / 1000 + (0 if y is None else y.reshape(-1, 1, 1, 1) / 7)
        if low_res is not None:
            shift = shift + torch.nn.functional.interpolate(low_res, x.shape[2:])
        return torch.cat([torch.tanh(x + shift)] * (self._channels // 3), 1)

    def classifier_gradient(self, x, t, y):
        t = t.reshape(-1, 1, 1, 1) if isinstance(t, torch.Tensor) else torch.tensor(t)
        return torch.sin(x * (y.reshape(-1, 1, 1, 1) + 1) + t.float() / 500)


@pytest.fixture(scope="module")
def networks():
    return tiny_network(), tiny_network("classifier")


def make(networks, gpu=None, **options):
    return TorchEngine(*networks, gpu=gpu or FakeGpu(), **options)


def batch(count=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=g), torch.randint(0, 5, (count,), generator=g)


def run_both(engine, sampler, seeds=(3, 4), scale=0.5, diffusion=None, **options):
    """(captured, step by step, timesteps of the latter) of one run."""
    diffusion = diffusion or Diffusion(timestep_respacing="6")
    x, y = batch(len(seeds))
    arguments = (x, diffusion, y, scale)
    seeds = np.array(seeds, np.int64)
    run = engine.run_captured(SAMPLERS[sampler], *arguments, noise=seeds, **options)
    seen = []
    options["callback"] = lambda step, total, t, x0: seen.append(t)
    return run, SAMPLERS[sampler](engine, *arguments, noise=seeds, **options), seen


@pytest.mark.parametrize("sampler, options, kinds", OPTIONS)
def test_replays_give_the_bits_of_single_steps(sampler, options, kinds):
    gpu = FakeGpu()
    engine = Simple(gpu)
    for seeds in ((3, 4), (8, 9), (3, 4)):
        run, plain, timesteps = run_both(engine, sampler, seeds, **options)
        assert run is not None, engine.notes
        assert torch.equal(run.x, plain) and run.finite
        assert run.timesteps == timesteps and len(timesteps) == 6
    assert (gpu.captures, gpu.replays) == (kinds, 18) and not engine.notes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_torch_engine(networks, dtype):
    gpu = FakeGpu()
    engine = make(networks, gpu, dtype=dtype)
    for seeds in ((3, 4), (8, 9)):
        run, plain, _ = run_both(engine, "ddpm", seeds, diffusion=Diffusion(timestep_respacing="2"))
        assert torch.equal(run.x, plain) and run.finite
    assert (gpu.captures, gpu.replays) == (1, 4) and not engine.notes


@pytest.mark.parametrize("predicts", ["xstart", "previous"])
def test_networks_that_predict_something_else(predicts):
    flags = {"predict_xstart": True} if predicts == "xstart" else {"predict_previous": True}
    diffusion = Diffusion(timestep_respacing="6", **flags)
    for options in ({}, {"cfg_scale": 1.5, "null_label": 4}):
        run, plain, _ = run_both(Simple(), "ddpm", diffusion=diffusion, **options)
        assert torch.equal(run.x, plain)


def test_an_image_is_its_seeds_in_every_batch():
    engine = Simple()
    x, y = batch(3)
    diffusion = Diffusion(timestep_respacing="4")

    def run(rows, seeds):
        arguments = (x[rows], diffusion, y[rows], 0.5)
        return engine.run_captured(SAMPLERS["ddpm"], *arguments, noise=np.array(seeds)).x

    together, alone = run(slice(0, 3), [7, 8, 9]), run(slice(1, 2), [8])
    assert torch.equal(together[1:2], alone)
    assert not torch.allclose(alone, run(slice(1, 2), [5]), atol=1e-3)


def test_what_is_recorded_anew():
    gpu = FakeGpu()
    engine = Simple(gpu)
    for change in (
        {},
        {"seeds": (1, 2, 3)},
        {"scale": 0.0},
        {"clip": "none"},
        {"diffusion": Diffusion(timestep_respacing="4")},
    ):
        before = gpu.captures
        run, plain, _ = run_both(engine, "ddim", **change)
        assert torch.equal(run.x, plain) and gpu.captures == before + 1
    assert gpu.branches > 0


def test_networks_in_turn(networks):
    gpu = FakeGpu()
    engine = make(networks, gpu, branches=False)
    run, plain, _ = run_both(engine, "ddim", diffusion=Diffusion(timestep_respacing="2"))
    assert torch.equal(run.x, plain) and gpu.branches == 0


def test_without_guidance_the_classifier_is_not_asked():
    gpu = FakeGpu()
    engine = Simple(gpu)
    run, plain, _ = run_both(engine, "dpmpp_2m", scale=0.0)
    assert torch.equal(run.x, plain) and gpu.branches == 0


def test_an_upsampler():
    engine = make((tiny_network("upsampler"),))
    low, y = batch()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    arguments = (x, Diffusion(timestep_respacing="2"), y, 0.0)
    options = {"noise": np.array([1, 2]), "low_res": low}
    run = engine.run_captured(SAMPLERS["ddpm"], *arguments, **options)
    assert torch.equal(run.x, SAMPLERS["ddpm"](engine, *arguments, **options))


def test_fresh_noise_in_each_run_without_seeds():
    engine = Simple()
    x, y = batch()
    arguments = (SAMPLERS["ddpm"], x, Diffusion(timestep_respacing="4"), y, 0.5)
    first, second = (engine.run_captured(*arguments).x for _ in range(2))
    assert not torch.allclose(first, second)


def test_nothing_of_a_run_that_went_wrong_stays():
    engine = Simple()
    x, y = batch()
    arguments = (Diffusion(timestep_respacing="5"), y, 0.5)
    for sampler in ("unipc", "ddim"):
        good = engine.run_captured(SAMPLERS[sampler], x, *arguments)
        bad = engine.run_captured(SAMPLERS[sampler], x * float("nan"), *arguments)
        assert good.finite and not bad.finite
        again = engine.run_captured(SAMPLERS[sampler], x, *arguments)
        assert again.finite and torch.equal(again.x, good.x)


@pytest.mark.parametrize("inference", [True, False])
def test_the_mode_of_the_first_caller_does_not_matter(inference):
    engine = Simple()
    with torch.inference_mode(inference):
        first = run_both(engine, "dpmpp_2m")[0]
    with torch.inference_mode(not inference):
        assert torch.equal(run_both(engine, "dpmpp_2m")[0].x, first.x)


# ---- what cannot be recorded ----


def test_what_waits_for_the_gpu_is_left_to_single_steps(monkeypatch, capsys):
    run = Simple.denoise

    def waits(self, x, t, y=None, low_res=None):
        float(x.sum())
        return run(self, x, t, y, low_res)

    monkeypatch.setattr(Simple, "denoise", waits)
    gpu = FakeGpu()
    engine = Simple(gpu)
    assert run_both(engine, "ddim")[0] is None
    assert "one by one" in engine.notes[-1] and "stream is capturing" in capsys.readouterr().err
    gpu.can_capture = False
    assert run_both(engine, "ddim")[0] is None and len(engine.notes) == 1  # not tried again


def heun(engine, x, diffusion, y, guidance_scale, **options):
    from adm_rt.samplers.ddim import coefficients
    from adm_rt.samplers.guided_step import GuidedRun

    run = GuidedRun(engine, x, diffusion, y, timesteps=[500.0], **options)
    engine.denoise(x, 500.0, y)
    engine.denoise(x, 400.0, y)
    return run.step(0, x, coefficients(diffusion, 0)).x


def test_a_sampler_of_another_form_is_left_to_single_steps():
    engine = Simple()
    x, y = batch()
    for _ in range(2):
        assert engine.run_captured(heun, x, Diffusion(timestep_respacing="4"), y, 0.0) is None
        assert "asked at several places in one step" in engine.notes[-1]
    assert len(engine.notes) == 1  # not once a batch
    assert run_both(engine, "ddim")[0] is not None  # others go on


def test_given_noise_is_left_to_single_steps():
    engine = Simple()
    x, y = batch()
    noise = [torch.zeros_like(x)] * 4
    diffusion = Diffusion(timestep_respacing="4")
    assert engine.run_captured(SAMPLERS["ddpm"], x, diffusion, y, 0.0, noise=noise) is None


def test_wrong_arguments_are_the_samplers_errors(networks):
    engine = make(networks)
    x, y = batch()
    arguments = (SAMPLERS["ddim"], x, Diffusion(timestep_respacing="4"))
    with pytest.raises(ValueError, match="needs labels"):
        engine.run_captured(*arguments, None, 1.0)
    with pytest.raises(ValueError, match="eta=2"):
        engine.run_captured(*arguments, y, 1.0, eta=2)
    with pytest.raises(ValueError, match="y is missing"):
        engine.run_captured(*arguments, None, 0.0)


def test_graphs_can_be_switched_off_and_the_cpu_has_none(networks):
    x, y = batch()
    for engine in (make(networks, graph=False), TorchEngine(*networks)):
        assert engine.run_captured(SAMPLERS["ddim"], x, Diffusion(), y, 0.0) is None


# ---- in a pipeline ----


def test_a_pipeline_replays_unless_somebody_watches(networks, monkeypatch):
    gpu = FakeGpu()

    def create(name, unet, classifier=None, device="auto", dtype="auto"):
        return TorchEngine(unet, classifier, dtype="bfloat16", gpu=gpu)

    monkeypatch.setattr("adm_rt.pipeline.engines.create", create)
    monkeypatch.setattr("adm_rt.trajectory.free_memory", lambda device: 8 << 30)
    pipeline = Pipeline(*networks, name="tiny", settings={"guidance_scale": 0.5}, engine="torch")
    options = {"steps": 2, "batch_size": 2, "progress": False, "sampler": "dpmpp_2m"}
    replayed = pipeline(3, **options)
    assert (gpu.captures, gpu.replays) == (2, 4)  # batches of 2 and 1, two steps each
    seen = []
    watched = pipeline(3, callback=lambda step, total, t, x0: seen.append(t), **options)
    assert gpu.replays == 4 and np.array_equal(replayed.images, watched.images)
    assert replayed.metadata["timesteps"] == watched.metadata["timesteps"] == seen[:2]
