"""The TensorRT engine on fakes: which engines it builds, what it gives them, runs as graphs."""

import sys

import fake_tensorrt
import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from fake_graphs import exported
from tiny_models import tiny_config, tiny_network

from adm_rt import engines
from adm_rt.diffusion import Diffusion
from adm_rt.engines import tensorrt_adapter
from adm_rt.engines.tensorrt_adapter import TensorRT
from adm_rt.engines.tensorrt_cache import EngineCache
from adm_rt.engines.tensorrt_engine import TensorRTEngine
from adm_rt.errors import EngineError, MissingExtraError, NonFiniteError
from adm_rt.samplers import SAMPLERS

SIZE = 16


@pytest.fixture(params=fake_tensorrt.VERSIONS, ids=["-".join(v) for v in fake_tensorrt.VERSIONS])
def trt(request):
    return fake_tensorrt.make(*request.param)


@pytest.fixture
def ten():
    return fake_tensorrt.make("tensorrt", "10.16.1")


@pytest.fixture
def networks(tmp_path):
    return exported(tmp_path / "exported")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


def make(trt, networks, cache, gpu=None, **options):
    options = {"ops": "functions", **options}
    return TensorRTEngine(
        *networks, library=TensorRT(trt), gpu=gpu or FakeGpu(), cache=cache, **options
    )


def builds(trt):
    """Batch profiles of the builds so far."""
    return [[n[0] for n in c[2]["x"]] for c in trt.calls if c[0] == "build"]


def batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return x, torch.arange(count) % 5


