"""The noisy-image classifier that guides sampling (Dhariwal & Nichol 2021, section 4)."""

import torch
from torch import nn

from adm_rt.models.blocks import AttentionPool2d, Encoder, FusedGroupNorm, zero_module


class NoisyClassifier(Encoder):
    """The down-sampling half of the UNet with a pooling head: log p(y | x_t) as logits.

    ``NoisyClassifier(cfg)`` with a ``ModelConfig.classifier(...)``; pool is "attention",
    "adaptive", "spatial" or "spatial_v2". state_dict as in the released classifiers.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        channels = self.bottom_channels
        if cfg.pool == "attention":
            head = AttentionPool2d(
                cfg.image_size // self.bottom_factor,
                channels,
                cfg.num_head_channels,
                cfg.out_channels,
            )
            self.out = nn.Sequential(FusedGroupNorm(cfg.norm_groups, channels), nn.SiLU(), head)
        elif cfg.pool == "adaptive":
            self.out = nn.Sequential(
                FusedGroupNorm(cfg.norm_groups, channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                zero_module(nn.Conv2d(channels, cfg.out_channels, 1)),
                nn.Flatten(),
            )
        else:
            features = sum(self.block_channels) + channels
            activation = [nn.ReLU()]
            if cfg.pool == "spatial_v2":
                activation = [FusedGroupNorm(cfg.norm_groups, 2048), nn.SiLU()]
            self.out = nn.Sequential(
                nn.Linear(features, 2048), *activation, nn.Linear(2048, cfg.out_channels)
            )

    def forward(self, x, t):
        """x [N, 3, S, S]; t [N] timesteps of the original process -> logits [N, num_classes]."""
        emb = self.embed(t)
        h = x.to(self.input_blocks[0][0].weight.dtype)
        collect = self.cfg.pool.startswith("spatial")
        means = []
        for block in self.input_blocks:
            h = block(h, emb)
            if collect:
                means.append(h.to(x.dtype).mean(dim=(2, 3)))
        h = self.middle_block(h, emb)
        if collect:
            return self.out(torch.cat([*means, h.to(x.dtype).mean(dim=(2, 3))], dim=-1))
        norm, _, *head = self.out
        h = norm(h.to(norm.weight.dtype), silu=True)
        for layer in head:
            h = layer(h)
        return h
