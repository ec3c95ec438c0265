"""The graph of a noisy classifier's gradient: ``models.classifier_gradient`` op by op."""

from __future__ import annotations

import dataclasses
import math

from adm_rt.export.layers import AttentionValues, Image, NetworkGraph, ResBlockValues
from adm_rt.models.structure import DOWN, UP


def classifier_gradient_graph(cfg, dtype="float32", loss_scale=1.0) -> NetworkGraph:
    """x [N, 3, S, S], t [N], y [N] -> gradient d log p(y | x_t) / d x_t, float32.

    loss_scale: what the gradient is multiplied by on its way through the network.
    """
    if not 0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale={loss_scale} must be positive and finite; 1.0 for none")
    graph = ClassifierGradientGraph(cfg, dtype, keeps=True)
    graph.embed("t")
    blocks = graph.encoder(graph.stem("x"))
    heads = {"attention": AttentionHead, "adaptive": AdaptiveHead}
    head = heads.get(cfg.pool, SpatialHead)(graph)
    logits = head.forward([values[-1].y for values in blocks])
    grad = graph.logits_gradient(logits, loss_scale)
    graph.trunk_gradient(head, head.gradient(grad), blocks)
    graph.unscaled(loss_scale)
    graph.finish("gradient")
    return graph


class ClassifierGradientGraph(NetworkGraph):
    """The gradient of each of the classifier's layers, last to first."""

    def logits_gradient(self, logits, loss_scale):
        """loss_scale * (one_hot(y) - softmax(logits)), [N, K] float32."""
        with self.scope("logits"):
            classes = self.constant([list(range(self.cfg.num_classes))], "int64")
            column = self.op("Unsqueeze", "y", self.constant([1], "int64"))
            one_hot = self.op("Cast", self.op("Equal", column, classes), to=1)
            grad = self.op("Sub", one_hot, self.op("Softmax", logits, axis=-1))
            if loss_scale == 1:
                return grad
            return self.op("Mul", grad, self.constant(loss_scale, "float32"))

    def trunk_gradient(self, head, grad, blocks):
        """The gradient of the last block's output -> that of x, in the trunk's dtype."""
        (stem,), *blocks = blocks
        outputs = [stem.y, *(values[-1].y for values in blocks[:-1])]
        for values, before in zip(reversed(blocks), reversed(outputs), strict=True):
            for layer in reversed(values):
                grad = self.layer_gradient(layer, grad)
            grad = head.with_means(grad, before)
        return self.conv_gradient(grad, stem.layer.name)

    def unscaled(self, loss_scale):
        """The newest value in float32, divided by loss_scale."""
        with self.scope("gradient"):
            grad = self.cast(self.operations[-1].outputs[0], "float32")
            if loss_scale != 1:
                self.op("Mul", grad, self.constant(1 / loss_scale, "float32"))

    def layer_gradient(self, values, grad: Image) -> Image:
        if isinstance(values, ResBlockValues):
            return self.res_block_gradient(values, grad)
        if isinstance(values, AttentionValues):
            return self.attention_block_gradient(values, grad)
        return self.strided_conv_gradient(values, grad)

    def res_block_gradient(self, values: ResBlockValues, grad: Image) -> Image:
        name, down = values.layer.name, values.layer.resample == DOWN
        with self.scope(f"{name}.gradient"):
            grad = dataclasses.replace(grad, name=self.rescaled(grad.name))
        h = self.norm_gradient(self.conv_gradient(grad, f"{name}.out_layers.3"), values.norm_out)
        h = self.conv_gradient(h, f"{name}.in_layers.2", ".rotated_quarter" if down else ".rotated")
        if f"{name}.skip_connection.weight" in self.shapes:
            grad = self.conv_gradient(grad, f"{name}.skip_connection")
        if down:
            h = self.resample(h, UP, f"{name}.gradient")
            with self.scope(f"{name}.gradient"):
                quarter = self.op("Mul", grad.name, self.constant(0.25, "trunk"))
            grad = dataclasses.replace(grad, name=quarter)
            grad = self.resample(grad, UP, f"{name}.gradient")
        return self.sum(self.norm_gradient(h, values.norm_in), grad, f"{name}.gradient")

    def attention_block_gradient(self, values: AttentionValues, grad: Image) -> Image:
        name, (out, stats) = values.layer.name, values.out
        g = self.tokens(self.conv_gradient(grad, f"{name}.proj_out"), f"{name}.gradient")
        order = "new" if self.cfg.use_new_attention_order else "legacy"
        sizes = self.attention_sizes(values.layer.heads, grad.channels, grad.height * grad.width)
        with self.scope(f"{name}.gradient"):
            (g,) = self.node(f"qkv_attention_backward_{order}", g, values.qkv, out, stats, **sizes)
        wide = dataclasses.replace(grad, channels=3 * grad.channels)
        h = self.conv_gradient(self.image(g, wide, f"{name}.gradient"), f"{name}.qkv")
        return self.sum(self.norm_gradient(h, values.norm), grad, f"{name}.gradient")

    def strided_conv_gradient(self, values, grad: Image) -> Image:
        name, x = values.layer.name, values.x
        with self.scope(f"{name}.gradient"):
            # Sides are even: one row and column less of padding at the end gives all of them.
            dx = self.op(
                "ConvTranspose",
                grad.name,
                self.weight(f"{name}.weight"),
                kernel_shape=[3, 3],
                strides=[2, 2],
                pads=[1, 1, 0, 0],
            )
        return dataclasses.replace(x, name=dx)

    def sum(self, a: Image, b: Image, scope) -> Image:
        with self.scope(scope):
            return dataclasses.replace(a, name=self.op("Add", a.name, b.name))


