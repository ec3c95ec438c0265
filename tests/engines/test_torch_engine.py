"""The torch engine: gradients against float64 autograd on reference.py, and its checks."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_network

from adm_rt import engines, ops
from adm_rt.engines import torch_engine, torch_gpu
from adm_rt.engines.torch_engine import TorchEngine


def images(count=3, size=16, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def reference_gradient(classifier, x, t, y):
    """d log p(y|x) / dx by autograd in float64 through reference.py."""
    classifier = classifier.double()
    try:
        with ops.use_reference():
            x = x.double().requires_grad_(True)
            logits = classifier(x, torch.full((len(x),), float(t), dtype=torch.float64))
            chosen = torch.log_softmax(logits, dim=-1)[torch.arange(len(x)), y]
            return torch.autograd.grad(chosen.sum(), x)[0]
    finally:
        classifier.float()


@pytest.mark.parametrize("t", [0.0, 417.25, 999.0])
@pytest.mark.parametrize(
    "flags",
    [
        {"pool": "attention"},
        {"pool": "adaptive"},
        {"pool": "spatial"},
        {"pool": "spatial_v2"},
        {"resblock_updown": False, "use_scale_shift_norm": False},
        {"num_channels": 64, "num_head_channels": 64, "num_res_blocks": 2},
    ],
    ids=lambda flags: "-".join(str(v) for v in flags.values()),
)
def test_classifier_gradient_is_that_of_the_reference(flags, t):
    classifier = tiny_network("classifier", seed=3, **flags)
    engine = engines.create("torch", tiny_network(), classifier)
    x, y = images(), torch.tensor([0, 4, 2])
    ours = engine.classifier_gradient(x, t, y)
    expected = reference_gradient(classifier, x, t, y)
    assert ours.dtype == torch.float32 and expected.abs().max() > 1e-6
    relative = (ours.double() - expected).norm() / expected.norm()
    assert relative <= 1e-5, f"relative error {relative:.2e}"


def test_gradient_of_an_image_does_not_see_the_others():
    engine = engines.create("torch", tiny_network(), tiny_network("classifier"))
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    together = engine.classifier_gradient(x, 300, y)
    alone = torch.cat(
        [engine.classifier_gradient(x[i : i + 1], 300, y[i : i + 1]) for i in range(4)]
    )
    # torch's convolutions may add in another order for another batch.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * alone.abs().max().item())


def test_gradient_makes_none_for_the_weights_and_leaves_its_input_alone():
    classifier = tiny_network("classifier")
    engine = engines.create("torch", tiny_network(), classifier)
    x = images()
    before = x.clone()
    gradient = engine.classifier_gradient(x, 10, torch.tensor([1, 2, 3]))
    assert not gradient.requires_grad and not x.requires_grad and torch.equal(x, before)
    for parameter in classifier.parameters():
        assert not parameter.requires_grad and parameter.grad is None


def test_gradient_of_a_tensor_made_in_inference_mode():
    engine = engines.create("torch", tiny_network(), tiny_network("classifier"))
    y = torch.tensor([1, 2, 3])
    with torch.inference_mode():
        x = images() * 1.0
        gradient = engine.classifier_gradient(x, 10, y + 0)
    assert x.is_inference()
    assert torch.equal(gradient, engine.classifier_gradient(images(), 10, y))


def test_denoise_passes_the_whole_output_on():
    unet = tiny_network()
    engine = engines.create("torch", unet)
    x, y = images(), torch.tensor([0, 1, 2])
    out = engine.denoise(x, 123.5, y)
    with torch.no_grad():
        expected = unet(x, torch.full((3,), 123.5), y)
    assert out.shape == (3, 6, 16, 16) and out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_denoise_matches_the_reference_in_float64():
    unet = tiny_network()
    out = engines.create("torch", unet).denoise(images(), 123.5, torch.tensor([0, 1, 2]))
    with ops.use_reference(), torch.no_grad():
        expected = unet.double()(
            images().double(), torch.full((3,), 123.5), torch.tensor([0, 1, 2])
        )
    assert (out.double() - expected).norm() <= 1e-5 * expected.norm()


def test_labels_go_only_to_networks_with_classes():
    plain = engines.create("torch", tiny_network(class_cond=False))
    y = torch.tensor([0, 1, 2])
    assert torch.equal(plain.denoise(images(), 5, y), plain.denoise(images(), 5))
    with pytest.raises(ValueError, match="y is missing.*0..4"):
        engines.create("torch", tiny_network()).denoise(images(), 5)


def test_upsampler_takes_low_res_and_nothing_else_does():
    engine = engines.create("torch", tiny_network("upsampler"))
    y = torch.tensor([0, 1, 2])
    out = engine.denoise(images(size=32), 5, y, images(size=16))
    assert out.shape == (3, 6, 32, 32)
    with pytest.raises(ValueError, match="low_res is missing"):
        engine.denoise(images(size=32), 5, y)
    with pytest.raises(ValueError, match="not an upsampler"):
        engines.create("torch", tiny_network()).denoise(images(), 5, y, images(size=8))


def test_dropout_is_off():
    engine = engines.create("torch", tiny_network(dropout=0.5).train())
    y = torch.tensor([0, 1, 2])
    assert torch.equal(engine.denoise(images(), 5, y), engine.denoise(images(), 5, y))


def test_it_is_an_engine_and_arrays_cross_the_border():
    engine = engines.create("torch", tiny_network(), device="cpu", dtype="auto")
    assert isinstance(engine, engines.Engine)
    assert (engine.name, engine.device, engine.dtype) == ("torch", "cpu", "float32")
    values = np.arange(6, dtype=np.int64).reshape(2, 3)
    assert np.array_equal(engine.to_numpy(engine.from_numpy(values)), values)


def test_without_a_classifier_there_is_no_gradient():
    with pytest.raises(ValueError, match="needs a classifier"):
        engines.create("torch", tiny_network()).classifier_gradient(images(), 1, torch.zeros(3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_on_the_cpu_are_float32_and_say_so(dtype):
    engine = engines.create("torch", tiny_network(), dtype=dtype, device="cpu")
    assert engine.dtype == "float32"
    assert len(engine.notes) == 1 and dtype in engine.notes[0] and "float32" in engine.notes[0]
    assert "\n" not in engine.notes[0]


def test_wrong_names_name_what_there_is():
    unet = tiny_network()
    with pytest.raises(
        ValueError, match="engine='pytorch' is unknown; available: 'auto', 'native', .*'torch'"
    ):
        engines.create("pytorch", unet)
    with pytest.raises(ValueError, match="dtype='half'.*float16"):
        engines.create("torch", unet, dtype="half")
    with pytest.raises(ValueError, match="device='gpu'.*cuda"):
        engines.create("torch", unet, device="gpu")
    with pytest.raises(ValueError, match="device='meta'.*'cpu' and 'cuda' only"):
        engines.create("torch", unet, device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_explicit_cuda_is_never_replaced_by_the_cpu():
    with pytest.raises(ValueError, match="device='cuda' cannot be used: torch .* (GPU|CUDA)"):
        engines.create("torch", tiny_network(), device="cuda")


@pytest.fixture
def gpu_without_kernels(monkeypatch):
    """torch sees a GPU, and adm_rt was built without nvcc."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(engines, "driver_is_there", lambda: True)
    for module in (engines, torch_engine, torch_gpu):
        monkeypatch.setattr(module, "why_no_cuda_kernels", lambda: "nvcc was not found")


