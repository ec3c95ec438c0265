"""The torch engine on the GPU: its networks against float64, and runs as replays of CUDA graphs:
the same bits again, and no wait for the host from step to step."""

import collections

import devices
import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from tiny_models import tiny_network

from adm_rt import ops
from adm_rt.diffusion import Diffusion
from adm_rt.engines.torch_engine import TorchEngine
from adm_rt.models.classifier_gradient import ClassifierGradient
from adm_rt.samplers import SAMPLERS

devices.require()

ON_CPU = devices.NAME == "cpu"  # only to try the tests: small, few steps, one type
FLAGS = {"num_channels": 64, "num_head_channels": 64, "image_size": 32, "num_res_blocks": 2}
FLAGS = {} if ON_CPU else {**FLAGS, "attention_resolutions": "16"}
SIZE, STEPS = (16, 2) if ON_CPU else (32, 6)
# Against float64: root mean square, relative.
LIMITS = {"float32": 3e-5, "bfloat16": 5e-2, "float16": 8e-3}
DTYPES = list(LIMITS)[:1] if ON_CPU else list(LIMITS)
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@pytest.fixture(scope="module")
def networks():
    return tiny_network(seed=1, **FLAGS), tiny_network("classifier", seed=3, **FLAGS)


def make(networks, device, dtype=DTYPES[-1], **options):
    gpu = FakeGpu() if device.type == "cpu" else None
    return TorchEngine(*networks, device=str(device), dtype=dtype, gpu=gpu, **options)


def batch(device, count=3, seed=5):
    g = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(count, 3, SIZE, SIZE, generator=g),
        torch.randint(0, 5, (count,), generator=g),
    )
    return x.to(device), y.to(device)


def relative(found, exact):
    found, exact = found.double().cpu(), exact.double().cpu()
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_networks_against_float64(device, networks, dtype):
    engine = make(networks, device, dtype)
    x, y = batch(device)
    found = engine.denoise(x, 321.0, y), engine.classifier_gradient(x, 321.0, y)
    unet = tiny_network(seed=1, **FLAGS).double()
    classifier = tiny_network("classifier", seed=3, **FLAGS).double()
    arguments = x.cpu().double(), torch.full((len(x),), 321.0), y.cpu()
    with torch.no_grad(), ops.use_reference():
        exact = unet(*arguments), ClassifierGradient(classifier)(*arguments)
    for name, mine, best in zip(("denoise", "gradient"), found, exact, strict=True):
        assert mine.dtype == torch.float32 and mine.isfinite().all()
        error = relative(mine, best)
        assert error <= LIMITS[dtype], f"{name} in {dtype}: {error:.3g} against float64"


def run(engine, device, sampler="ddim", steps=STEPS, seeds=(1, 2, 3), captured=True, **options):
    x, y = batch(device)
    arguments = (x, Diffusion(timestep_respacing=str(steps)), y, 1.5)
    options["noise"] = np.array(seeds)
    if not captured:
        return SAMPLERS[sampler](engine, *arguments, **options)
    found = engine.run_captured(SAMPLERS[sampler], *arguments, **options)
    assert found is not None, engine.notes
    assert found.finite
    return found.x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sampler, options",
    [
        ("ddim", {}),
        ("ddpm", {"clip": "dynamic"}),
        ("dpmpp_2m", {"guidance_interval": (200, 800), "guidance_every": 2}),
        ("unipc", {"cfg_scale": 1.5, "null_label": 4}),
    ],
)
def test_replays_are_the_single_steps_and_repeat(device, networks, sampler, options, dtype):
    engine = make(networks, device, dtype)
    first = run(engine, device, sampler, **options)
    for _ in range(3):
        assert torch.equal(run(engine, device, sampler, **options), first)
    other = run(engine, device, sampler, seeds=(7, 8, 9), **options)
    assert torch.equal(other, first) == (sampler != "ddpm")
    assert torch.equal(run(engine, device, sampler, **options), first)
    plain = run(engine, device, sampler, captured=False, **options)
    distance = relative(first, plain)
    assert distance <= 1e-2, f"{sampler}, {dtype}: replays are {distance:.3g} from single steps"


def test_a_new_recording_gives_the_same_bits(device, networks):
    engine = make(networks, device)
    first = run(engine, device)
    run(engine, device, "ddpm")  # another one is kept now
    assert torch.equal(run(engine, device), first)


def test_other_streams(gpu, networks):
    engine = make(networks, gpu)
    expected = run(engine, gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(engine, gpu)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
    assert torch.cuda.current_stream() != stream


def test_no_step_waits_for_the_host(gpu, networks):
    """Twice as many steps: as many more graph launches, and not one wait more."""
    engine, seen = make(networks, gpu), {}
    for steps in (4, 12):
        run(engine, gpu, steps=steps)  # recorded
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run(engine, gpu, steps=steps)
        seen[steps] = collections.Counter(event.name for event in profile.events())

    def calls(steps, name):  # a version may follow: cudaGraphLaunch_v10000
        return sum(count for other, count in seen[steps].items() if other.startswith(name))

    if not calls(12, "cudaGraphLaunch"):
        pytest.skip(f"the profiler sees no CUDA calls here: {sorted(seen[12])[:20]}")
    assert (calls(4, "cudaGraphLaunch"), calls(12, "cudaGraphLaunch")) == (4, 12)
    for name in WAITS:
        assert calls(12, name) == calls(4, name), f"{name}: {calls(4, name)}, {calls(12, name)}"


def test_replays_alone_synchronise_nothing(gpu, networks):
    engine = make(networks, gpu)
    run(engine, gpu)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for replay in engine._runs._recorded._replays:
            replay()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()


def test_after_a_recording_that_broke_off_single_steps_go_on(gpu, networks, monkeypatch):
    expected = run(make(networks, gpu), gpu, captured=False)
    engine, denoise = make(networks, gpu), TorchEngine.denoise

    def waits(self, x, *arguments):
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return denoise(self, x, *arguments)

    x, y = batch(gpu)
    with monkeypatch.context() as patched:
        patched.setattr(TorchEngine, "denoise", waits)
        arguments = (x, Diffusion(timestep_respacing="6"), y, 1.5)
        assert engine.run_captured(SAMPLERS["ddim"], *arguments) is None
    assert "one by one" in engine.notes[-1]
    assert torch.equal(run(engine, gpu, captured=False), expected)
    assert torch.equal(run(make(networks, gpu), gpu), run(make(networks, gpu), gpu))
