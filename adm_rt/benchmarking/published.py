"""ADM's networks as the published code runs them: the eager baseline of every benchmark.

Same modules, same order of torch operations and same intermediate tensors as
openai/guided-diffusion, under the same state_dict names: normalisation in float32 with a separate
SiLU, attention as two einsums, every attention block checkpointed (``use_checkpoint`` adds the
residual blocks), all tokens of the attention pool. ``build(cfg)`` is the counterpart of
``adm_rt.models.build(cfg)``; the classifier's gradient is taken as the published script takes it.
Nothing here uses the ops of this package.
"""

import torch
import torch.nn.functional as F
from torch import nn

from adm_rt.benchmarking import baselines
from adm_rt.models.blocks import timestep_embedding


def build(cfg, checkpoint=True):
    """The published network of a ``ModelConfig``, fresh weights, in evaluation mode.

    checkpoint=False leaves out all checkpointing, also that of the attention blocks: for
    ``torch.compile`` and export, which it would break up. Raises ValueError for
    ``rescale_residual``, which the published code does not have.
    """
    if cfg.rescale_residual:
        raise ValueError("rescale_residual=True: the published code has no such network")
    classes = {
        "diffusion": PublishedUNet,
        "upsampler": PublishedSuperResUNet,
        "classifier": PublishedClassifier,
    }
    network = classes[cfg.kind](cfg)
    if not checkpoint:
        for module in network.modules():
            if isinstance(module, (ResBlock, AttentionBlock)):
                module.use_checkpoint = False
    return network.eval()


