"""ADM's layers as ONNX ops, forward and backward: what UNet and classifier gradient share.

Images are NCHW, as the convolutions want them; every normalisation and attention is one node of
domain "adm_rt" on an NHWC tensor between two Transposes. Precision is that of the published half
model: the trunk's convolutions and activations in ``dtype``, the embedding, all dense layers, the
norms' weights and the classifier's head in float32.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from adm_rt.export.graph_builder import GraphBuilder
from adm_rt.models.structure import DOWN, KEEP, UP, Layer, encoder_blocks, middle_layers

NORM_EPS = 1e-5
_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
_MAX_PERIOD = 10000  # of the timestep embedding


@dataclasses.dataclass(frozen=True)
class Image:
    """A value [N, channels, height, width]."""

    name: str
    channels: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class NormValues:
    """What the backward node of a normalisation needs. suffix: the variant; x: NHWC."""

    name: str
    suffix: str
    x: str
    moments: tuple[str, ...]
    modulation: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ResBlockValues:
    layer: Layer
    x: Image
    y: Image
    norm_in: NormValues
    norm_out: NormValues


@dataclasses.dataclass(frozen=True)
class AttentionValues:
    """qkv [N, T, 3C], out [N, Q, C] and stats of the node."""

    layer: Layer
    y: Image
    norm: NormValues
    qkv: str
    out: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ConvValues:
    """A layer that is one convolution (with a resampling before it)."""

    layer: Layer
    x: Image
    y: Image


class NetworkGraph(GraphBuilder):
    """The graph of one network. ``keeps``: nodes also give what their backward nodes need."""

    def __init__(self, cfg, dtype, keeps=False):
        super().__init__(cfg, dtype)
        self.keeps = keeps
        self.embedding = None  # silu of it, [N, 4 * num_channels] float32

    # ---- embedding and stem ----

    def embed(self, t, y=None):
        """t [N] float32, y [N] int64 or None: sets ``embedding``."""
        with self.scope("time_embed"):
            half = self.cfg.num_channels // 2
            exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(_MAX_PERIOD))
            # float64: as models.blocks.timestep_frequencies
            frequencies = np.exp((exponents / half).astype(np.float64))
            angles = self.op(
                "Mul",
                self.op("Unsqueeze", t, self.constant([1], "int64")),
                self.constant(frequencies[None], "float32"),
            )
            h = self.op("Concat", self.op("Cos", angles), self.op("Sin", angles), axis=1)
            if self.cfg.num_channels % 2:
                h = self.op("Pad", h, self.constant([0, 0, 0, 1], "int64"))
            h = self.silu(self.linear(h, "time_embed.0"))
            h = self.linear(h, "time_embed.2")
        if y is not None:
            with self.scope("label_emb"):
                h = self.op(
                    "Add", h, self.op("Gather", self.weight("label_emb.weight", wide=True), y)
                )
        with self.scope("time_embed"):
            self.embedding = self.silu(h)

    def stem(self, x, low_res=None):
        """The first convolution of x [N, C, S, S] (and the enlarged low_res), both float32."""
        side, channels = self.cfg.image_size, self.cfg.in_channels
        (layer,) = encoder_blocks(self.cfg)[0]
        with self.scope(layer.name):
            if low_res is not None:
                x = self.op("Concat", x, self._enlarged(low_res), axis=1)
            image = Image(self.cast(x, "trunk", "float32"), self.cfg.model_in_channels, side, side)
            return ConvValues(
                layer, dataclasses.replace(image, channels=channels), self.conv(image, layer.name)
            )

    def _enlarged(self, low_res):
        small, large = self.cfg.small_size, self.cfg.image_size
        how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        if large % small == 0:
            ratio = large // small
            return self.op(
                "Resize", low_res, "", self.constant([1, 1, ratio, ratio], "float32"), **how
            )
        batch = self.op("Shape", low_res, start=0, end=1)
        sides = self.constant([self.cfg.in_channels, large, large], "int64")
        sizes = self.op("Concat", batch, sides, axis=0)
        return self.op("Resize", low_res, "", "", sizes, **how)

    # ---- layers ----

    def encoder(self, stem: ConvValues):
        """Input blocks and middle block: the values of every layer, block by block."""
        blocks = [[stem]]
        for layers in [*encoder_blocks(self.cfg)[1:], middle_layers(self.cfg)]:
            blocks.append(self.chain(layers, blocks[-1][-1].y))
        return blocks

    def chain(self, layers, x: Image):
        """Layers one after the other; the values of each."""
        kinds = {"res": self.res_block, "attention": self.attention_block}
        values = []
        for layer in layers:
            values.append(kinds.get(layer.kind, self.resampling_conv)(layer, x))
            x = values[-1].y
        return values

    def res_block(self, layer: Layer, x: Image) -> ResBlockValues:
        name = layer.name
        h, norm_in = self.norm(x, f"{name}.in_layers.0")
        h = self.resample(h, layer.resample, f"{name}.in_layers")
        h = self.conv(h, f"{name}.in_layers.2")
        modulation = self.linear_in_scope(self.embedding, f"{name}.emb_layers.1")
        if self.cfg.use_scale_shift_norm:
            h, norm_out = self.norm(h, f"{name}.out_layers.0", modulation)
        else:
            with self.scope(f"{name}.emb_layers.1"):
                added = self.reshape(self.cast(modulation, "trunk", "float32"), [0, -1, 1, 1])
                h = dataclasses.replace(h, name=self.op("Add", h.name, added))
            h, norm_out = self.norm(h, f"{name}.out_layers.0")
        h = self.conv(h, f"{name}.out_layers.3")
        residual = self.resample(x, layer.resample, f"{name}.skip_connection")
        if f"{name}.skip_connection.weight" in self.shapes:
            residual = self.conv(residual, f"{name}.skip_connection")
        with self.scope(name):
            y = self.op("Add", residual.name, h.name)
            y = dataclasses.replace(h, name=self.rescaled(y))
        return ResBlockValues(layer, x, y, norm_in, norm_out)

    def linear_in_scope(self, x, name):
        with self.scope(name):
            return self.linear(x, name)

    def rescaled(self, x):
        """x times sqrt(1/2) where the configuration says so."""
        if not self.cfg.rescale_residual:
            return x
        return self.op("Mul", x, self.constant(math.sqrt(0.5), "trunk"))

    def attention_block(self, layer: Layer, x: Image) -> AttentionValues:
        name = layer.name
        h, norm = self.norm(x, f"{name}.norm", silu=False)
        qkv = self.tokens(self.conv(h, f"{name}.qkv"), f"{name}.qkv")
        order = "new" if self.cfg.use_new_attention_order else "legacy"
        out = self.attention(qkv, name, order, layer.heads, x.channels, x.height * x.width)
        h = self.conv(self.image(out[0], x, name), f"{name}.proj_out")
        with self.scope(name):
            y = dataclasses.replace(x, name=self.op("Add", x.name, h.name))
        return AttentionValues(layer, y, norm, qkv, out)

    def resampling_conv(self, layer: Layer, x: Image) -> ConvValues:
        """A strided convolution, or nearest enlargement and a convolution."""
        if layer.kind == "down_conv":
            return ConvValues(layer, x, self.conv(x, layer.name, stride=2))
        return ConvValues(layer, x, self.conv(self.resample(x, UP, layer.name), layer.name))

    # ---- ops ----

    def norm(self, x: Image, name, scale_shift=None, silu=True):
        """(y, NormValues); scale_shift [N, 2C] float32 or None."""
        suffix = ("_modulated" if scale_shift else "") + ("_silu" if silu else "")
        modulation = (scale_shift,) if scale_shift else ()
        kind = "ada_group_norm" + ("_with_moments" if self.keeps else "") + suffix
        with self.scope(name):
            given = self.transpose(x.name, _TO_NHWC)
            affine = [self.weight(f"{name}.{part}", wide=True) for part in ("weight", "bias")]
            y, *moments = self.node(
                kind, given, *affine, *modulation, groups=self.cfg.norm_groups, eps=NORM_EPS
            )
            y = dataclasses.replace(x, name=self.transpose(y, _TO_NCHW))
        return y, NormValues(name, suffix, given, tuple(moments), modulation)

    def norm_gradient(self, grad: Image, values: NormValues) -> Image:
        """The gradient of ``norm``'s y -> that of its x."""
        with self.scope(f"{values.name}.gradient"):
            affine = [f"{values.name}.{part}" for part in ("weight", "bias")]
            given = self.transpose(grad.name, _TO_NHWC)
            (dx,) = self.node(
                f"ada_group_norm_backward{values.suffix}",
                given,
                values.x,
                *values.moments,
                *affine,
                *values.modulation,
                groups=self.cfg.norm_groups,
            )
            return dataclasses.replace(grad, name=self.transpose(dx, _TO_NCHW))

    def attention(self, qkv, name, order, heads, channels, num_queries):
        """The node's outputs (out, and stats where they are kept) for qkv [N, T, 3C]."""
        kind = "qkv_attention" + ("_with_stats" if self.keeps else "")
        sizes = self.attention_sizes(heads, channels, num_queries)
        with self.scope(name):
            return self.node(f"{kind}_{order}", qkv, **sizes)

    @staticmethod
    def attention_sizes(heads, channels, num_queries):
        """The attributes of every attention node."""
        return {"num_heads": heads, "head_dim": channels // heads, "num_queries": num_queries}

    def conv(self, x: Image, name, stride=1, wide=False) -> Image:
        """The convolution ``name`` with "same" padding; wide: in float32."""
        with self.scope(name):
            return self._conv(
                x, f"{name}.weight", self.weight(f"{name}.bias", wide=wide), stride, wide
            )

    def conv_gradient(self, grad: Image, name, suffix=".rotated", wide=False) -> Image:
        """The gradient of ``conv`` (stride 1): a convolution with the rotated weight."""
        with self.scope(f"{name}.gradient"):
            return self._conv(grad, f"{name}.weight{suffix}", None, 1, wide)

    def _conv(self, x, name, bias, stride, wide):
        outputs, inputs, *kernel = self.shapes[name.partition(".rotated")[0]]
        if ".rotated" in name:
            outputs, inputs = inputs, outputs
        kernel = [*kernel, 1] if len(kernel) == 1 else kernel
        weight = self.weight(name, (outputs, inputs, *kernel), wide)
        y = self.op(
            "Conv",
            x.name,
            weight,
            *([] if bias is None else [bias]),
            kernel_shape=kernel,
            strides=[stride, stride],
            pads=[side // 2 for side in kernel] * 2,
        )
        return Image(y, outputs, x.height // stride, x.width // stride)

    def resample(self, x: Image, how, scope) -> Image:
        """2x2 average (DOWN), nearest (UP), or x itself (KEEP)."""
        if how == KEEP:
            return x
        with self.scope(scope):
            if how == DOWN:
                y = self.op("AveragePool", x.name, kernel_shape=[2, 2], strides=[2, 2])
                return Image(y, x.channels, x.height // 2, x.width // 2)
            scales = self.constant([1, 1, 2, 2], "float32")
            y = self.op(
                "Resize",
                x.name,
                "",
                scales,
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
            return Image(y, x.channels, x.height * 2, x.width * 2)

    def tokens(self, x: Image, scope):
        """[N, C, H, W] -> [N, H * W, C]."""
        with self.scope(scope):
            return self.reshape(self.transpose(x.name, _TO_NHWC), [0, -1, x.channels])

    def image(self, tokens, like: Image, scope) -> Image:
        """[N, H * W, C] -> [N, C, H, W], C, H and W those of ``like``."""
        with self.scope(scope):
            nhwc = self.reshape(tokens, [0, like.height, like.width, like.channels])
            return dataclasses.replace(like, name=self.transpose(nhwc, _TO_NCHW))
