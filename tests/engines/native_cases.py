"""Tiny networks of every configuration for the native engine's tests, and their float64 answers."""

import numpy as np
import torch
from tiny_models import tiny_network

from adm_rt import ops

# name -> (kind, flags that differ from tiny_models.TINY_FLAGS)
CASES = {
    "adagn_updown": ("diffusion", {}),
    "plain_resampling": ("diffusion", {"resblock_updown": False}),
    "additive_embedding": ("diffusion", {"use_scale_shift_norm": False}),
    "all_old": (
        "diffusion",
        {"use_scale_shift_norm": False, "resblock_updown": False, "learn_sigma": False},
    ),
    "rescale_residual": ("diffusion", {"rescale_residual": True}),
    "new_order": ("diffusion", {"use_new_attention_order": True, "num_head_channels": 16}),
    "heads": ("diffusion", {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}),
    "no_classes": ("diffusion", {"class_cond": False, "learn_sigma": False}),
    "null_class": ("diffusion", {"null_class": True}),
    "norm_groups": ("diffusion", {"norm_groups": 8, "num_channels": 24, "num_head_channels": 8}),
    "no_attention_levels": ("diffusion", {"attention_resolutions": ""}),
    "deep": (
        "diffusion",
        {
            "image_size": 32,
            "channel_mult": "1,2,2,3",
            "num_res_blocks": 2,
            "attention_resolutions": "16,8,4",
        },
    ),
    "narrow_above_wide": (
        "diffusion",
        {"channel_mult": "2,1,0.5", "norm_groups": 16, "num_head_channels": 16},
    ),
    "fractional_mult": (
        "diffusion",
        {"channel_mult": "0.5,1,1.5", "norm_groups": 16, "num_head_channels": 16},
    ),
    "one_level": ("diffusion", {"channel_mult": "1"}),
    "upsampler": ("upsampler", {}),
    "old_upsampler": (
        "upsampler",
        {"resblock_updown": False, "class_cond": False, "small_size": 8},
    ),
}


def network_of(case, seed=0):
    """The torch module of a case, float32, random weights everywhere."""
    kind, flags = CASES[case]
    return tiny_network(kind, seed=seed, **flags)


def inputs_of(cfg, count=2, seed=0):
    """(x [N, 3, S, S], y int64 [N] or None, low_res or None) as NumPy arrays."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 3, cfg.image_size, cfg.image_size), dtype=np.float32)
    y = np.arange(count) % max(1, cfg.embedding_rows) if cfg.class_cond else None
    if y is not None:
        y[-1] = cfg.embedding_rows - 1  # the null class, where there is one
    low = None
    if cfg.kind == "upsampler":
        shape = (count, 3, cfg.small_size, cfg.small_size)
        low = np.clip(rng.standard_normal(shape, dtype=np.float32), -1, 1)
    return x, y, low


def torch_answer(network, x, t, y, low, dtype):
    """The module's output in plain torch (reference ops) and ``dtype``, as float64."""
    network = network.to(dtype)
    try:
        arguments = [torch.from_numpy(x).to(dtype), torch.full((len(x),), float(t))]
        if low is not None:
            arguments.append(torch.from_numpy(low).to(dtype))
        with ops.use_reference(), torch.no_grad():
            out = network(*arguments, None if y is None else torch.from_numpy(y))
    finally:
        network.float()
    return out.double().numpy()


def relative_error(values, exact):
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(values.astype(np.float64) - exact) / np.linalg.norm(exact))
