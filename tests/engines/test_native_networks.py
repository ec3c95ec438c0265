"""The native engine on whole networks: every configuration against float64, and the same bits in
every batch, on any number of threads and each time."""

import numpy as np
import pytest
import torch
from native_cases import CASES, inputs_of, network_of, relative_error, torch_answer
from tiny_models import tiny_network

from adm_rt import _C, engines
from adm_rt.models import ModelWeights


@pytest.fixture(params=["avx2", "avx512"])
def isa(request):
    if request.param not in _C.available_cpu_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_that_of_torch(case):
    network = network_of(case)
    engine = engines.create("native", network)
    for t, seed in ((417.25, 1), (3.0, 2)):
        x, y, low = inputs_of(network.cfg, seed=seed)
        exact = torch_answer(network, x, t, y, low, torch.float64)
        plain = relative_error(torch_answer(network, x, t, y, low, torch.float32), exact)
        ours = engine.denoise(x, t, y, low)
        assert ours.dtype == np.float32 and ours.shape == exact.shape
        error = relative_error(ours, exact)
        assert error <= 2 * plain, f"{error:.2e}, float32 torch {plain:.2e} (t={t}, seed {seed})"


def test_every_instruction_set_is_as_exact(isa):
    network = network_of("deep")
    x, y, low = inputs_of(network.cfg)
    exact = torch_answer(network, x, 99.0, y, low, torch.float64)
    plain = relative_error(torch_answer(network, x, 99.0, y, low, torch.float32), exact)
    engine = engines.create("native", network)
    assert relative_error(engine.denoise(x, 99.0, y, low), exact) <= 2 * plain


@pytest.mark.parametrize("case", ["deep", "all_old", "upsampler"])
def test_same_bits_in_every_batch_on_any_threads_and_each_time(case):
    network = network_of(case)
    engine = engines.create("native", network)
    x, y, low = inputs_of(network.cfg, count=5)
    before = _C.num_threads()
    try:
        _C.set_num_threads(1)
        expected = engine.denoise(x, 250.5, y, low)
        for threads in (1, 2, 3, 7):
            _C.set_num_threads(threads)
            again = engine.denoise(x, 250.5, y, low)
            assert again.tobytes() == expected.tobytes(), f"{threads} threads"
            for rows in (slice(0, 1), slice(2, 5)):
                part = engine.denoise(x[rows], 250.5, y[rows], None if low is None else low[rows])
                assert part.tobytes() == expected[rows].tobytes(), f"{threads} threads, {rows}"
    finally:
        _C.set_num_threads(before)


@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_gradient_is_the_torch_engines_and_the_same_bits(pool):
    unet, classifier = tiny_network(), tiny_network("classifier", pool=pool)
    x, y, _ = inputs_of(unet.cfg, count=4)
    native = engines.create("native", unet, classifier)
    ours = native.classifier_gradient(x, 300.0, y)
    torch_engine = engines.create("torch", unet, classifier)
    theirs = torch_engine.classifier_gradient(torch.from_numpy(x), 300.0, torch.from_numpy(y))
    assert relative_error(ours, theirs.double().numpy()) < 1e-5
    alone = [native.classifier_gradient(x[i : i + 1], 300.0, y[i : i + 1]) for i in range(4)]
    assert np.concatenate(alone).tobytes() == ours.tobytes()


def test_prepared_timesteps_give_the_same_bits():
    network = tiny_network()
    x, y, _ = inputs_of(network.cfg, count=3)
    times = [999.0, 640.5, 12.25, 0.0]
    plain, prepared = (engines.create("native", ModelWeights.of(network)) for _ in range(2))
    prepared.prepare(times)
    for t in [*times, 77.0]:  # the last one was not announced
        assert np.array_equal(plain.denoise(x, t, y), prepared.denoise(x, t, y))


def test_few_modulations_are_kept(monkeypatch):
    from adm_rt.engines import native_engine

    monkeypatch.setattr(native_engine, "_MODULATION_BYTES", 1)
    network = tiny_network()
    x, y, _ = inputs_of(network.cfg, count=3)
    small = engines.create("native", network)
    monkeypatch.undo()
    large = engines.create("native", network)
    for t in (5.0, 6.0, 5.0):
        assert np.array_equal(small.denoise(x, t, y), large.denoise(x, t, y))
    assert len(small._unet.modulations._rows) <= 1


def test_wrong_arguments_are_named():
    engine = engines.create("native", tiny_network(), tiny_network("classifier"))
    x, y, _ = inputs_of(tiny_network().cfg)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 16, 8\); \[N, 3, 16, 16\]"):
        engine.denoise(x[..., :8], 1, y)
    with pytest.raises(ValueError, match=r"y is missing.*0\.\.4"):
        engine.denoise(x, 1)
    with pytest.raises(ValueError, match=r"y: label 5 is not in 0\.\.4"):
        engine.denoise(x, 1, y + 5)
    with pytest.raises(ValueError, match=r"y: label -1 is not in 0\.\.4"):
        engine.classifier_gradient(x, 1, y - 1)
    with pytest.raises(ValueError, match="low_res was given"):
        engine.denoise(x, 1, y, x)
    with pytest.raises(ValueError, match="made without"):
        engines.create("native", tiny_network()).classifier_gradient(x, 1, y)
    with pytest.raises(ValueError, match="device='cuda'.*engine='torch'"):
        engines.create("native", tiny_network(), device="cuda")
    with pytest.raises(ValueError, match="dtype='half'"):
        engines.create("native", tiny_network(), dtype="half")
    with pytest.raises(ValueError, match="made for 32x32"):
        engines.create("native", tiny_network(), tiny_network("classifier", image_size=32))
    half = engines.create("native", tiny_network(), dtype="float16")
    assert half.dtype == "float32" and "float16" in half.notes[0]


def test_it_is_an_engine_and_plans_its_memory():
    engine = engines.create("auto", tiny_network(), tiny_network("classifier"), device="cpu")
    assert isinstance(engine, engines.Engine) and engine.name == "native"
    assert 0 < engine.image_bytes() <= engine.image_bytes(guided=True)
    assert engine.packed_bytes() > 0
    x, y, _ = inputs_of(tiny_network().cfg)
    rows = engine.profile(x, 5.0, y)
    assert {"conv3x3", "attention", "linear"} <= {row["op"] for row in rows}
    assert all(row["seconds"] >= 0 for row in rows)


def test_more_than_the_memory_is_a_memory_error(monkeypatch):
    from adm_rt.engines import memory

    engine = engines.create("native", tiny_network(image_size=64, attention_resolutions="8"))
    x, y, _ = inputs_of(tiny_network(image_size=64, attention_resolutions="8").cfg, count=16)
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(memory, "_ALWAYS_THERE", 1 << 20)
    with pytest.raises(MemoryError, match="batch of 16 images needs .* GB.*smaller batch_size"):
        engine.denoise(x, 1, y)
    monkeypatch.undo()
    assert np.isfinite(engine.denoise(x[:1], 1, y[:1])).all()
