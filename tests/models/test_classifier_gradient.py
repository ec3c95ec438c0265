"""The explicit gradient network of a classifier against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_network
from torch.overrides import TorchFunctionMode

from adm_rt import ops
from adm_rt.engines.base import LOSS_SCALES
from adm_rt.models import ModelConfig, NoisyClassifier, preset
from adm_rt.models.classifier_gradient import ClassifierGradient, rotated

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
OPTIONS = {
    **{pool: {"pool": pool} for pool in POOLS},
    "strided": {"resblock_updown": False},
    "additive": {"use_scale_shift_norm": False},
    "additive-strided-spatial": {
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "pool": "spatial",
    },
    "new-order": {"use_new_attention_order": True, "num_head_channels": 16},
    "rescaled": {"rescale_residual": True, "pool": "adaptive"},
    "groups-8": {"norm_groups": 8, "num_channels": 24, "num_head_channels": 12},
    "groups-8-spatial_v2": {"norm_groups": 8, "num_channels": 16, "pool": "spatial_v2"}
    | {"num_head_channels": -1, "num_heads": 2},
    "three-levels": {"channel_mult": "1,1,2", "num_res_blocks": 2, "attention_resolutions": "8,4"},
    "one-level": {"channel_mult": "1", "attention_resolutions": ""},
    "checkpointed": {"use_checkpoint": True, "dropout": 0.3},
}


def randomized(classifier, seed):
    """Zero-initialised layers would hide the gradient of all that stands before them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in classifier.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return classifier.eval().requires_grad_(False)


def autograd_gradient(classifier, x, t, y):
    """d log p(y|x) / dx in float64 through ops.reference; leaves the classifier in float64."""
    classifier.double()
    with ops.use_reference():
        x = x.double().requires_grad_(True)
        chosen = torch.log_softmax(classifier(x, t), dim=-1)[torch.arange(len(x)), y]
        return torch.autograd.grad(chosen.sum(), x)[0]


def inputs(cfg, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, cfg.in_channels, cfg.image_size, cfg.image_size, generator=generator)
    t = torch.rand(count, generator=generator) * 999
    return x, t, torch.randint(0, cfg.num_classes, (count,), generator=generator)


def relative_error(ours, expected):
    assert ours.shape == expected.shape and expected.norm() > 1e-6
    return ((ours.double() - expected).norm() / expected.norm()).item()


def run(network, *arguments):
    with torch.no_grad():
        return network(*arguments)


class HalfPrecision(TorchFunctionMode):
    """autocast's float16 as a GPU computes it: operands and results of convolutions and products
    of matrices are float16, their sums float32. (The CPU's own in float16 take minutes.)"""

    ROUNDED = (F.conv1d, F.conv2d, F.conv_transpose2d, F.linear, torch.Tensor.__matmul__)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in self.ROUNDED:
            return function(*args, **kwargs)
        args = [a.half().float() if isinstance(a, torch.Tensor) else a for a in args]
        return function(*args, **kwargs).half()


