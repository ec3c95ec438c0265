"""The ADM UNet and its super-resolution variant (Dhariwal & Nichol 2021, sections 3 and 4)."""

import torch
import torch.nn.functional as F
from torch import nn

from adm_rt.models.blocks import (
    AttentionBlock,
    ConditionedSequential,
    Encoder,
    FusedGroupNorm,
    ResBlock,
    Upsample,
    zero_module,
)


class UNet(Encoder):
    """Predicts eps (and, with learn_sigma, the variance interpolation v) from a noisy image.

    ``UNet(cfg)`` with a ``ModelConfig`` of kind "diffusion" (or "upsampler" through
    ``SuperResUNet``). Its state_dict has the keys and shapes of the released checkpoints.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        width = cfg.num_channels
        mult = cfg.channel_mult_tuple
        if cfg.class_cond:
            self.label_emb = nn.Embedding(cfg.num_classes + int(cfg.null_class), 4 * width)
        heads = cfg.num_heads if cfg.num_heads_upsample == -1 else cfg.num_heads_upsample
        channels, factor = self.bottom_channels, self.bottom_factor
        skip_channels = list(self.block_channels)
        blocks = []
        for level, level_mult in reversed(list(enumerate(mult))):
            for index in range(cfg.num_res_blocks + 1):
                out_channels = int(level_mult * width)
                layers = [ResBlock(cfg, channels + skip_channels.pop(), out_channels)]
                channels = out_channels
                if factor in cfg.attention_ds:
                    layers.append(AttentionBlock(cfg, channels, heads))
                if level and index == cfg.num_res_blocks:
                    layers.append(
                        ResBlock(cfg, channels, resample="up")
                        if cfg.resblock_updown
                        else Upsample(channels, use_conv=True)
                    )
                    factor //= 2
                blocks.append(ConditionedSequential(*layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            FusedGroupNorm(cfg.norm_groups, channels),
            nn.SiLU(),
            zero_module(nn.Conv2d(channels, cfg.out_channels, 3, padding=1)),
        )

    def forward(self, x, t, y=None):
        """Run the network.

        x [N, 3, S, S] float in about [-1, 1]; t [N] timesteps of the original process, fractional
        allowed; y [N] int64 labels exactly when the model is class-conditional. Returns
        [N, 3 or 6, S, S]: eps first, then v. Raises ValueError when y is missing or unexpected.
        """
        if (y is not None) != self.cfg.class_cond:
            raise ValueError(
                f"y={'given' if y is not None else None}: the model "
                + (
                    f"is class-conditional, pass y [N] int64 in 0..{self.cfg.num_classes - 1}"
                    if self.cfg.class_cond
                    else "has no classes, leave y out"
                )
            )
        emb = self.embed(t)
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.to(self.input_blocks[0][0].weight.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        norm, _, conv = self.out
        return conv(norm(h.to(conv.weight.dtype), silu=True))


class SuperResUNet(UNet):
    """UNet that also sees the bilinearly enlarged low-resolution image (section 4.3)."""

    def forward(self, x, t, low_res, y=None):
        """x [N, 3, L, L]; low_res [N, 3, s, s] in [-1, 1]; t, y as in ``UNet`` -> as ``UNet``."""
        enlarged = F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, enlarged], dim=1), t, y)
