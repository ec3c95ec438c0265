"""ModelConfig -> the layers of the network, in order, with their names in the state_dict.

For whatever builds a network from its configuration without torch: the native engine's plans and
the exported graphs.
"""

from __future__ import annotations

import dataclasses

from adm_rt.models.config import ModelConfig

KEEP, DOWN, UP = 0, 1, 2  # how a residual block resamples: 2x2 average, nearest


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a block. kind: "stem", "res", "attention", "down_conv" or "up_conv".

    ``name`` is its prefix in the state_dict, ``channels`` what it makes; ``resample`` of a residual
    block is KEEP, DOWN or UP; ``heads`` belongs to attention.
    """

    kind: str
    name: str
    channels: int
    resample: int = KEEP
    heads: int = 0


def encoder_blocks(cfg: ModelConfig) -> list[list[Layer]]:
    """The layers of every input block, in order; each block's output is a skip connection."""
    widths = cfg.level_channels
    blocks = [[Layer("stem", "input_blocks.0.0", widths[0])]]
    for level, width in enumerate(widths):
        for _ in range(cfg.num_res_blocks):
            name = f"input_blocks.{len(blocks)}"
            layers = [Layer("res", f"{name}.0", width)]
            if 2**level in cfg.attention_ds:
                layers.append(_attention(cfg, f"{name}.1", width, cfg.heads(width)))
            blocks.append(layers)
        if level != len(widths) - 1:
            name = f"input_blocks.{len(blocks)}.0"
            if cfg.resblock_updown:
                blocks.append([Layer("res", name, width, resample=DOWN)])
            else:
                blocks.append([Layer("down_conv", f"{name}.op", width)])
    return blocks


def middle_layers(cfg: ModelConfig) -> list[Layer]:
    """Residual block, attention, residual block."""
    width = cfg.level_channels[-1]
    return [
        Layer("res", "middle_block.0", width),
        _attention(cfg, "middle_block.1", width, cfg.heads(width)),
        Layer("res", "middle_block.2", width),
    ]


def decoder_blocks(cfg: ModelConfig) -> list[list[Layer]]:
    """The layers of every output block; each takes a skip connection beside its input."""
    blocks = []
    for level, width in reversed(list(enumerate(cfg.level_channels))):
        for index in range(cfg.num_res_blocks + 1):
            name = f"output_blocks.{len(blocks)}"
            layers = [Layer("res", f"{name}.0", width)]
            if 2**level in cfg.attention_ds:
                layers.append(_attention(cfg, f"{name}.1", width, cfg.heads(width, upsample=True)))
            if level and index == cfg.num_res_blocks:
                last = f"{name}.{len(layers)}"
                if cfg.resblock_updown:
                    layers.append(Layer("res", last, width, resample=UP))
                else:
                    layers.append(Layer("up_conv", f"{last}.conv", width))
            blocks.append(layers)
    return blocks


def _attention(cfg, name, width, heads):
    return Layer("attention", name, width, heads=heads)


def residual_layers(cfg: ModelConfig) -> list[Layer]:
    """All residual blocks of the network in the order of execution."""
    blocks = [*encoder_blocks(cfg), middle_layers(cfg)]
    if cfg.kind != "classifier":
        blocks += decoder_blocks(cfg)
    return [layer for block in blocks for layer in block if layer.kind == "res"]
