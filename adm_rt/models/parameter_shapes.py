"""Names and shapes of a network's weights, from its configuration alone (no torch, no allocation).

This is what a file's header is compared with before a single weight is read, and what another
engine may use to lay out its memory. The names are those of the released checkpoints.
"""

from __future__ import annotations

import math

from adm_rt.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

_POOL_WIDTH = 2048  # hidden width of the "spatial" classifier heads


def parameter_shapes(cfg: ModelConfig) -> Shapes:
    """Name -> shape of every weight of ``cfg``'s network, in the order of the released files."""
    builder = _Builder(cfg)
    builder.encoder()
    builder.classifier_head() if cfg.kind == "classifier" else builder.decoder()
    return builder.shapes


def count_parameters(shapes: Shapes) -> int:
    """Total number of elements."""
    return sum(math.prod(shape) for shape in shapes.values())


def compare_shapes(expected: Shapes, found: Shapes, limit: int = 3) -> str:
    """What differs, or "" when names and shapes are the same.

    Lists the first ``limit`` missing, unexpected and wrongly shaped weights, and their counts.
    """
    missing = [k for k in expected if k not in found]
    unexpected = [k for k in found if k not in expected]
    wrong = [
        f"{k} is {list(found[k])} but must be {list(shape)}"
        for k, shape in expected.items()
        if k in found and tuple(found[k]) != tuple(shape)
    ]
    parts = []
    for title, items in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of the wrong shape", wrong),
    ):
        if items:
            more = f", and {len(items) - limit} more" if len(items) > limit else ""
            parts.append(f"{len(items)} {title}: {', '.join(items[:limit])}{more}")
    return "; ".join(parts)


class _Builder:
    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.shapes: Shapes = {}
        self.block_channels: list[int] = []

    def _affine(self, name, weight_shape):
        self.shapes[f"{name}.weight"] = tuple(weight_shape)
        self.shapes[f"{name}.bias"] = (weight_shape[0],)

    def _res(self, name, channels, out):
        cfg = self.cfg
        self._affine(f"{name}.in_layers.0", (channels,))
        self._affine(f"{name}.in_layers.2", (out, channels, 3, 3))
        rows = 2 * out if cfg.use_scale_shift_norm else out
        self._affine(f"{name}.emb_layers.1", (rows, cfg.time_embed_dim))
        self._affine(f"{name}.out_layers.0", (out,))
        self._affine(f"{name}.out_layers.3", (out, out, 3, 3))
        if out != channels:
            self._affine(f"{name}.skip_connection", (out, channels, 1, 1))

    def _attention(self, name, channels):
        self._affine(f"{name}.norm", (channels,))
        self._affine(f"{name}.qkv", (3 * channels, channels, 1))
        self._affine(f"{name}.proj_out", (channels, channels, 1))

    def encoder(self):
        cfg = self.cfg
        widths = cfg.level_channels
        self._affine("time_embed.0", (cfg.time_embed_dim, cfg.num_channels))
        self._affine("time_embed.2", (cfg.time_embed_dim, cfg.time_embed_dim))
        if cfg.embedding_rows:
            self.shapes["label_emb.weight"] = (cfg.embedding_rows, cfg.time_embed_dim)
        channels = widths[0]
        self._affine("input_blocks.0.0", (channels, cfg.model_in_channels, 3, 3))
        self.block_channels = [channels]
        for level, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                name = f"input_blocks.{len(self.block_channels)}"
                self._res(f"{name}.0", channels, width)
                channels = width
                if 2**level in cfg.attention_ds:
                    self._attention(f"{name}.1", channels)
                self.block_channels.append(channels)
            if level != len(widths) - 1:
                name = f"input_blocks.{len(self.block_channels)}.0"
                if cfg.resblock_updown:
                    self._res(name, channels, channels)
                else:
                    self._affine(f"{name}.op", (channels, channels, 3, 3))
                self.block_channels.append(channels)
        self._res("middle_block.0", channels, channels)
        self._attention("middle_block.1", channels)
        self._res("middle_block.2", channels, channels)

    def decoder(self):
        cfg = self.cfg
        widths = cfg.level_channels
        skips = list(self.block_channels)
        channels, index = widths[-1], 0
        for level in reversed(range(len(widths))):
            for block in range(cfg.num_res_blocks + 1):
                name = f"output_blocks.{index}"
                self._res(f"{name}.0", channels + skips.pop(), widths[level])
                channels, part = widths[level], 1
                if 2**level in cfg.attention_ds:
                    self._attention(f"{name}.1", channels)
                    part = 2
                if level and block == cfg.num_res_blocks:
                    if cfg.resblock_updown:
                        self._res(f"{name}.{part}", channels, channels)
                    else:
                        self._affine(f"{name}.{part}.conv", (channels, channels, 3, 3))
                index += 1
        self._affine("out.0", (channels,))
        self._affine("out.2", (cfg.out_channels, channels, 3, 3))

    def classifier_head(self):
        cfg = self.cfg
        channels = cfg.level_channels[-1]
        if cfg.pool == "attention":
            side = cfg.image_size // 2 ** (len(cfg.level_channels) - 1)
            self._affine("out.0", (channels,))
            self.shapes["out.2.positional_embedding"] = (channels, side**2 + 1)
            self._affine("out.2.qkv_proj", (3 * channels, channels, 1))
            self._affine("out.2.c_proj", (cfg.out_channels, channels, 1))
        elif cfg.pool == "adaptive":
            self._affine("out.0", (channels,))
            self._affine("out.3", (cfg.out_channels, channels, 1, 1))
        else:
            self._affine("out.0", (_POOL_WIDTH, sum(self.block_channels) + channels))
            last = 2
            if cfg.pool == "spatial_v2":
                self._affine("out.1", (_POOL_WIDTH,))
                last = 3
            self._affine(f"out.{last}", (cfg.out_channels, _POOL_WIDTH))
