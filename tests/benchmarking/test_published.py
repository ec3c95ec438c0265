"""The eager baseline computes what our networks compute, from the same weights."""

import pytest
import torch
from tiny_models import tiny_config, tiny_network

from adm_rt.benchmarking import published

FLAGS = [
    {},
    {"use_new_attention_order": True, "num_head_channels": 16, "attention_resolutions": "16,8"},
    {"num_head_channels": -1, "num_heads": 4, "num_heads_upsample": 2, "norm_groups": 8},
    {"resblock_updown": False, "use_scale_shift_norm": False, "use_checkpoint": True},
    {"class_cond": False, "learn_sigma": False, "channel_mult": "1,1,2"},
]


def pair(kind, **flags):
    ours = tiny_network(kind, seed=5, **flags)
    theirs = published.build(tiny_config(kind, **flags))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(cfg, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, cfg.image_size, cfg.image_size, generator=generator)
    return x, torch.tensor([0.0, 412.5, 999.0]), torch.tensor([4, 0, 2])


def assert_close(result, expected):
    assert result.shape == expected.shape and expected.abs().max() > 1e-6
    assert (result - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_unet(flags):
    ours, theirs = pair("diffusion", **flags)
    x, t, y = inputs(ours.cfg)
    with torch.no_grad():
        labels = (y,) if ours.cfg.class_cond else ()
        assert_close(theirs(x, t, *labels), ours(x, t, *labels))


def test_upsampler():
    ours, theirs = pair("upsampler")
    x, t, y = inputs(ours.cfg)
    low = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(theirs(x, t, low, y), ours(x, t, low, y))


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_classifier_and_its_gradient(pool):
    ours, theirs = pair("classifier", pool=pool)
    x, t, y = inputs(ours.cfg)
    with torch.no_grad():
        assert_close(theirs(x, t), ours(x, t))
    gradient = published.classifier_gradient(theirs, x, t, y)
    assert_close(gradient, published.classifier_gradient(ours, x, t, y))
    plain = published.build(theirs.cfg, checkpoint=False)
    plain.load_state_dict(theirs.state_dict())
    assert_close(published.classifier_gradient(plain, x, t, y), gradient)


def test_attention_runs_again_in_the_backward_pass():
    """As published: each attention block once more, weight gradients included."""
    _, theirs = pair("classifier")
    block = theirs.middle_block[1]
    calls = []
    block.norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x, t, y = inputs(theirs.cfg)
    published.classifier_gradient(theirs, x, t, y)
    assert calls == [False, True]


def test_training_reaches_every_weight():
    """For the training benchmark: the checkpointed blocks hand their weights' gradients on."""
    ours, theirs = pair("diffusion", use_checkpoint=True)
    x, t, y = inputs(ours.cfg)
    for network in (ours, theirs):
        network.requires_grad_(True)
        network(x, t, y).square().mean().backward()
    expected = dict(ours.named_parameters())
    largest = max(p.grad.norm() for p in ours.parameters())
    for name, parameter in theirs.named_parameters():
        # a bias before a normalisation has no gradient but rounding errors
        error = (parameter.grad - expected[name].grad).norm()
        assert error <= 1e-5 * expected[name].grad.norm() + 1e-6 * largest, name


def test_half_precision_leaves_norms_and_linears_alone():
    network = published.build(tiny_config()).convert_to_fp16()
    half = {n for n, p in network.named_parameters() if p.dtype == torch.float16}
    assert "middle_block.1.qkv.weight" in half and "output_blocks.0.0.in_layers.2.bias" in half
    assert not any("norm" in n or "emb" in n or n.startswith("out.") for n in half)


def test_what_was_never_published_is_refused():
    with pytest.raises(ValueError, match="rescale_residual=True"):
        published.build(tiny_config(rescale_residual=True))
