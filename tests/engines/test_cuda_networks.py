"""The networks' form for CUDA against the modules, on the CPU."""

import pytest
import torch
from tiny_models import tiny_network

from adm_rt import ops
from adm_rt.engines.cuda_networks import CudaUNet, gradient_network
from adm_rt.models.classifier_gradient import ClassifierGradient
from adm_rt.models.model_weights import ModelWeights

FLAGS = {
    "base": {},
    "without classes": {"class_cond": False},
    "class for none": {"null_class": True},
    "without variances": {"learn_sigma": False},
    "strided": {"resblock_updown": False},
    "additive": {"use_scale_shift_norm": False},
    "new order": {"use_new_attention_order": True},
    "rescaled": {"rescale_residual": True},
    "groups of 3": {"norm_groups": 8, "num_channels": 24, "num_head_channels": 12},
    "heads": {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4},
    "three levels": {
        "channel_mult": "1,1,2",
        "num_res_blocks": 2,
        "attention_resolutions": "8,4",
    },
    "one level": {"channel_mult": "1", "attention_resolutions": ""},
}
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


def inputs(cfg, count=2, seed=0):
    """x, t, y, and low_res for an upsampler."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, cfg.image_size, cfg.image_size, generator=g)
    t = 999 * torch.rand(count, generator=g)
    y = torch.randint(0, cfg.num_classes, (count,), generator=g)
    low = torch.randn(count, 3, cfg.small_size, cfg.small_size, generator=g)
    return x, t, y, low


def outputs(network, dtype):
    """(the module's output in float32, ours in dtype)."""
    cfg = network.cfg
    x, t, y, low = inputs(cfg)
    y = y if cfg.class_cond else None
    low = (low,) if cfg.kind == "upsampler" else ()
    with torch.no_grad():
        ours = CudaUNet(network, "cpu", dtype)(x, t, y, *low)
        return network(x, t, *low, y), ours


def relative(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


CASES = [("diffusion", name) for name in FLAGS]
CASES += [("upsampler", name) for name in ("base", "without classes", "strided")]


@pytest.mark.parametrize("kind, flags", CASES)
def test_in_float32_it_is_the_module(kind, flags):
    expected, ours = outputs(tiny_network(kind, seed=1, **FLAGS[flags]), torch.float32)
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert relative(ours, expected) <= 1e-5


def plain_half(network, dtype):
    """The published half-precision form in torch's operations: blocks in dtype, the rest not."""
    for part in (network.input_blocks, network.middle_block, network.output_blocks):
        for layer in part.modules():
            if isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d)):
                layer.to(dtype)
    x, t, y, _ = inputs(network.cfg)
    with torch.no_grad(), ops.use_reference():
        return network(x, t, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flags", [{}, FLAGS["strided"] | FLAGS["additive"]], ids=["base", "plain"])
def test_in_16_bits_it_is_as_good_as_the_published_form(dtype, flags):
    exact, ours = outputs(tiny_network(seed=1, **flags), dtype)
    plain = plain_half(tiny_network(seed=1, **flags), dtype)
    assert ours.dtype == torch.float32
    assert relative(ours, exact) <= 1.5 * relative(plain, exact)
    assert relative(ours, exact) > 1e-4  # it is of that type


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    "flags", [{}, FLAGS["strided"] | FLAGS["additive"] | FLAGS["rescaled"]], ids=["base", "plain"]
)
def test_the_gradient(pool, flags):
    classifier = tiny_network("classifier", seed=3, pool=pool, **flags)
    x, t, y, _ = inputs(classifier.cfg)
    # "spatial" has ReLUs; one that switches on a rounding, other ones on other processors, is 5%.
    budget = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
    budget[torch.float16] *= 5 if pool == "spatial" else 1
    with torch.no_grad():
        expected = ClassifierGradient(classifier)(x, t, y)
        for dtype, limit in budget.items():
            ours = gradient_network(classifier, "cpu", dtype)(x, t, y)
            assert ours.dtype == torch.float32 and relative(ours, expected) <= limit
            low = 1e-4 if dtype != torch.float32 else 0
            assert relative(ours, expected) > low
    assert all(p.dtype == torch.float32 for p in classifier.parameters())  # those are copies


def test_weights_of_a_folder_will_do():
    network = tiny_network(seed=1)
    expected, _ = outputs(network, torch.float32)
    x, t, y, _ = inputs(network.cfg)
    with torch.no_grad():
        ours = CudaUNet(ModelWeights.of(network), "cpu", torch.float32)(x, t, y)
    assert relative(ours, expected) <= 1e-5


def test_everything_stays_in_channels_last(monkeypatch):
    """A copy into another order would cost more than the op that asked for it."""
    seen = []

    def watched(original):
        def call(x, *arguments, **options):
            tokens = x.movedim(1, -1)
            seen.append(tokens.is_contiguous())
            return original(x, *arguments, **options)

        return call

    for module, names in (
        (ops, ("ada_group_norm", "ada_group_norm_resample", "qkv_attention")),
        (torch.nn.functional, ("conv2d",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
    network = tiny_network()
    x, t, y, _ = inputs(network.cfg)
    with torch.no_grad():
        CudaUNet(network, "cpu", torch.bfloat16)(x, t, y)
    assert len(seen) > 30 and all(seen)
    seen.clear()
    classifier = tiny_network("classifier")
    x, t, y, _ = inputs(classifier.cfg)
    with torch.no_grad():
        gradient_network(classifier, "cpu", torch.bfloat16)(x, t, y)
    convolutions = seen[1:]  # the stem takes the image as it comes
    assert len(convolutions) > 10 and all(convolutions)


def test_the_embedding_layers_are_one_product(monkeypatch):
    shapes = []
    linear = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        if x.shape[0] == 2:  # a row for each image
            shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    network = tiny_network()
    widths = [m.out_features for n, m in network.named_modules() if n.endswith("emb_layers.1")]
    x, t, y, _ = inputs(network.cfg)
    with torch.no_grad():
        CudaUNet(network, "cpu", torch.float32)(x, t, y)
    assert len(widths) > 6 and shapes == [(128, 32), (128, 128), (sum(widths), 128)]