class _Head:
    """What turns the last block's output into logits, in float32.

    ``forward(outputs)``: the stem's and every block's output -> logits [N, K].
    ``gradient(grad)``: of the logits -> of the last block's output, in the trunk's dtype.
    ``with_means(grad, y)``: adds what the head takes from the output y of an earlier block.
    """

    def __init__(self, graph: ClassifierGradientGraph):
        self.graph = graph

    def with_means(self, grad: Image, y: Image) -> Image:
        return grad

    def wide(self, x: Image) -> Image:
        with self.graph.scope("out"):
            return dataclasses.replace(x, name=self.graph.cast(x.name, "float32"))

    def narrow(self, grad: Image) -> Image:
        with self.graph.scope("out.gradient"):
            name = self.graph.cast(grad.name, "trunk", "float32")
        return dataclasses.replace(grad, name=name)


class AttentionHead(_Head):
    """GroupNorm, SiLU and attention pooling, of which only token 0 asks."""

    def forward(self, outputs):
        graph, x = self.graph, self.wide(outputs[-1])
        length = x.height * x.width
        h, self.norm = graph.norm(x, "out.0")
        with graph.scope("out.2"):
            h = graph.reshape(h.name, [0, x.channels, 1, length])
            mean = graph.op("ReduceMean", h, graph.constant([3], "int64"), keepdims=1)
            h = graph.op("Concat", mean, h, axis=3)
            shape = (1, x.channels, 1, length + 1)
            h = graph.op("Add", h, graph.weight("out.2.positional_embedding", shape, wide=True))
        tokens = Image(h, x.channels, 1, length + 1)
        self.qkv = graph.tokens(graph.conv(tokens, "out.2.qkv_proj", wide=True), "out.2")
        heads = x.channels // graph.cfg.num_head_channels
        self.sizes = graph.attention_sizes(heads, x.channels, 1)
        self.out = graph.attention(self.qkv, "out.2", "new", heads, x.channels, 1)
        self.x = x
        with graph.scope("out.2"):
            pooled = graph.reshape(self.out[0], [0, x.channels])
        return graph.linear_in_scope(pooled, "out.2.c_proj")

    def gradient(self, grad):
        graph, x, scope = self.graph, self.x, "out.2.gradient"
        length = x.height * x.width
        with graph.scope(scope):
            g = graph.linear_gradient(grad, "out.2.c_proj")
            g = graph.reshape(g, [0, 1, x.channels])
            (g,) = graph.node("qkv_attention_backward_new", g, self.qkv, *self.out, **self.sizes)
        wide = Image("", 3 * x.channels, 1, length + 1)
        h = graph.conv_gradient(graph.image(g, wide, scope), "out.2.qkv_proj", wide=True)
        with graph.scope(scope):
            mean, rest = graph.split(h.name, 3, [1, length])
            share = graph.op("Mul", mean, graph.constant(1 / length, "float32"))
            h = graph.op("Add", rest, share)  # token 0 is the mean of the others
            h = graph.reshape(h, [0, x.channels, x.height, x.width])
        return self.narrow(graph.norm_gradient(dataclasses.replace(x, name=h), self.norm))