def test_auto_is_the_cpu_where_our_kernels_are_not_built_for_the_gpu(gpu_without_kernels):
    """What most people with a GPU have: torch from the index, and no nvcc."""
    x, y = images().numpy(), np.array([0, 1, 2])
    for name, chosen in (("auto", "native"), ("torch", "torch")):
        engine = engines.create(name, tiny_network(), device="auto")
        assert (engine.name, engine.device) == (chosen, "cpu")
        assert ["nvcc was not found" in note for note in engine.notes] == [True]
        assert len(engine.denoise(engine.from_numpy(x), 5, engine.from_numpy(y))) == 3
    with pytest.raises(ImportError, match="device='cuda': .*nvcc was not found.*device='cpu'"):
        engines.create("torch", tiny_network(), device="cuda")
    with pytest.raises(ImportError, match="device='cuda:0'"):
        engines.create("auto", tiny_network(), device="cuda:0")


def test_a_classifier_that_does_not_fit_is_refused():
    unet = tiny_network()
    with pytest.raises(ValueError, match="32x32 images, but the model makes 16x16"):
        TorchEngine(unet, tiny_network("classifier", image_size=32))
    with pytest.raises(ValueError, match="knows 7 classes, but the model has 5"):
        TorchEngine(unet, tiny_network("classifier", num_classes=7))
    with pytest.raises(ValueError, match="kind 'diffusion', not a classifier"):
        TorchEngine(unet, unet)
