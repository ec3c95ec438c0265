"""NoisyClassifier -> plans of the native engine: its logits, and the gradient that guides sampling.

The gradient plan runs the classifier forward and then every layer's input gradient, last to first:
data gradients of convolutions are convolutions with rotated weights, residual branches meet where
``norm_backward`` adds one to the other. adm_rt/models/classifier_gradient.py is the same network in
torch. The modulations come from ``lower_embedding``, as a UNet's do.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from adm_rt.engines.lowering import (
    NORM_EPS,
    RELU,
    SILU,
    AttentionValues,
    LayerValues,
    NetworkBuilder,
    ResBlockValues,
)
from adm_rt.engines.plan_builder import Buffer, LoweredPlan
from adm_rt.models.config import ModelConfig

_HIDDEN = 2048  # width of the spatial pools' hidden layer


def lower_classifier(cfg: ModelConfig) -> LoweredPlan:
    """Inputs: x [C * S * S] (NCHW), modulation [M]. Output: logits [num_classes]."""
    builder = _builder(cfg)
    builder.output("logits", builder.forward().logits)
    return builder.finish()


def lower_classifier_gradient(cfg: ModelConfig, fast: bool = False) -> LoweredPlan:
    """d log p(y | x_t) / d x_t (Dhariwal & Nichol 2021, section 4).

    Inputs: x [C * S * S] (NCHW), modulation [M], y [1] (a class as a float). Output: gradient
    [C * S * S]. fast: see ``NetworkBuilder``.
    """
    builder = _builder(cfg, fast, differentiable=True)
    values = builder.forward()
    logits = {"logits": values.logits, "index": builder.input("y", (1, 1, 1))}
    grad = builder.op("log_softmax_gradient", logits, values.logits.shape)
    builder.output("gradient", builder.input_gradient(values, grad))
    return builder.finish()


@dataclasses.dataclass(frozen=True)
class ClassifierValues:
    """The values of a lowered classifier, for its gradient.

    blocks: those of every layer, block by block, the middle block last; head: buffers of the
    pooling head by name.
    """

    blocks: list[list]
    head: dict[str, Buffer]
    logits: Buffer


def _builder(cfg, fast=False, differentiable=False):
    if cfg.kind != "classifier":
        raise ValueError(f"kind={cfg.kind!r}: a classifier is needed")
    return ClassifierBuilder(cfg, fast, differentiable)


class ClassifierBuilder(NetworkBuilder):
    """A plan of one classifier: its forward pass, and the gradient of each of its parts."""

    # ---- forward ----

    def forward(self) -> ClassifierValues:
        """The whole classifier on the new input x."""
        side = self.cfg.image_size
        image = self.input("x", (1, 1, self.cfg.in_channels * side * side))
        blocks, middle = self.encoder(image)
        blocks = [*blocks, middle]
        heads = {"attention": self._attention_head, "adaptive": self._adaptive_head}
        head = heads.get(self.cfg.pool, self._spatial_head)(blocks)
        return ClassifierValues(blocks, head, head.pop("logits"))

    def _attention_head(self, blocks):
        x = blocks[-1][-1].y
        height, width, channels = x.shape
        tokens = height * width + 1
        affine = self.norm("out.0", (x,))
        h = self.op(
            "attention_pool_tokens",
            {"x": x, "affine": affine},
            (1, tokens, channels),
            weights={"positional": self.weight("out.2.positional_embedding")},
            activation=SILU,
        )
        qkv = self._dense("out.2.qkv_proj", {"x": h}, (1, tokens, 3 * channels))
        # Only the mean token's output is used: one query.
        h, p = self.attention(qkv, (1, 1, channels), **self._pool_attention(channels))
        logits = self._dense("out.2.c_proj", {"x": h}, (1, 1, self.cfg.out_channels))
        return {"x": x, "affine": affine, "qkv": qkv, "p": p, "logits": logits}

    def _pool_attention(self, channels):
        return {"heads": channels // self.cfg.num_head_channels, "order": 1}

    def _adaptive_head(self, blocks):
        x = blocks[-1][-1].y
        affine = self.norm("out.0", (x,))
        parts = {"x": x, "affine": affine}
        h = self.op("mean_pool", parts, (1, 1, x.channels), activation=SILU)
        return parts | {"logits": self._dense("out.3", {"x": h}, (1, 1, self.cfg.out_channels))}

    def _spatial_head(self, blocks):
        outputs = [values[-1].y for values in blocks]
        means = {
            f"x{i}": self.op("mean_pool", {"x": y}, (1, 1, y.channels))
            for i, y in enumerate(outputs)
        }
        features = self.op("concat", means, (1, 1, sum(y.channels for y in outputs)))
        classes, hidden = (1, 1, self.cfg.out_channels), (1, 1, _HIDDEN)
        if self.cfg.pool == "spatial":
            h = self._dense("out.0", {"x": features}, hidden)
            logits = self._dense("out.2", {"x": h}, classes, activation=RELU)
            return {"h": h, "logits": logits}
        h = self._dense("out.0", {"x": features}, hidden, stats=True)
        affine = self.norm("out.1", (h,))
        logits = self._dense("out.3", {"x": h, "affine": affine}, classes, activation=SILU)
        return {"h": h, "affine": affine, "logits": logits}

    def _dense(self, name, inputs, shape, **options):
        return self.op("linear", inputs, shape, weights=self.layer(name), **options)

    # ---- gradient ----

    def input_gradient(self, values: ClassifierValues, grad: Buffer) -> Buffer:
        """Gradient of the logits {1, 1, K} -> gradient of x, NCHW {1, 1, C * S * S}."""
        on_means = None
        if self.cfg.pool == "attention":
            grad = self._attention_head_gradient(values.head, grad)
        elif self.cfg.pool == "adaptive":
            grad = self._linear_gradient("out.3", grad)
            grad = self._norm_gradient(values.head["x"], values.head["affine"], grad)
        else:
            on_means, grad = self._spatial_head_gradient(values.head, grad), None
        offset = 0 if on_means is None else on_means.channels
        (stem,), *blocks = values.blocks
        for layers in reversed(blocks):
            if on_means is not None:
                offset -= layers[-1].y.channels
                grad = self._add_mean_gradient(on_means, offset, layers[-1].y, grad)
            for layer in reversed(layers):
                grad = self._layer_gradient(layer, grad)
        if on_means is not None:
            grad = self._add_mean_gradient(on_means, 0, stem.y, grad)
        height, width, _ = stem.y.shape
        channels = self.cfg.in_channels
        grad = self._conv_gradient(stem.layer.name, grad, (height, width, channels))
        return self.op("to_nchw", {"x": grad}, (1, 1, height * width * channels))

    def _attention_head_gradient(self, head, grad):
        x, qkv = head["x"], head["qkv"]
        grad = self._linear_gradient("out.2.c_proj", grad)
        grad = self.op(
            "attention_backward",
            {"qkv": qkv, "grad": grad, "p": head["p"]},
            qkv.shape,
            output="dqkv",
            **self._pool_attention(x.channels),
        )
        grad = self._linear_gradient("out.2.qkv_proj", grad)
        grad = self.op("attention_pool_tokens_backward", {"grad": grad}, x.shape)
        return self._norm_gradient(x, head["affine"], grad)

    def _spatial_head_gradient(self, head, grad):
        """Gradient of the concatenated means."""
        h = head["h"]
        if self.cfg.pool == "spatial":
            grad = self._linear_gradient("out.2", grad)
            grad = self.op("relu_backward", {"x": h, "grad": grad}, h.shape)
        else:
            grad = self._norm_gradient(h, head["affine"], self._linear_gradient("out.3", grad))
        return self._linear_gradient("out.0", grad)

    def _add_mean_gradient(self, on_means, offset, y, grad):
        """The gradient of a block's output y, with that of its channels' means."""
        parts = {"grad": on_means, "add": grad}
        return self.op("average_backward", parts, y.shape, offset=offset)

    def _layer_gradient(self, values, grad):
        if isinstance(values, ResBlockValues):
            return self._res_block_gradient(values, grad)
        if isinstance(values, AttentionValues):
            return self._attention_block_gradient(values, grad)
        assert isinstance(values, LayerValues) and values.layer.kind == "down_conv"
        grad = self.op("zero_insert", {"x": grad}, (*values.x.shape[:2], grad.channels))
        return self._conv_gradient(values.layer.name, grad, values.x.shape)

    def _res_block_gradient(self, values, grad):
        name, (x,), h = values.layer.name, values.x, values.h
        scale = math.sqrt(0.5) if self.cfg.rescale_residual else 1.0
        g = self._conv_gradient(f"{name}.out_layers.3", grad, h.shape, output_scale=scale)
        modulated_by = None if self.cfg.use_scale_shift_norm else name
        g = self._norm_gradient(h, values.affine_out, g, modulated_by=modulated_by)
        g = self._conv_gradient(f"{name}.in_layers.2", g, (*h.shape[:2], x.channels))
        if f"{name}.skip_connection.weight" in self.shapes:
            residual = self._linear_gradient(f"{name}.skip_connection", grad, output_scale=scale)
            return self._norm_gradient(x, values.affine_in, g, residual)
        # A down-sampling block's g and grad are of averages of 2x2 pixels.
        return self._norm_gradient(x, values.affine_in, g, grad, residual_scale=scale)

    def _attention_block_gradient(self, values, grad):
        name, x, qkv = values.layer.name, values.x, values.qkv
        g = self._linear_gradient(f"{name}.proj_out", grad)
        g = self.op(
            "attention_backward",
            {"qkv": qkv, "grad": g, "p": values.p},
            qkv.shape,
            output="dqkv",
            heads=values.layer.heads,
            order=int(self.cfg.use_new_attention_order),
        )
        g = self._linear_gradient(f"{name}.qkv", g)
        return self._norm_gradient(x, values.affine, g, grad, activation=0)

    def _norm_gradient(
        self, x, affine, grad, residual=None, *, activation=SILU, modulated_by=None, **attributes
    ):
        """x: what was normalised; modulated_by: the block whose modulation was added to x."""
        inputs = {"x": x, "stats": x.stats, "affine": affine, "grad": grad, "residual": residual}
        attributes |= {"groups": self.cfg.norm_groups, "eps": NORM_EPS, "activation": activation}
        if modulated_by is not None:
            inputs["modulation"] = self.modulation
            attributes |= {"mode": 2, "offset": self._offsets[modulated_by]}
        return self.op("norm_backward", inputs, x.shape, output="dx", **attributes)

    def _conv_gradient(self, name, grad, shape, **attributes):
        """The 3x3 convolution with the weights of ``name`` turned by half a turn, channels swapped.

        (The data gradient of a convolution: Dumoulin & Visin 2016, section 4.2.)
        """
        name = f"{name}.weight"
        outputs, inputs, *kernel = self.shapes[name]
        weight = self.weight(name, _rotated, (inputs, outputs, *kernel))
        return self.op("conv3x3", {"x": grad}, shape, weights={"weight": weight}, **attributes)

    def _linear_gradient(self, name, grad, **attributes):
        """The dense layer with the weights of ``name`` transposed, on every pixel."""
        name = f"{name}.weight"
        outputs, inputs = self.shapes[name][:2]
        weight = self.weight(name, _transposed, (inputs, outputs))
        shape = (*grad.shape[:2], inputs)
        return self.op("linear", {"x": grad}, shape, weights={"weight": weight}, **attributes)


def _rotated(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]


def _transposed(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(weight.shape[:2]).T
