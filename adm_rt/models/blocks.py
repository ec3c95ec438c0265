"""The residual, attention and resampling blocks of ADM (Dhariwal & Nichol 2021, section 3).

Sub-module names give the state_dict keys of the released checkpoints. Normalisation and attention
run through ``adm_rt.ops``; the activation and dropout modules only hold the published positions in
their ``nn.Sequential``.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from adm_rt import ops


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm with float32 statistics, and the AdaGN and SiLU that follow it in one op."""

    def __init__(self, groups, channels):
        super().__init__(groups, channels, eps=1e-5)

    def forward(self, x, scale_shift=None, silu=False):
        """x [N, C, *spatial]; scale_shift [N, 2C] or None -> like x."""
        return ops.ada_group_norm(
            x, self.weight, self.bias, scale_shift, groups=self.num_groups, eps=self.eps, silu=silu
        )


def zero_module(module):
    """Set all parameters to zero: each residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_frequencies(half, device=None, max_period=10000):
    """max_period^(-i / half) for i < half, [half] float32, the same bits on every processor.

    float32 exponents as in the published code, but a float64 exp: torch's float32 one gives other
    neighbours on other processors, and an angle is up to 1000 of these, so that one unit in the
    last place would outweigh the rounding of all the rest of a network.
    """
    positions = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp((-math.log(max_period) * positions / half).double()).float()


def timestep_embedding(t, dim, max_period=10000):
    """Sinusoidal embedding of t [N] (fractional allowed) -> [N, dim] float32, cosines first."""
    angles = t[:, None].float() * timestep_frequencies(dim // 2, t.device, max_period)[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class Upsample(nn.Module):
    """Nearest-neighbour x2, then an optional 3x3 convolution."""

    def __init__(self, channels, use_conv):
        super().__init__()
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.use_conv = use_conv

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Stride-2 3x3 convolution, or 2x2 average pooling."""

    def __init__(self, channels, use_conv):
        super().__init__()
        if use_conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.use_conv = use_conv

    def forward(self, x):
        return self.op(x) if self.use_conv else F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    """Residual block conditioned on the embedding, with optional BigGAN up- or down-sampling."""

    def __init__(self, cfg, channels, out_channels=None, resample=None):
        super().__init__()
        out_channels = out_channels or channels
        embed_channels = 4 * cfg.num_channels
        self.use_scale_shift_norm = cfg.use_scale_shift_norm
        self.use_checkpoint = cfg.use_checkpoint
        self.output_scale = math.sqrt(0.5) if cfg.rescale_residual else None

        self.in_layers = nn.Sequential(
            FusedGroupNorm(cfg.norm_groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        resamplers = {None: nn.Identity, "up": Upsample, "down": Downsample}
        arguments = () if resample is None else (channels, False)
        self.resample = resamplers[resample](*arguments)
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(embed_channels, (2 if cfg.use_scale_shift_norm else 1) * out_channels),
        )
        self.out_layers = nn.Sequential(
            FusedGroupNorm(cfg.norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(cfg.dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        """x [N, C, H, W]; emb [N, 4*num_channels] -> [N, C', H', W']."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        norm, _, conv = self.in_layers
        h = conv(self.resample(norm(x, silu=True)))
        x = self.resample(x)
        modulation = self.emb_layers(emb)
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            h = norm(h, scale_shift=modulation.to(norm.weight.dtype), silu=True)
        else:
            h = norm(h + modulation.to(h.dtype)[:, :, None, None], silu=True)
        h = self.skip_connection(x) + conv(dropout(h))
        return h if self.output_scale is None else h * self.output_scale


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual connection."""

    def __init__(self, cfg, channels, num_heads):
        super().__init__()
        if cfg.num_head_channels != -1:
            num_heads = channels // cfg.num_head_channels
        self.num_heads = num_heads
        self.order = "new" if cfg.use_new_attention_order else "legacy"
        self.use_checkpoint = cfg.use_checkpoint
        self.norm = FusedGroupNorm(cfg.norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        """x [N, C, H, W] -> same."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x):
        flat = x.flatten(2)
        h = ops.qkv_attention(self.qkv(self.norm(flat)), self.num_heads, self.order)
        return (flat + self.proj_out(h)).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Attention pooling: the mean token attends to all positions (CLIP, Radford et al. 2021)."""

    def __init__(self, spatial_size, channels, head_channels, out_channels):
        super().__init__()
        tokens = spatial_size**2 + 1
        self.positional_embedding = nn.Parameter(torch.empty(channels, tokens))
        nn.init.normal_(self.positional_embedding, std=channels**-0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = channels // head_channels

    def forward(self, x):
        """x [N, C, S, S] -> [N, out_channels]."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)
        x = x + self.positional_embedding[None].to(x.dtype)
        # Only the mean token's output is used, so only its query is computed.
        pooled = ops.qkv_attention(self.qkv_proj(x), self.num_heads, "new", num_queries=1)
        return self.c_proj(pooled)[:, :, 0]


class ConditionedSequential(nn.Sequential):
    """A sequence that hands the embedding to the residual blocks in it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Encoder(nn.Module):
    """What UNet and classifier share: embedding, down-sampling half and middle block."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        width = cfg.num_channels
        mult = cfg.channel_mult_tuple
        self.time_embed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
        )
        channels = int(mult[0] * width)
        first = nn.Conv2d(cfg.model_in_channels, channels, 3, padding=1)
        blocks = [ConditionedSequential(first)]
        self.block_channels = [channels]
        factor = 1
        for level, level_mult in enumerate(mult):
            for _ in range(cfg.num_res_blocks):
                layers = [ResBlock(cfg, channels, int(level_mult * width))]
                channels = int(level_mult * width)
                if factor in cfg.attention_ds:
                    layers.append(AttentionBlock(cfg, channels, cfg.num_heads))
                blocks.append(ConditionedSequential(*layers))
                self.block_channels.append(channels)
            if level != len(mult) - 1:
                down = (
                    ResBlock(cfg, channels, resample="down")
                    if cfg.resblock_updown
                    else Downsample(channels, use_conv=True)
                )
                blocks.append(ConditionedSequential(down))
                self.block_channels.append(channels)
                factor *= 2
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = ConditionedSequential(
            ResBlock(cfg, channels),
            AttentionBlock(cfg, channels, cfg.num_heads),
            ResBlock(cfg, channels),
        )
        self.bottom_channels = channels
        self.bottom_factor = factor

    def embed(self, t):
        """t [N] -> embedding [N, 4*num_channels]."""
        weight = self.time_embed[0].weight
        return self.time_embed(timestep_embedding(t, self.cfg.num_channels).to(weight.dtype))
