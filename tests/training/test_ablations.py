"""Every switch of the paper's ablations (tables 1 to 3) trains: 50 updates with a falling loss."""

import numpy as np
import pytest
import torch
from tiny_training import Quiet

from adm_rt import models
from adm_rt.data import BatchStream, open_dataset
from adm_rt.diffusion import Diffusion
from adm_rt.models import ModelConfig
from adm_rt.training import DiffusionTask, TrainConfig, Trainer

BASE = {
    "image_size": 8,
    "num_channels": 16,
    "norm_groups": 4,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "num_heads": 1,
    "attention_resolutions": "4",
    "learn_sigma": True,
    "class_cond": True,
    "num_classes": 36,
}
SWITCHES = {
    # table 1: width, depth, heads, attention at more resolutions, BigGAN up/down, residual scale
    "base": {},
    "wider": {"num_channels": 32},
    "deeper": {"num_res_blocks": 2},
    "multires_attention": {"attention_resolutions": "8,4"},
    "no_attention_but_the_middle": {"attention_resolutions": ""},
    "biggan_updown": {"resblock_updown": True},
    "rescale_residual": {"rescale_residual": True},
    "all_of_table_1": {
        "attention_resolutions": "8,4",
        "resblock_updown": True,
        "rescale_residual": True,
        "num_res_blocks": 2,
    },
    # table 2: heads, channels per head
    "heads_2": {"num_heads": 2},
    "heads_4": {"num_heads": 4},
    "head_channels_8": {"num_head_channels": 8},
    "head_channels_16": {"num_head_channels": 16},
    "heads_upsample": {"num_heads_upsample": 2},
    "new_attention_order": {"num_heads": 2, "use_new_attention_order": True},
    # table 3: AdaGN against addition and GroupNorm
    "additive_embedding": {"use_scale_shift_norm": False},
    # what else the released models differ in
    "unconditional": {"class_cond": False},
    "fixed_variance": {"learn_sigma": False},
    "checkpointing": {"use_checkpoint": True},
    "dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_the_switch_trains(name, tmp_path):
    cfg = ModelConfig(**(BASE | SWITCHES[name]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = models.build(cfg)
    config = TrainConfig(
        iterations=50, out=str(tmp_path), batch_size=8, lr=2e-3, save_interval=50, device="cpu"
    )
    stream = BatchStream(open_dataset("glyphs", 8, seed=5), 8, seed=5)
    diffusion = Diffusion(steps=100, noise_schedule="cosine", learn_sigma=cfg.learn_sigma)
    monitor = Quiet()
    task = DiffusionTask(diffusion, stream, cfg.class_cond, num_classes=36)
    Trainer(network, task, config, monitor).run(progress=False)
    losses = [values["mse"].mean().item() for _, values, _ in monitor.rows]
    assert len(losses) == 50 and np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5]), losses
