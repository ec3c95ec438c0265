"""ModelConfig -> plans of the native engine: what ADM's blocks become, and the whole UNets.

A network becomes two plans. The embedding plan maps (t, y) to the modulations of all residual
blocks in one row: it does not see the image, so a run's timesteps go through it together. The body
plan maps the image and that row to the output. docs/native-plan.md has a picture of a block.

A layer's normalisation, activation, resampling, skip concatenation and residual sum are arguments
of its convolution; GroupNorm itself only turns statistics, which the op before has collected, into
one affine map per channel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from adm_rt.engines.plan_builder import Buffer, LoweredPlan, PlanBuilder, concatenated
from adm_rt.models.config import ModelConfig
from adm_rt.models.parameter_shapes import parameter_shapes
from adm_rt.models.structure import (
    DOWN,
    KEEP,
    UP,
    Layer,
    decoder_blocks,
    encoder_blocks,
    middle_layers,
    residual_layers,
)

NONE, SILU, RELU = 0, 1, 2  # attribute "activation": of the op's input
NORM_EPS = 1e-5


# ---- the embedding plan ----


def lower_embedding(cfg: ModelConfig) -> LoweredPlan:
    """inputs t [1] and, with classes, y [1] (an index as a float) -> output modulation [M].

    M: every residual block's ``emb_layers`` behind each other, in the order of execution.
    """
    builder = PlanBuilder(parameter_shapes(cfg))
    dim = cfg.time_embed_dim
    t = builder.input("t", (1, 1, 1))
    h = builder.op("timestep_embedding", {"t": t}, (1, 1, cfg.num_channels), output="out")
    h = builder.op("linear", {"x": h}, (1, 1, dim), weights=builder.layer("time_embed.0"))
    h = builder.op(
        "linear", {"x": h}, (1, 1, dim), weights=builder.layer("time_embed.2"), activation=SILU
    )
    if cfg.embedding_rows:
        h = builder.op(
            "embedding_lookup",
            {"index": builder.input("y", (1, 1, 1)), "add": h},
            (1, 1, dim),
            weights={"table": builder.weight("label_emb.weight")},
        )
    names = [f"{layer.name}.emb_layers.1" for layer in residual_layers(cfg)]
    weights = {
        part: concatenated([builder.weight(f"{name}.{part}") for name in names])
        for part in ("weight", "bias")
    }
    h = builder.op("linear", {"x": h}, (1, 1, _width(cfg)), weights=weights, activation=SILU)
    builder.output("modulation", h)
    return builder.finish()


def modulation_offsets(cfg: ModelConfig) -> dict[str, int]:
    """Residual block -> where its part of the modulation row begins."""
    offsets, offset = {}, 0
    for layer in residual_layers(cfg):
        offsets[layer.name] = offset
        offset += layer.channels * (2 if cfg.use_scale_shift_norm else 1)
    return offsets


def _width(cfg):
    factor = 2 if cfg.use_scale_shift_norm else 1
    return factor * sum(layer.channels for layer in residual_layers(cfg))


# ---- the blocks ----


@dataclasses.dataclass(frozen=True)
class ResBlockValues:
    """The values of a lowered residual block, for its gradient.

    x: one or two inputs (concatenated by channels); h: after the first convolution; affine_in,
    affine_out: the two norms as a * x + b; y: the output, with statistics.
    """

    layer: Layer
    x: tuple[Buffer, ...]
    affine_in: Buffer
    h: Buffer
    affine_out: Buffer
    y: Buffer


@dataclasses.dataclass(frozen=True)
class AttentionValues:
    """The values of a lowered attention block, for its gradient (p: see ``attention``)."""

    layer: Layer
    x: Buffer
    affine: Buffer
    qkv: Buffer
    p: Buffer | None
    h: Buffer
    y: Buffer


@dataclasses.dataclass(frozen=True)
class LayerValues:
    """The values of a stem or a resampling convolution."""

    layer: Layer
    x: Buffer
    y: Buffer


class NetworkBuilder(PlanBuilder):
    """A plan of one network: its configuration, and the blocks of ADM as ops.

    ``modulation`` is the input that the embedding plan's output goes to. fast: convolutions of
    images of 64x64 and more in F(6x6), with fewer products and more rounding. differentiable: keep
    what the gradient would have to compute again.
    """

    def __init__(self, cfg: ModelConfig, fast: bool = False, differentiable: bool = False):
        super().__init__(parameter_shapes(cfg))
        self.cfg, self._fast, self._differentiable = cfg, fast, differentiable
        self.modulation = self.input("modulation", (1, 1, _width(cfg)))
        self._offsets = modulation_offsets(cfg)

    def op(self, op, inputs, shape, **options):
        """See ``PlanBuilder.op``."""
        if op == "conv3x3":
            options["fast"] = int(self._fast)
        return super().op(op, inputs, shape, **options)

    def norm(self, name, x: tuple[Buffer, ...], modulated_by=None):
        """GroupNorm ``name`` over one or two maps as an affine map {1, 2, C}.

        modulated_by: the residual block whose modulation takes part.
        """
        inputs = {"stats": x[0].stats, "stats2": x[1].stats if len(x) > 1 else None}
        attributes = {"groups": self.cfg.norm_groups, "eps": NORM_EPS}
        if modulated_by is not None:
            inputs["modulation"] = self.modulation
            attributes["mode"] = 1 if self.cfg.use_scale_shift_norm else 2
            attributes["offset"] = self._offsets[modulated_by]
        channels = sum(part.channels for part in x)
        return self.op(
            "group_norm",
            inputs,
            (1, 2, channels),
            output="affine",
            weights=self.layer(name),
            **attributes,
        )

    def res_block(self, layer: Layer, x: tuple[Buffer, ...]) -> ResBlockValues:
        """A residual block on one map, or on two that are concatenated."""
        name, channels = layer.name, layer.channels
        height, width = (_resampled(side, layer.resample) for side in x[0].shape[:2])
        shape = (height, width, channels)
        parts = dict(zip(("x", "x2"), x, strict=False))
        affine_in = self.norm(f"{name}.in_layers.0", x)
        h = self.op(
            "conv3x3",
            {**parts, "affine": affine_in},
            shape,
            stats=True,
            weights=self.layer(f"{name}.in_layers.2"),
            activation=SILU,
            resample=layer.resample,
        )
        affine_out = self.norm(f"{name}.out_layers.0", (h,), modulated_by=name)
        residual, residual_resample = x[0], layer.resample
        if f"{name}.skip_connection.weight" in self.shapes:  # never in a resampling block
            residual = self.op(
                "linear", parts, shape, weights=self.layer(f"{name}.skip_connection")
            )
        y = self.op(
            "conv3x3",
            {"x": h, "affine": affine_out, "residual": residual},
            shape,
            stats=True,
            weights=self.layer(f"{name}.out_layers.3"),
            activation=SILU,
            residual_resample=residual_resample,
            output_scale=math.sqrt(0.5) if self.cfg.rescale_residual else 1.0,
        )
        return ResBlockValues(layer, x, affine_in, h, affine_out, y)

    def attention_block(self, layer: Layer, x: Buffer) -> AttentionValues:
        """Self-attention over all positions with a residual connection."""
        name, (height, width, channels) = layer.name, x.shape
        affine = self.norm(f"{name}.norm", (x,))
        qkv = self.op(
            "linear",
            {"x": x, "affine": affine},
            (height, width, 3 * channels),
            weights=self.layer(f"{name}.qkv"),
        )
        order = int(self.cfg.use_new_attention_order)
        h, p = self.attention(qkv, x.shape, heads=layer.heads, order=order)
        y = self.op(
            "linear",
            {"x": h, "residual": x},
            x.shape,
            stats=True,
            weights=self.layer(f"{name}.proj_out"),
        )
        return AttentionValues(layer, x, affine, qkv, p, h, y)

    def attention(self, qkv: Buffer, shape, *, heads, order) -> tuple[Buffer, Buffer | None]:
        """The result, of ``shape``, and the probabilities, where a gradient will need them."""
        attributes = {"heads": heads, "order": order}
        if not self._differentiable:
            return self.op("attention", {"qkv": qkv}, shape, **attributes), None
        (height, width, _), queries = qkv.shape, shape[0] * shape[1]
        # Never a multiple of 4 KiB: the rows would compete for the same cache lines.
        row = 16 * (queries // 16 + 1)
        outputs = {"y": shape, "p": (heads, height * width, row)}
        made = self.many("attention", {"qkv": qkv}, outputs, **attributes)
        return made["y"], made["p"]

    def apply(self, layer: Layer, x: tuple[Buffer, ...]):
        """Any layer but the stem, on one map (or two, for a residual block); see its values."""
        if layer.kind == "res":
            return self.res_block(layer, x)
        (only,) = x
        if layer.kind == "attention":
            return self.attention_block(layer, only)
        down = layer.kind == "down_conv"
        height, width = (_resampled(side, DOWN if down else UP) for side in only.shape[:2])
        y = self.op(
            "conv3x3_stride2" if down else "conv3x3",
            {"x": only},
            (height, width, layer.channels),
            stats=True,
            weights=self.layer(layer.name),
            **({} if down else {"resample": UP}),
        )
        return LayerValues(layer, only, y)

    def stem(self, layer: Layer, image: Buffer, low_res: Buffer | None = None) -> LayerValues:
        """The first convolution. image: NCHW planes {1, 1, C * S * S}; low_res: {S, S, C}."""
        side = self.cfg.image_size
        y = self.op(
            "conv_stem",
            {"x": image, "x2": low_res},
            (side, side, layer.channels),
            stats=True,
            weights=self.layer(layer.name),
        )
        return LayerValues(layer, image, y)

    def encoder(self, image: Buffer, low_res: Buffer | None = None):
        """Input blocks and middle block -> (values of every layer by block, middle's values)."""
        (first,), *rest = encoder_blocks(self.cfg)
        blocks = [[self.stem(first, image, low_res)]]
        for layers in rest:
            blocks.append(self.chain(layers, (blocks[-1][-1].y,)))
        return blocks, self.chain(middle_layers(self.cfg), (blocks[-1][-1].y,))

    def chain(self, layers, x: tuple[Buffer, ...]):
        """Layers one after the other; returns the values of each."""
        values = []
        for layer in layers:
            values.append(self.apply(layer, x))
            x = (values[-1].y,)
        return values


def _resampled(side, resample):
    return {KEEP: side, DOWN: side // 2, UP: side * 2}[resample]


# ---- the UNets ----


def lower_unet(cfg: ModelConfig, fast: bool = False) -> LoweredPlan:
    """The body plan of a UNet or SuperResUNet.

    Inputs: x [3 * S * S] (NCHW), modulation [M] and, for an upsampler, low_res [3 * s * s].
    Output: out [C * S * S], C 3 or 6. fast: see ``NetworkBuilder``.
    """
    if cfg.kind == "classifier":
        raise ValueError(f"kind={cfg.kind!r}: a UNet or an upsampler is needed")
    builder = NetworkBuilder(cfg, fast)
    side, channels = cfg.image_size, cfg.in_channels
    image = builder.input("x", (1, 1, channels * side * side))
    enlarged = None
    if cfg.kind == "upsampler":
        small = cfg.small_size
        low = builder.input("low_res", (1, 1, channels * small * small))
        low = builder.op("to_nhwc", {"x": low}, (small, small, channels))
        enlarged = builder.op("bilinear_upsample", {"x": low}, (side, side, channels))
    blocks, middle = builder.encoder(image, enlarged)
    skips = [values[-1].y for values in blocks]
    h = middle[-1].y
    for layers in decoder_blocks(cfg):
        h = builder.chain(layers, (h, skips.pop()))[-1].y
    affine = builder.norm("out.0", (h,))
    h = builder.op(
        "conv3x3",
        {"x": h, "affine": affine},
        (side, side, cfg.out_channels),
        weights=builder.layer("out.2"),
        activation=SILU,
    )
    h = builder.op("to_nchw", {"x": h}, (1, 1, cfg.out_channels * side * side))
    builder.output("out", h)
    return builder.finish()


def packed_bytes(plans: Mapping[str, LoweredPlan]) -> int:
    """Bytes of the packed weights of several plans together."""
    return sum(lowered.plan.packed_bytes for lowered in plans.values())
