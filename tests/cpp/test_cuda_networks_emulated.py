"""The torch engine's CUDA form with the CUDA kernels themselves, under the emulator: networks,
single steps and a captured run. CPU tensors stand for CUDA tensors."""

import contextlib
import importlib
import types

import numpy as np
import pytest
import torch
from emulated_attention import emulated_cuda as emulated_attention
from emulated_norm import emulated_cuda as emulated_norm
from emulated_update import EmulatedCuda as EmulatedUpdate
from fake_gpu import FakeGpu
from tiny_models import tiny_network

from adm_rt.diffusion import Diffusion
from adm_rt.engines.cuda_networks import CudaUNet, gradient_network
from adm_rt.engines.torch_engine import TorchEngine
from adm_rt.models.classifier_gradient import ClassifierGradient
from adm_rt.ops import step_table
from adm_rt.samplers import SAMPLERS

MODULES = types.SimpleNamespace(
    **{
        name: importlib.import_module(f"adm_rt.ops._{name}")
        for name in ("ada_group_norm_torch", "ada_group_norm_resample", "qkv_attention_torch")
    },
    update=importlib.import_module("adm_rt.ops._guided_mean_update_cuda"),
    gradients=importlib.import_module("adm_rt.ops.input_gradients"),
)


@pytest.fixture
def kernels(compile_emulated, monkeypatch):
    """Every op goes to its CUDA kernels; yields how often each was called."""
    norm, attention = emulated_norm(compile_emulated), emulated_attention(compile_emulated)
    attention.device()
    update = EmulatedUpdate(compile_emulated("guided_mean_update_emulated.cpp"))
    calls = {}

    def counted(name, function):
        def call(*arguments):
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments)

        return call

    for module, source, names in (
        (MODULES.ada_group_norm_torch, norm, ("ada_group_norm", "ada_group_norm_backward")),
        (MODULES.ada_group_norm_resample, norm, ("ada_group_norm", "ada_group_norm_backward")),
        (MODULES.qkv_attention_torch, attention, ("qkv_attention", "qkv_attention_backward")),
        (MODULES.update, update, ("guided_mean_update_step",)),
    ):
        kind = "resample_" if module is MODULES.ada_group_norm_resample else ""
        functions = {name: counted(kind + name, getattr(source, name)) for name in names}
        for name in names:
            size = getattr(source, f"{name}_workspace", None)
            functions.update({} if size is None else {f"{name}_workspace": size})
        extension = types.SimpleNamespace(**functions)
        monkeypatch.setattr(module, "cuda_extension", lambda extension=extension: extension)
        monkeypatch.setattr(module, "cuda_stream", lambda x: contextlib.nullcontext(0))

    torch_side, attention_side = MODULES.ada_group_norm_torch, MODULES.qkv_attention_torch
    for module, name, value in (
        (torch_side, "kernels_take", lambda x: x.dtype in torch_side._DTYPES),
        (torch_side, "_operator", torch_side._cuda),
        (MODULES.ada_group_norm_resample, "_on_device", lambda x: True),
        (attention_side, "kernels_take", lambda x, heads: True),
        (attention_side, "_operator", attention_side._cuda),
        (MODULES.gradients, "_norm_kernels_take", lambda x: x.dtype in torch_side._DTYPES),
        (MODULES.gradients, "_attention_kernels_take", lambda x, heads: True),
        (torch.ops.adm_rt, "ada_group_norm_with_moments", torch_side._cuda_moments),
        (torch.ops.adm_rt, "ada_group_norm_backward", torch_side._cuda_backward),
        (torch.ops.adm_rt, "qkv_attention_with_stats", attention_side._cuda_with_stats),
        (torch.ops.adm_rt, "qkv_attention_backward", attention_side._cuda_backward),
        (step_table, "_on_device", lambda x: True),
    ):
        monkeypatch.setattr(module, name, value)
    return calls


def batch(cfg, seed=2):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, cfg.image_size, cfg.image_size, generator=g)
    return x, torch.tensor([20.0, 730.0]), torch.tensor([1, 4])


def relative(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_unet(dtype, request):
    network = tiny_network(seed=1)
    x, t, y = batch(network.cfg)
    with torch.no_grad():
        expected = network(x, t, y)
        calls = request.getfixturevalue("kernels")  # from here on
        ours = CudaUNet(network, "cpu", dtype)(x, t, y)
    assert relative(ours, expected) <= LIMITS[dtype]
    assert calls == {"ada_group_norm": 19, "resample_ada_group_norm": 6, "qkv_attention": 4}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("flags", [{}, {"pool": "adaptive", "use_scale_shift_norm": False}])
def test_gradient(dtype, flags, request):
    classifier = tiny_network("classifier", seed=3, **flags)
    x, t, y = batch(classifier.cfg)
    with torch.no_grad():
        expected = ClassifierGradient(classifier)(x, t, y)
        calls = request.getfixturevalue("kernels")
        ours = gradient_network(classifier, "cpu", dtype)(x, t, y)
    assert relative(ours, expected) <= 2 * LIMITS[dtype]
    # every residual block's sum of gradients is part of its norm's
    assert calls["resample_ada_group_norm_backward"] == 5
    assert calls["resample_ada_group_norm"] == 1


@pytest.mark.parametrize(
    "sampler, options", [("ddpm", {}), ("unipc", {}), ("dpmpp_2m", {"clip": "dynamic"})]
)
def test_a_captured_run(sampler, options, request):
    """Rows from the table on the device: the bits of rows given to the CPU's kernel."""

    class Thin(TorchEngine):
        """Its networks are a line each: this is about the update."""

        def denoise(self, x, t, y=None, low_res=None):
            t = t.reshape(-1, 1, 1, 1) if isinstance(t, torch.Tensor) else torch.tensor(t)
            out = torch.cat([torch.tanh(x), torch.sin(x + t.float() / 999)], 1)
            return out.contiguous(memory_format=torch.channels_last)

        def classifier_gradient(self, x, t, y):
            return torch.cos(x).bfloat16()

    cfg = tiny_network().cfg
    engine = Thin(tiny_network(), tiny_network("classifier"), gpu=FakeGpu())
    x, _, y = batch(cfg)
    arguments = (x, Diffusion(timestep_respacing="5"), y, 0.5)
    options = {"noise": np.array([4, 5]), **options}
    plain = SAMPLERS[sampler](engine, *arguments, **options)
    calls = request.getfixturevalue("kernels")
    for _ in range(2):
        run = engine.run_captured(SAMPLERS[sampler], *arguments, **options)
        assert torch.equal(run.x, plain) and run.finite
    # warm-up, recording and two runs of five steps, each with one or two updates
    updates = 2 if options.get("clip") == "dynamic" else 1
    assert calls == {"guided_mean_update_step": 12 * updates}