def run_half(classifier, loss_scale, *arguments):
    network = ClassifierGradient(classifier, loss_scale)
    with HalfPrecision():
        return run(network, *arguments)


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
def test_every_option_against_autograd(flags):
    classifier = tiny_network("classifier", seed=3, **flags)
    x, t, y = inputs(classifier.cfg)
    single = run(ClassifierGradient(classifier), x, t, y)
    with ops.use_reference():
        plain = run(ClassifierGradient(classifier), x, t, y)
    expected = autograd_gradient(classifier, x, t, y)
    assert single.dtype == plain.dtype == torch.float32
    assert relative_error(single, expected) <= 1e-5
    assert relative_error(plain, expected) <= 1e-5
    double = run(ClassifierGradient(classifier), x.double(), t, y)
    assert double.dtype == torch.float64
    assert relative_error(double, expected) <= 1e-10


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_released_architectures_at_reduced_width(size):
    """Every layer of the released classifiers, at 8 channels (4 groups) and a smaller image."""
    released = preset(f"{size}x{size}_classifier")
    levels = len(released.channel_mult_tuple)
    cfg = released.replace(
        classifier_width=8,
        num_head_channels=4,
        norm_groups=4,
        num_classes=20,
        channel_mult=released.channel_mult_tuple,
        image_size=max(16, 2**levels),
        attention_resolutions=",".join(
            str(max(16, 2**levels) * int(r) // size) for r in "32,16,8".split(",")
        ),
    )
    torch.manual_seed(size)
    classifier = randomized(NoisyClassifier(cfg), seed=size)
    x, t, y = inputs(cfg, count=1)
    single = run(ClassifierGradient(classifier), x, t, y)
    half = run_half(classifier, LOSS_SCALES["float16"], x, t, y)
    expected = autograd_gradient(classifier, x, t, y)
    assert relative_error(single, expected) <= 1e-5
    assert 1e-4 < relative_error(half, expected) <= 5e-3
    double = run(ClassifierGradient(classifier), x.double(), t, y)
    assert relative_error(double, expected) <= 1e-10


def test_images_other_than_rgb_and_blocks_without_skip_convolution():
    cfg = ModelConfig.classifier(
        8, 16, 1, "", num_classes=3, num_head_channels=8, norm_groups=2, channel_mult="1,1"
    ).replace(in_channels=5)
    classifier = randomized(NoisyClassifier(cfg), seed=1)
    x, t, y = inputs(cfg, count=3)
    ours = run(ClassifierGradient(classifier.double()), x.double(), t, y)
    assert relative_error(ours, autograd_gradient(classifier, x, t, y)) <= 1e-10


@pytest.mark.parametrize("pool", POOLS)
def test_loss_scale_keeps_small_gradients_in_half_precision(pool):
    """Gradients of 1e-7 vanish in float16 activations; a power of two carries them through."""
    classifier = tiny_network("classifier", seed=5, pool=pool)
    last = list(classifier.out.parameters())[-2].data  # the weight of the last layer
    last.mul_(1e-5 / last.abs().mean())
    x, t, y = inputs(classifier.cfg)
    networks = [ClassifierGradient(classifier, scale) for scale in (1.0, 2.0**14)]
    with torch.autocast("cpu", dtype=torch.float16):
        unscaled, scaled = (run(network, x, t, y) for network in networks)
    expected = autograd_gradient(classifier, x, t, y)
    assert scaled.dtype == torch.float32
    assert relative_error(scaled, expected) <= 5e-3 < relative_error(unscaled, expected)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_loss_scale(value):
    with pytest.raises(ValueError, match="loss_scale=.*positive and finite"):
        ClassifierGradient(tiny_network("classifier"), loss_scale=value)


def test_inputs_are_left_alone_and_nothing_is_recorded():
    classifier = tiny_network("classifier")
    network = ClassifierGradient(classifier)
    x, t, y = inputs(classifier.cfg)
    before = x.clone(), t.clone(), y.clone()
    gradient = run(network, x, t, y)
    assert all(torch.equal(a, b) for a, b in zip((x, t, y), before, strict=True))
    assert not gradient.requires_grad
    assert not any("rotated" in name or "skip" == name for name in network.state_dict())


def test_it_is_exported_and_the_graph_holds_our_ops():
    """One graph for every batch size, without data-dependent control flow."""
    classifier = tiny_network("classifier", seed=2)
    network = ClassifierGradient(classifier).eval()
    x, t, y = inputs(classifier.cfg, count=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(
            network, (x, t, y), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}), strict=False
        )
        names = [str(node.target) for node in exported.graph.nodes]
        norms = sum("ada_group_norm_with_moments" in name for name in names)
        assert norms == sum("ada_group_norm_backward" in name for name in names) > 4
        assert sum("qkv_attention_backward" in name for name in names) == 3
        again = exported.module()
        for count in (1, 2, 5):
            arguments = inputs(classifier.cfg, count, seed=count)
            torch.testing.assert_close(again(*arguments), network(*arguments), rtol=0, atol=0)


def test_rotated_is_the_data_gradient():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 3, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64).requires_grad_(True)
    grad = torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch.nn.functional.conv2d(x, weight, padding=1), x, grad)
    ours = torch.nn.functional.conv2d(grad, rotated(weight), padding=1)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_64x64_classifier_whole():
    """Against autograd in float32: float64 takes too long here. In float16 it needs the loss
    scale: without, small gradients vanish, and the error is four times as large."""
    cfg = preset("64x64_classifier")
    torch.manual_seed(0)
    classifier = randomized(NoisyClassifier(cfg), seed=0)
    x, t, y = inputs(cfg, count=1)
    ours = run(ClassifierGradient(classifier), x, t, y)
    half = run_half(classifier, LOSS_SCALES["float16"], x, t, y)
    x.requires_grad_(True)
    chosen = torch.log_softmax(classifier(x, t), dim=-1)[0, y[0]]
    expected = torch.autograd.grad(chosen, x)[0].double()
    assert relative_error(ours, expected) <= 1e-5
    assert 1e-4 < relative_error(half, expected) <= 5e-3
