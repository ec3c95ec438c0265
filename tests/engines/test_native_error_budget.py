"""The native engine's rounding: at most twice that of eager float32 torch, against float64.

Full-size networks take minutes: ``adm-rt bench sample --only "64x64_diffusion forward 1" --float64
--rounds 1 --contenders native`` (and "64x64_diffusion gradient 1") prints the same comparison.
"""

import dataclasses

import numpy as np
import pytest
import torch
from native_cases import inputs_of, relative_error, torch_answer
from tiny_models import tiny_network

from adm_rt import _C, engines, ops
from adm_rt.benchmarking.sampling_cases import random_weights
from adm_rt.models import ModelConfig, build

# The published 64x64 architecture, small: three levels, attention, a skip for every block.
UNET = ModelConfig(
    image_size=32,
    num_channels=64,
    channel_mult="1,2,2",
    num_res_blocks=1,
    attention_resolutions="16,8",
    num_head_channels=64,
    num_classes=10,
    class_cond=True,
    learn_sigma=True,
    resblock_updown=True,
)
CLASSIFIER = dataclasses.replace(UNET, kind="classifier", class_cond=False, learn_sigma=False)


@pytest.fixture(params=["avx2", "avx512"])
def isa(request):
    if request.param not in _C.available_cpu_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def network_of(cfg):
    """Weights that keep the variance, as trained ones do."""
    network = build(cfg).eval().requires_grad_(False)
    network.load_state_dict({k: torch.from_numpy(v) for k, v in random_weights(cfg).items()})
    return network


def gradient(classifier, x, t, y, dtype):
    """d log p(y | x) / dx by autograd through the reference ops, as float64."""
    classifier = classifier.to(dtype)
    x = torch.from_numpy(x).to(dtype).requires_grad_(True)
    with ops.use_reference():
        logits = classifier(x, torch.full((len(x),), float(t)))
    chosen = torch.log_softmax(logits, -1)[torch.arange(len(x)), torch.from_numpy(y)].sum()
    (result,) = torch.autograd.grad(chosen, x)
    classifier.float()
    return result.double().numpy()


def hold(ours, plain, exact):
    error, allowed = relative_error(ours, exact), 2 * relative_error(plain, exact)
    assert error <= allowed, f"{error:.2e}; float32 torch {allowed / 2:.2e}"


@pytest.mark.parametrize("t", [3.0, 900.0])
def test_unet(isa, t):
    network = network_of(UNET)
    x, y, _ = inputs_of(UNET, count=2)
    exact, plain = (
        torch_answer(network, x, t, y, None, dtype) for dtype in (torch.float64, torch.float32)
    )
    hold(engines.create("native", network).denoise(x, t, y), plain, exact)


def test_classifier_gradient(isa):
    classifier = network_of(CLASSIFIER)
    x, _, _ = inputs_of(CLASSIFIER, count=4)
    y = np.array([0, 3, 9, 3])
    exact, plain = (gradient(classifier, x, 417.25, y, d) for d in (torch.float64, torch.float32))
    cfg = {"image_size": 32, "num_classes": 10}
    engine = engines.create("native", tiny_network(**cfg), classifier)
    hold(engine.classifier_gradient(x, 417.25, y), plain, exact)


def test_the_fast_mode_is_asked_for_and_has_a_bound(monkeypatch):
    flags = {
        "image_size": 64,
        "num_channels": 64,
        "attention_resolutions": "8",
        "channel_mult": "1",
    }
    network = tiny_network(**flags)
    x, y, _ = inputs_of(network.cfg, count=1)
    exact = torch_answer(network, x, 9.0, y, None, torch.float64)
    plain = engines.create("native", network)
    fast = engines.create("native", network, fast=True)
    assert not plain.notes and "F(6x6)" in fast.notes[0]
    error = relative_error(fast.denoise(x, 9.0, y), exact)
    assert relative_error(plain.denoise(x, 9.0, y), exact) < error < 2e-5
    monkeypatch.setenv("ADM_RT_FAST", "1")
    asked = engines.create("native", network)
    assert asked.notes == fast.notes
    assert np.array_equal(asked.denoise(x, 9.0, y), fast.denoise(x, 9.0, y))
    assert not engines.create("native", network, fast=False).notes