class AdaptiveHead(_Head):
    """GroupNorm, SiLU, global average, 1x1 convolution."""

    def forward(self, outputs):
        graph, x = self.graph, self.wide(outputs[-1])
        h, self.norm = graph.norm(x, "out.0")
        self.x = x
        with graph.scope("out"):
            mean = graph.mean(h.name, [2, 3])
        return graph.linear_in_scope(mean, "out.3")

    def gradient(self, grad):
        graph = self.graph
        with graph.scope("out.3.gradient"):
            g = spread(graph, graph.linear_gradient(grad, "out.3"), self.x, expanded=True)
        return self.narrow(graph.norm_gradient(g, self.norm))


class SpatialHead(_Head):
    """Two dense layers on the means of every block's output ("spatial", "spatial_v2")."""

    def forward(self, outputs):
        graph, v2 = self.graph, self.graph.cfg.pool == "spatial_v2"
        with graph.scope("out"):
            means = [graph.mean(graph.cast(y.name, "float32"), [2, 3]) for y in outputs]
            features = graph.op("Concat", *means, axis=1)
        self.outputs = outputs
        h = self.hidden = graph.linear_in_scope(features, "out.0")
        if v2:
            width = graph.shapes["out.1.weight"][0]
            with graph.scope("out.1"):
                h = graph.reshape(h, [0, width, 1, 1])
            h, self.norm = graph.norm(Image(h, width, 1, 1), "out.1")
            with graph.scope("out.1"):
                h = graph.reshape(h.name, [0, width])
            return graph.linear_in_scope(h, "out.3")
        with graph.scope("out.1"):
            h = graph.op("Relu", h)
        return graph.linear_in_scope(h, "out.2")

    def gradient(self, grad):
        graph = self.graph
        with graph.scope("out.gradient"):
            if graph.cfg.pool == "spatial":
                h = graph.linear_gradient(grad, "out.2")
                positive = graph.op("Greater", self.hidden, graph.constant(0.0, "float32"))
                h = graph.op("Mul", h, graph.op("Cast", positive, to=1))
            else:
                h = graph.linear_gradient(grad, "out.3")
                width = graph.shapes["out.1.weight"][0]
                h = graph.reshape(h, [0, width, 1, 1])
                h = graph.norm_gradient(Image(h, width, 1, 1), self.norm).name
                h = graph.reshape(h, [0, width])
            h = graph.linear_gradient(h, "out.0")
            self.on_means = list(graph.split(h, 1, [y.channels for y in self.outputs]))
            return self.narrow(spread(graph, self.on_means.pop(), self.outputs[-1], expanded=True))

    def with_means(self, grad, y):
        graph = self.graph
        with graph.scope("out.gradient"):
            share = self.narrow(spread(graph, self.on_means.pop(), y))
        return graph.sum(grad, share, "out.gradient")


def spread(graph, means, y: Image, expanded=False) -> Image:
    """The gradient of per-channel means [N, C] -> that of the y [N, C, H, W] they were taken of.

    Without ``expanded`` it is [N, C, 1, 1], which an addition spreads by itself.
    """
    share = graph.op("Mul", means, graph.constant(1 / (y.height * y.width), "float32"))
    share = graph.reshape(share, [0, -1, 1, 1])
    if expanded:
        share = graph.op("Expand", share, graph.constant([1, 1, y.height, y.width], "int64"))
    return dataclasses.replace(y, name=share)