def expected(x, t, y, scale, channels=6):
    out = scale * x + (t / 1000 + y / 100)[:, None, None, None]
    return torch.cat([out] * (channels // 3), 1)


def test_both_networks_run_with_every_version(trt, networks, cache):
    engine = make(trt, networks, cache)
    assert (engine.name, engine.device, engine.dtype) == ("tensorrt", "cuda:0", "float16")
    assert isinstance(engine, engines.Engine)
    for count in (1, 3):
        x, y = batch(count)
        assert torch.allclose(engine.denoise(x, 250.0, y), expected(x, 250.0, y, 0.5))
        gradient = engine.classifier_gradient(x, 250.0, y)
        assert torch.allclose(gradient, expected(x, 250.0, y, -0.1, 3))
    assert builds(trt) == [[1, 8, 32]] * 2  # one for each network
    assert {c[1] for c in trt.calls if c[0] == "run"} == {5}  # all on the one stream


def test_strided_and_double_images_are_made_what_an_engine_reads(ten, networks, cache):
    engine = make(ten, networks, cache)
    x, y = batch(2)
    plain = engine.denoise(x, 100.0, y)
    strided = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(engine.denoise(strided, 100.0, y), plain)
    assert torch.equal(engine.denoise(x.double(), 100.0, y.int()), plain)


def test_engines_are_built_once_and_found_by_the_next_process(ten, networks, cache):
    x, y = batch(2)
    make(ten, networks, cache).denoise(x, 1.0, y)
    again = make(ten, networks, EngineCache(cache.folder))
    again.denoise(x, 1.0, y)
    assert len(builds(ten)) == 1


@pytest.mark.parametrize("what", ["weights", "gpu", "version", "refit", "ops"])
def test_another_key_is_another_engine(ten, networks, cache, tmp_path, what, monkeypatch):
    x, y = batch(2)
    make(ten, networks, cache).denoise(x, 1.0, y)
    options, gpu, library = {}, FakeGpu(), ten
    if what == "weights":
        networks = exported(tmp_path / "other", unet_scale=0.25)
    elif what == "gpu":
        gpu = FakeGpu("NVIDIA L4 sm_89")
    elif what == "version":
        library = fake_tensorrt.make("tensorrt", "10.16.2")
    elif what == "refit":
        options["refit"] = True
    else:
        from adm_rt.engines import tensorrt_plugins

        monkeypatch.setattr(tensorrt_plugins, "_registered", {})
        monkeypatch.setattr(tensorrt_plugins, "_missing_launchers", lambda: "")
        options["ops"] = "plugins"
    make(library, networks, cache, gpu, **options).denoise(x, 1.0, y)
    assert len(builds(ten)) + (0 if library is ten else len(builds(library))) == 2


def test_an_rtx_engine_serves_every_gpu_of_its_range(networks, cache):
    rtx = fake_tensorrt.make("tensorrt_rtx", "1.7.1")
    x, y = batch(1)
    for gpu in ("NVIDIA L4 sm_89", "NVIDIA RTX 5090 sm_120"):
        make(rtx, networks, cache, FakeGpu(gpu)).denoise(x, 1.0, y)
    assert len(builds(rtx)) == 1


def test_the_narrowest_engine_of_the_cache_is_taken(ten, networks, cache):
    x, y = batch(4)
    for profile in ("4", "2,4,8"):
        make(ten, networks, cache, batch=profile).denoise(x, 1.0, y)
    assert builds(ten) == [[4, 4, 4], [2, 4, 8]]
    engine = make(ten, networks, cache)
    for count, loaded in ((4, 1), (3, 2), (8, 2)):
        engine.denoise(*(lambda x, y: (x, 1.0, y))(*batch(count)))
        assert len(engine._networks["unet"]._loaded) == loaded
    assert len(builds(ten)) == 2
    engine.denoise(*(lambda x, y: (x, 1.0, y))(*batch(1)))  # none has it
    engine.denoise(*(lambda x, y: (x, 1.0, y))(*batch(33)))  # nor the default
    assert builds(ten)[2:] == [[1, 8, 32], [33, 33, 33]]


def test_a_profile_that_was_asked_for_holds(ten, networks, cache):
    engine = make(ten, networks, cache, batch=4)
    x, y = batch(3)
    with pytest.raises(
        ValueError, match="batches of 4 to 4 images, not 3; give another batch_size"
    ):
        engine.denoise(x, 1.0, y)
    assert builds(ten) == []


def test_a_cached_engine_that_does_not_load_is_built_again(ten, networks, cache):
    x, y = batch(1)
    engine = make(ten, networks, cache)
    facts = engine._builder.facts("unet", tensorrt_adapter.Profile(1, 8, 32))
    cache.put(facts, b'{"by": "another driver"}')
    assert torch.allclose(engine.denoise(x, 1.0, y), expected(x, 1.0, y, 0.5))
    assert len(builds(ten)) == 1
    assert "built again: tensorrt 10.16.1 cannot load" in cache.notes[0]


def test_an_engine_that_never_loads_is_an_error_not_a_loop(ten, networks, cache):
    ten.fail["load"] = "the driver is too old"
    x, y = batch(1)
    with pytest.raises(EngineError, match="the driver is too old"):
        make(ten, networks, cache).denoise(x, 1.0, y)
    assert len(builds(ten)) == 2


def test_with_the_cache_off_engines_live_for_the_process_alone(ten, networks):
    engine = make(ten, networks, EngineCache(None))
    assert "the cache is off" in engine.notes[0]
    x, y = batch(1)
    engine.denoise(x, 1.0, y)
    engine.denoise(x, 2.0, y)
    assert len(builds(ten)) == 1


def test_a_changed_onnx_file_is_not_built(ten, networks, cache):
    networks[0].path.write_text(networks[0].path.read_text().replace("0.5", "0.6"))
    x, y = batch(1)
    with pytest.raises(ValueError, match="damaged or was changed"):
        make(ten, networks, cache).denoise(x, 1.0, y)


def test_the_timing_cache_goes_from_build_to_build(ten, networks, cache):
    engine = make(ten, networks, cache)
    x, y = batch(1)
    engine.denoise(x, 1.0, y)
    engine.classifier_gradient(x, 1.0, y)
    assert [c[1] for c in ten.calls if c[0] == "timing"] == [b"", b"+"]


# ---- networks that are not exported ----


@pytest.fixture
def exporter(monkeypatch):
    """``export_model`` as a fake; the list of its calls."""
    from fake_graphs import write_graphs

    calls = []

    def export_model(unet, folder, classifier=None, dtype="float32"):
        calls.append((unet.cfg.kind, classifier is not None, dtype))
        cfgs = {"unet": unet.cfg}
        if classifier is not None:
            cfgs["classifier_gradient"] = classifier.cfg
        return write_graphs(folder, cfgs=cfgs, dtype=dtype)

    monkeypatch.setattr("adm_rt.export.exporter.export_model", export_model)
    return calls


def test_modules_are_exported_once_and_only_for_a_build(ten, cache, exporter, tmp_path):
    networks = tiny_network(), tiny_network("classifier")
    x, y = batch(2)
    engine = make(ten, networks, cache)
    assert exporter == []
    assert torch.allclose(engine.denoise(x, 1.0, y), expected(x, 1.0, y, 0.5))
    assert torch.allclose(engine.classifier_gradient(x, 1.0, y), expected(x, 1.0, y, -0.1, 3))
    assert exporter == [("diffusion", True, "float16")]
    assert engine._builder.sources._made is None  # what was exported is gone again
    make(ten, networks, cache).denoise(x, 1.0, y)
    assert len(exporter) == 1
    with torch.no_grad():
        next(networks[0].parameters()).add_(1)
    make(ten, networks, cache, dtype="float32").denoise(x, 1.0, y)
    assert exporter[1:] == [("diffusion", True, "float32")] and len(builds(ten)) == 3


def test_an_upsampler_gets_its_small_images(ten, cache, exporter):
    upsampler = tiny_network("upsampler")
    engine = make(ten, (upsampler,), cache)
    x, low = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 16, 16)
    y = torch.tensor([2])
    assert torch.allclose(engine.denoise(x, 1.0, y, low), expected(x, 1.0, y, 0.5))
    (inputs,) = [c[2] for c in ten.calls if c[0] == "build"]
    assert inputs["low_res"] == tuple((n, 3, 16, 16) for n in (1, 8, 32))
    with pytest.raises(ValueError, match="low_res is missing"):
        engine.denoise(x, 1.0, y)


# ---- refit ----


def test_an_engine_in_use_takes_other_weights(trt, networks, cache, tmp_path):
    engine = make(trt, networks, cache, refit=True)
    x, y = batch(2)
    engine.denoise(x, 1.0, y)
    other = exported(tmp_path / "average", unet_scale=0.25, gradient_scale=-0.3)
    assert engine.refit(*other) == ["unet"]  # the gradient was not loaded yet
    assert torch.allclose(engine.denoise(x, 1.0, y), expected(x, 1.0, y, 0.25))
    assert torch.allclose(engine.classifier_gradient(x, 1.0, y), expected(x, 1.0, y, -0.3, 3))


@pytest.mark.parametrize("why", ["refit", "weights", "not refittable"])
def test_what_cannot_be_refitted_is_built(ten, networks, cache, tmp_path, why):
    engine = make(ten, networks, cache, refit=why != "not refittable")
    x, y = batch(2)
    engine.denoise(x, 1.0, y)
    if why != "not refittable":
        ten.fail[why] = "no such weights"
    assert engine.refit(*exported(tmp_path / "average", unet_scale=0.25)) == []
    assert torch.allclose(engine.denoise(x, 1.0, y), expected(x, 1.0, y, 0.25))
    assert len(builds(ten)) == 2
    assert "not refitted" in cache.notes[0]


def test_a_cached_engine_of_other_weights_is_refitted_instead_of_built(
    trt, networks, cache, tmp_path
):
    x, y = batch(2)
    make(trt, networks, cache, refit=True).denoise(x, 1.0, y)
    other = exported(tmp_path / "average", unet_scale=0.25)
    for _ in range(2):  # the second time it is in the cache as it is
        engine = make(trt, other, cache, refit=True)
        assert torch.allclose(engine.denoise(x, 1.0, y), expected(x, 1.0, y, 0.25))
    assert len(builds(trt)) == 1
    assert [c[0] for c in trt.calls].count("refit") == 1


def test_refitting_to_another_network_is_refused(ten, networks, cache, tmp_path):
    engine = make(ten, networks, cache, refit=True)
    wide = tiny_config(num_channels=64)
    other = exported(tmp_path / "wide", cfgs={"unet": wide})
    with pytest.raises(ValueError, match="these are other networks"):
        engine.refit(other[0])


# ---- whole runs ----


def run_both(engine, sampler, seeds=(3, 4), scale=0.5, **options):
    """(captured, step by step, timesteps of the latter) of one run."""
    diffusion = Diffusion(timestep_respacing="5")
    x, y = batch(len(seeds), seed=1)
    seeds = np.array(seeds, np.int64)
    arguments = (x, diffusion, y, scale)
    run = engine.run_captured(SAMPLERS[sampler], *arguments, noise=seeds, **options)
    seen = []
    options["callback"] = lambda step, total, t, x0: seen.append(t)
    return run, SAMPLERS[sampler](engine, *arguments, noise=seeds, **options), seen


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_captured_run_is_the_run_step_by_step(ten, networks, cache, sampler):
    gpu = FakeGpu()
    engine = make(ten, networks, cache, gpu)
    for seeds in ((3, 4), (8, 9)):
        run, plain, timesteps = run_both(engine, sampler, seeds)
        assert torch.equal(run.x, plain) and run.finite
        assert run.timesteps == timesteps and len(timesteps) >= 4
    # One step is recorded, once, and replayed for all of both runs.
    assert (gpu.captures, gpu.replays) == (1, 10)
    run_both(engine, sampler, (1, 2, 3))
    run_both(engine, sampler, (1, 2, 3), scale=0.0)
    run_both(engine, sampler, (1, 2, 3), scale=0.0, clip="none")
    assert gpu.captures == 4  # another batch, another scale, other options


@pytest.mark.parametrize(
    "sampler, options, kinds",
    [
        ("ddpm", {"clip": "dynamic"}, 1),
        # without guidance, with a new gradient, with the one before
        ("ddim", {"eta": 0.7, "guidance_interval": (200, 800), "guidance_every": 2}, 3),
        ("dpmpp_2m", {"clip": "dynamic", "quantile": 0.9}, 1),
        ("dpmpp_2m", {"cfg_scale": 2.0, "null_label": 4}, 1),
        ("unipc", {"clip": "none"}, 1),
    ],
)
def test_every_option_can_be_recorded(ten, networks, cache, sampler, options, kinds):
    gpu = FakeGpu()
    engine = make(ten, networks, cache, gpu)
    run, plain, _ = run_both(engine, sampler, **options)
    assert gpu.captures == kinds, engine.notes  # nothing waited for the GPU
    assert torch.equal(run.x, plain)


def test_what_waits_for_the_gpu_cannot_be_recorded(ten, networks, cache, monkeypatch):
    run = TensorRTEngine.denoise

    def waits(self, x, t, y=None, low_res=None):
        float(x.sum())
        return run(self, x, t, y, low_res)

    monkeypatch.setattr(TensorRTEngine, "denoise", waits)
    engine = make(ten, networks, cache)
    assert run_both(engine, "ddim")[0] is None
    assert "not permitted when stream is capturing" in engine.notes[-1]


def test_the_networks_run_before_the_recording_begins(ten, networks, cache):
    gpu = FakeGpu()
    engine, order = make(ten, networks, cache, gpu), []
    capture = gpu.capture

    def watched(warm_up, functions):
        def first():
            warm_up()
            order.extend(c[0] for c in ten.calls)
            ten.calls.clear()

        result = capture(first, functions)
        order.append("recorded")
        return result

    gpu.capture = watched
    run_both(engine, "ddim")
    assert order.count("build") == 2 and order.count("run") == 2 and order[-1] == "recorded"
    assert {c[0] for c in ten.calls} == {"run"}  # nothing is built or loaded while it records


def test_new_weights_are_recorded_anew(ten, networks, cache, tmp_path):
    gpu = FakeGpu()
    engine = make(ten, networks, cache, gpu, refit=True)
    run_both(engine, "ddim")
    engine.refit(*exported(tmp_path / "average", unet_scale=0.25))
    run, plain, _ = run_both(engine, "ddim")
    assert torch.equal(run.x, plain) and gpu.captures == 2


@pytest.mark.parametrize("why", ["torch", "library", "switch"])
def test_what_cannot_be_recorded_is_left_to_the_single_steps(networks, cache, why, capsys):
    rtx, gpu = fake_tensorrt.make("tensorrt_rtx", "1.7.1"), FakeGpu()
    gpu.can_capture = why != "torch"
    if why == "library":
        rtx.fail["capture"] = ""
    engine = make(rtx, networks, cache, gpu, graph=why != "switch")
    run, _, _ = run_both(engine, "ddim")
    assert run is None
    if why != "switch":
        assert "one by one" in engine.notes[-1] and "one by one" in capsys.readouterr().err


# ---- in a pipeline ----


@pytest.fixture
def pipeline(ten, networks, cache, monkeypatch):
    from adm_rt import Pipeline

    gpu = FakeGpu()

    def create(name, unet, classifier=None, device="auto", dtype="auto"):
        return make(ten, (unet, classifier), cache, gpu)

    monkeypatch.setattr("adm_rt.pipeline.engines.create", create)
    monkeypatch.setattr("adm_rt.trajectory.free_memory", lambda device: 8 << 30)
    made = Pipeline(*networks, name="tiny", settings={"guidance_scale": 0.5}, engine="tensorrt")
    made.gpu = gpu
    return made


def test_a_pipeline_runs_batches_as_graphs_unless_somebody_watches(pipeline):
    options = {"steps": 4, "batch_size": 2, "progress": False, "sampler": "ddpm"}
    graphs = pipeline(5, **options)
    assert (pipeline.gpu.captures, pipeline.gpu.replays) == (2, 12)  # batches of 2, 2, 1
    seen = []
    watched = pipeline(5, callback=lambda step, total, t, x0: seen.append(t), **options)
    assert pipeline.gpu.replays == 12 and len(seen) == 12
    assert np.array_equal(graphs.images, watched.images)
    assert graphs.metadata["timesteps"] == watched.metadata["timesteps"] == seen[:4]
    assert graphs.metadata["engine"] == "tensorrt" and graphs.metadata["dtype"] == "float16"


def test_the_progress_bar_counts_the_steps_of_a_graph(pipeline, capsys):
    pipeline(4, steps=4, batch_size=2, sampler="ddim")
    assert "8/8" in capsys.readouterr().err


def test_an_infinity_inside_a_graph_is_found_and_named(pipeline, monkeypatch):
    run = TensorRTEngine.denoise

    def broken(self, x, t, y=None, low_res=None):
        out = run(self, x, t, y, low_res)
        return out.index_fill(0, torch.tensor([1]), float("inf")) if t < 500 else out

    monkeypatch.setattr(TensorRTEngine, "denoise", broken)
    with pytest.raises(NonFiniteError, match="model's output is not finite in image 1 at step 3"):
        pipeline(2, steps=4, progress=False, sampler="ddim")


# ---- bad input ----


def test_what_is_missing_is_said(monkeypatch, networks):
    for name in tensorrt_adapter.MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'adm_rt\[tensorrt\]'"):
        engines.create("tensorrt", *networks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_runs_instead(ten, networks, cache):
    options = {"library": TensorRT(ten), "cache": cache}
    with pytest.raises(ValueError, match="needs an NVIDIA GPU.*engine='native'"):
        TensorRTEngine(*networks, **options)
    with pytest.raises(ValueError, match="runs on 'cuda' only.*engine='native'"):
        TensorRTEngine(*networks, device="cpu", **options)


def test_bad_arguments(ten, networks, cache):
    with pytest.raises(ValueError, match="dtype='int8' is unknown; allowed: 'auto', 'float32'"):
        make(ten, networks, cache, dtype="int8")
    with pytest.raises(ValueError, match="holds float16 graphs; use dtype='auto'"):
        make(ten, networks, cache, dtype="float32")
    with pytest.raises(ValueError, match="one is exported and the other is not"):
        make(ten, (networks[0], tiny_network("classifier")), cache)
    with pytest.raises(ValueError, match="made for 32x32"):
        make(ten, (networks[0], tiny_network("classifier", image_size=32)), cache)
    engine = make(ten, (networks[0], None), cache)
    x, y = batch(1)
    with pytest.raises(ValueError, match="needs a classifier"):
        engine.classifier_gradient(x, 1.0, y)
    with pytest.raises(ValueError, match=r"y is missing.*int64 \[1\]"):
        engine.denoise(x, 1.0)
