"""The TensorRT engine on a GPU: against the torch engine, as a graph, refitted. Not run yet."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_network

from adm_rt.diffusion import Diffusion
from adm_rt.engines import tensorrt_adapter, tensorrt_plugins
from adm_rt.engines.tensorrt_adapter import Profile
from adm_rt.engines.tensorrt_cache import EngineCache
from adm_rt.engines.torch_engine import TorchEngine
from adm_rt.errors import MissingExtraError
from adm_rt.samplers import SAMPLERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LIMITS = {"float32": 2e-5, "float16": 2e-2, "bfloat16": 2e-1}  # of the largest value


@pytest.fixture(autouse=True)
def float32_convolutions():
    """torch's are TF32 by default, TensorRT's here are not."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def library():
    try:
        return tensorrt_adapter.library()
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return EngineCache(tmp_path_factory.mktemp("cache") / "tensorrt")


# A library with our plugins stays for the life of a process, so functions come first.
@pytest.fixture(scope="module", params=["functions", "plugins"])
def ops(request, library):
    try:
        return tensorrt_plugins.choose_ops(library, request.param)[0]
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def networks():
    return tiny_network(), tiny_network("classifier", seed=1)


def make(networks, library, cache, ops, dtype="float16", **options):
    from adm_rt.engines.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(
        *networks, dtype=dtype, library=library, cache=cache, ops=ops, batch="1,2,4", **options
    )


def inputs(count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    return x.cuda(), (torch.arange(count) % 5).cuda()


def error(ours, expected):
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", LIMITS)
def test_networks_say_what_torch_says(networks, library, cache, ops, dtype):
    engine, exact = make(networks, library, cache, ops, dtype), TorchEngine(*networks, "cuda")
    for count in (1, 2, 4):
        x, y = inputs(count)
        assert error(engine.denoise(x, 400.0, y), exact.denoise(x, 400.0, y)) <= LIMITS[dtype]
        ours, expected = (e.classifier_gradient(x, 400.0, y) for e in (engine, exact))
        assert error(ours, expected) <= LIMITS[dtype]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "unipc"])
def test_a_captured_run_is_the_run_step_by_step(networks, library, cache, ops, sampler):
    engine, diffusion = make(networks, library, cache, ops), Diffusion(timestep_respacing="6")
    for seeds in (np.array([1, 2]), np.array([3, 4])):
        x, y = inputs(2)
        run = engine.run_captured(SAMPLERS[sampler], x, diffusion, y, 0.5, noise=seeds)
        assert run is not None, engine.notes
        plain = SAMPLERS[sampler](engine, x, diffusion, y, 0.5, noise=seeds)
        assert run.finite and error(run.x, plain) <= 1e-5


def test_refitted_networks_say_what_torch_says(networks, library, cache, ops):
    engine = make(networks, library, cache, ops, refit=True)
    x, y = inputs(2)
    engine.denoise(x, 400.0, y)
    other = tiny_network(seed=5), tiny_network("classifier", seed=6)
    engine.refit(*other)
    exact = TorchEngine(*other, "cuda")
    assert error(engine.denoise(x, 400.0, y), exact.denoise(x, 400.0, y)) <= LIMITS["float16"]


def test_an_engine_file_loads_in_the_next_engine(networks, library, cache, ops):
    engine = make(networks, library, cache, ops)
    x, y = inputs(2)
    first = engine.denoise(x, 400.0, y)
    facts = engine._builder.facts("unet", Profile(1, 2, 4))
    assert cache.get(facts) is not None
    again = make(networks, library, EngineCache(cache.folder), ops)
    assert torch.equal(again.denoise(x, 400.0, y), first)