def classifier_gradient(classifier, x, t, y):
    """d log p(y | x_t) / d x_t [N, 3, S, S], as classifier_sample.py does it.

    The weights keep ``requires_grad``, and each checkpointed block makes their gradients too.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        log_probabilities = F.log_softmax(classifier(x, t), dim=-1)
        selected = log_probabilities[range(len(y)), y.view(-1)]
        return torch.autograd.grad(selected.sum(), x)[0]


class _Recomputed(torch.autograd.Function):
    """Forward without a graph, run again in the backward pass, which also makes weight gradients.

    Unlike torch's own reentrant checkpoint it works under ``torch.autograd.grad``.
    """

    @staticmethod
    def forward(ctx, function, count, *tensors):
        ctx.function = function
        ctx.inputs, ctx.parameters = tensors[:count], tensors[count:]
        with torch.no_grad():
            return function(*ctx.inputs)

    @staticmethod
    def backward(ctx, gradient):
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            # views: the function may change its arguments in place, leaves may not be changed
            out = ctx.function(*(x.view_as(x) for x in inputs))
        wanted = (*inputs, *ctx.parameters)
        return None, None, *torch.autograd.grad(out, wanted, gradient, allow_unused=True)


def _run(module, *inputs):
    """``module._forward``, recomputed in the backward pass if the module says so."""
    if not module.use_checkpoint:
        return module._forward(*inputs)
    return _Recomputed.apply(module._forward, len(inputs), *inputs, *module.parameters())


class GroupNorm32(nn.GroupNorm):
    """Computed in float32 whatever the input is, and cast back."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Upsample(nn.Module):
    """Nearest-neighbour x2, then maybe a 3x3 convolution."""

    def __init__(self, channels, use_conv):
        super().__init__()
        self.use_conv = use_conv
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, or 2x2 average pooling; ``op`` either way."""

    def __init__(self, channels, use_conv):
        super().__init__()
        self.op = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, x):
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block with the embedding's scale and shift (or sum), and maybe a resampling."""

    def __init__(self, cfg, channels, out_channels=None, resample=None):
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = cfg.use_checkpoint
        self.use_scale_shift_norm = cfg.use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm32(cfg.norm_groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        kind = {"up": Upsample, "down": Downsample}.get(resample)
        self.h_resample = kind(channels, False) if kind else None
        self.x_resample = kind(channels, False) if kind else None
        rows = 2 * out_channels if cfg.use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(cfg.time_embed_dim, rows))
        self.out_layers = nn.Sequential(
            GroupNorm32(cfg.norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(p=cfg.dropout),
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x, emb):
        """x [N, C, H, W]; emb [N, 4*num_channels] -> [N, C', H', W']."""
        return _run(self, x, emb)

    def _forward(self, x, emb):
        if self.h_resample is None:
            h = self.in_layers(x)
        else:
            h = self.h_resample(self.in_layers[:-1](x))
            x = self.x_resample(x)
            h = self.in_layers[-1](h)
        modulation = self.emb_layers(emb).type(h.dtype)[..., None, None]
        if self.use_scale_shift_norm:
            scale, shift = torch.chunk(modulation, 2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + modulation)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions; checkpointed whatever ``use_checkpoint`` says."""

    def __init__(self, cfg, channels, num_heads):
        super().__init__()
        self.use_checkpoint = True
        self.num_heads = num_heads
        self.order = "new" if cfg.use_new_attention_order else "legacy"
        self.norm = GroupNorm32(cfg.norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        """x [N, C, H, W] -> same."""
        return _run(self, x)

    def _forward(self, x):
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        h = baselines.qkv_attention(self.qkv(self.norm(flat)), self.num_heads, self.order)
        return (flat + self.proj_out(h)).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """The mean token and all others attend to each other; the first of the results is taken."""

    def __init__(self, spatial_size, channels, head_channels, out_channels):
        super().__init__()
        self.positional_embedding = nn.Parameter(
            torch.randn(channels, spatial_size**2 + 1) / channels**0.5
        )
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = channels // head_channels

    def forward(self, x):
        """x [N, C, S, S] -> [N, out_channels]."""
        x = x.reshape(x.shape[0], x.shape[1], -1)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)
        x = x + self.positional_embedding[None].to(x.dtype)
        h = baselines.qkv_attention(self.qkv_proj(x), self.num_heads, "new")
        return self.c_proj(h)[:, :, 0]


class ConditionedSequential(nn.Sequential):
    """Hands the embedding to the residual blocks in it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # what the blocks compute in
        widths = cfg.level_channels
        self.time_embed = nn.Sequential(
            nn.Linear(cfg.num_channels, cfg.time_embed_dim),
            nn.SiLU(),
            nn.Linear(cfg.time_embed_dim, cfg.time_embed_dim),
        )
        channels = widths[0]
        first = nn.Conv2d(cfg.model_in_channels, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([ConditionedSequential(first)])
        self.block_channels = [channels]
        for level, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                layers = [ResBlock(cfg, channels, width)]
                channels = width
                if 2**level in cfg.attention_ds:
                    layers.append(AttentionBlock(cfg, channels, cfg.heads(channels)))
                self._append(layers, channels)
            if level != len(widths) - 1:
                down = (
                    ResBlock(cfg, channels, resample="down")
                    if cfg.resblock_updown
                    else Downsample(channels, True)
                )
                self._append([down], channels)
        self.middle_block = ConditionedSequential(
            ResBlock(cfg, channels),
            AttentionBlock(cfg, channels, cfg.heads(channels)),
            ResBlock(cfg, channels),
        )

    def _append(self, layers, channels):
        self.input_blocks.append(ConditionedSequential(*layers))
        self.block_channels.append(channels)

    def convert_to_fp16(self):
        """Halve the convolutions of the blocks; norms, linears and the output stay float32."""
        self.dtype = torch.float16
        for part in ("input_blocks", "middle_block", "output_blocks"):
            for module in getattr(self, part, nn.Module()).modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.half()
        return self

    def _embed(self, t):
        return self.time_embed(timestep_embedding(t, self.cfg.num_channels))


class PublishedUNet(_Encoder):
    """UNetModel: the denoiser."""

    def __init__(self, cfg):
        super().__init__(cfg)
        widths = cfg.level_channels
        if cfg.class_cond:
            self.label_emb = nn.Embedding(cfg.embedding_rows, cfg.time_embed_dim)
        skips, channels = list(self.block_channels), widths[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for index in range(cfg.num_res_blocks + 1):
                layers = [ResBlock(cfg, channels + skips.pop(), widths[level])]
                channels = widths[level]
                if 2**level in cfg.attention_ds:
                    layers.append(AttentionBlock(cfg, channels, cfg.heads(channels, upsample=True)))
                if level and index == cfg.num_res_blocks:
                    layers.append(
                        ResBlock(cfg, channels, resample="up")
                        if cfg.resblock_updown
                        else Upsample(channels, True)
                    )
                self.output_blocks.append(ConditionedSequential(*layers))
        self.out = nn.Sequential(
            GroupNorm32(cfg.norm_groups, channels),
            nn.SiLU(),
            _zeroed(nn.Conv2d(channels, cfg.out_channels, 3, padding=1)),
        )

    def forward(self, x, t, y=None):
        """x [N, 3, S, S]; t [N]; y int64 [N] if class-conditional -> [N, 3 or 6, S, S]."""
        emb = self._embed(t)
        if self.cfg.class_cond:
            emb = emb + self.label_emb(y)
        h, skips = x.type(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class PublishedSuperResUNet(PublishedUNet):
    """SuperResModel: the upsampler."""

    def forward(self, x, t, low_res, y=None):
        """x [N, 3, L, L]; low_res [N, 3, s, s] -> [N, 3 or 6, L, L]."""
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, enlarged], dim=1), t, y)


class PublishedClassifier(_Encoder):
    """EncoderUNetModel: the noisy classifier."""

    def __init__(self, cfg):
        super().__init__(cfg)
        channels = cfg.level_channels[-1]
        norm = GroupNorm32(cfg.norm_groups, channels)
        if cfg.pool == "attention":
            side = cfg.image_size >> (len(cfg.level_channels) - 1)
            pool = AttentionPool2d(side, channels, cfg.num_head_channels, cfg.out_channels)
            self.out = nn.Sequential(norm, nn.SiLU(), pool)
        elif cfg.pool == "adaptive":
            last = _zeroed(nn.Conv2d(channels, cfg.out_channels, 1))
            self.out = nn.Sequential(
                norm, nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), last, nn.Flatten()
            )
        else:
            features = sum(self.block_channels) + channels
            activation = [nn.ReLU()]
            if cfg.pool == "spatial_v2":
                activation = [GroupNorm32(cfg.norm_groups, 2048), nn.SiLU()]
            self.out = nn.Sequential(
                nn.Linear(features, 2048), *activation, nn.Linear(2048, cfg.out_channels)
            )

    def forward(self, x, t):
        """x [N, 3, S, S]; t [N] -> logits [N, num_classes]."""
        emb = self._embed(t)
        spatial = self.cfg.pool.startswith("spatial")
        h, means = x.type(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            if spatial:
                means.append(h.type(x.dtype).mean(dim=(2, 3)))
        h = self.middle_block(h, emb)
        if spatial:
            return self.out(torch.cat([*means, h.type(x.dtype).mean(dim=(2, 3))], dim=-1))
        return self.out(h.type(x.dtype))


def _zeroed(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
