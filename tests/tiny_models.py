"""Tiny random networks for tests. Nothing here imports torch early."""

TINY_CLASSES = ("A", "B", "C", "D", "E")
TINY_FLAGS = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
    "num_classes": len(TINY_CLASSES),
    "resblock_updown": True,
}


def tiny_config(kind="diffusion", **flags):
    """16x16 images, 5 classes; the upsampler makes 32x32."""
    from adm_rt.models import ModelConfig

    own = {
        "diffusion": {"image_size": 16, "class_cond": True, "learn_sigma": True},
        "classifier": {"image_size": 16},
        "upsampler": {"large_size": 32, "small_size": 16, "class_cond": True, "learn_sigma": True},
    }[kind]
    return ModelConfig(**{**TINY_FLAGS, **own, "kind": kind, **flags})


def tiny_network(kind="diffusion", seed=0, **flags):
    """A network with random weights everywhere: zero-initialised layers would test nothing."""
    import torch

    from adm_rt.models import build

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(tiny_config(kind, **flags))
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()
