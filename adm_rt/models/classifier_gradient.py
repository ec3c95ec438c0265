"""d log p(y | x_t) / d x_t of a noisy classifier as a network of its own, without autograd.

Classifier guidance (Dhariwal & Nichol 2021, section 4) needs this gradient at every step. Every
block here runs its published counterpart forward, keeps what its gradient needs, and then maps the
gradient of its output to that of its input with forward operations: convolutions with rotated
weights, the ops' input gradients, resampling. So it can be exported like any other network, and no
gradient of a weight is ever made.
"""

import torch
import torch.nn.functional as F
from torch import nn

from adm_rt.models.blocks import AttentionBlock, ResBlock
from adm_rt.ops import input_gradients


def rotated(weight):
    """The weight [C, C', *kernel] of the convolution that maps gradients the other way.

    The data gradient of a convolution of stride 1 with "same" padding is a convolution with the
    kernel turned by half a turn and its channel axes exchanged (Dumoulin & Visin 2016, section
    4.2). weight: [C', C, *kernel].
    """
    spatial = tuple(range(2, weight.dim()))
    return weight.detach().flip(spatial).transpose(0, 1).contiguous()


def pointwise(x, weight, bias=None):
    """A 1-D convolution of kernel size 1: x [N, C, T], weight [C', C, 1] -> [N, C', T].

    Of the tokens of a channels_last image it is a matrix product, whose result lies likewise.
    """
    tokens = x.transpose(1, 2)
    if tokens.is_contiguous() and not x.is_contiguous():
        return F.linear(tokens, weight[:, :, 0], bias).transpose(1, 2)
    return F.conv1d(x, weight, bias)


class _Gradient(nn.Module):
    """Holds a layer's rotated weights as buffers, which are never saved."""

    def keep(self, name, weight):
        self.register_buffer(name, weight, persistent=False)


class _NormGradient:
    """A ``FusedGroupNorm`` with its gradient; has no state of its own."""

    def __init__(self, norm, silu):
        self.norm, self.silu = norm, silu

    def forward(self, x, scale_shift=None):
        n = self.norm
        return input_gradients.ada_group_norm_forward(
            x, n.weight, n.bias, scale_shift, n.num_groups, n.eps, self.silu
        )

    def gradient(self, grad, saved):
        return input_gradients.ada_group_norm_input_gradient(
            grad, saved, self.norm.num_groups, self.silu
        )


class ResBlockGradient(_Gradient):
    """A ``ResBlock``, plain or down-sampling, with or without AdaGN."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        first, second, skip = block.in_layers[2], block.out_layers[3], block.skip_connection
        self.resample = None if isinstance(block.resample, nn.Identity) else "down"
        self.keep("first", rotated(first.weight))
        self.keep("second", rotated(second.weight))
        self.keep("skip", None if isinstance(skip, nn.Identity) else rotated(skip.weight))
        self.out_norm = _NormGradient(block.out_layers[0], silu=True)

    def forward(self, x, modulation):
        """x [N, C, H, W]; modulation [N, 2C' or C'], this block's -> (y [N, C', H', W'], saved)."""
        block, norm = self.block, self.block.in_layers[0]
        h, x, saved_in = input_gradients.ada_group_norm_resample_forward(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, resample=self.resample
        )
        h = block.in_layers[2](h)
        if block.use_scale_shift_norm:
            h, saved_out = self.out_norm.forward(h, modulation)
        else:
            h, saved_out = self.out_norm.forward(h + modulation.to(h.dtype)[:, :, None, None])
        y = block.skip_connection(x) + block.out_layers[3](h)
        return (y if block.output_scale is None else y * block.output_scale), (saved_in, saved_out)

    def gradient(self, grad, saved):
        """Gradient of y -> gradient of x."""
        saved_in, saved_out = saved
        if self.block.output_scale is not None:
            grad = grad * self.block.output_scale
        h = self.out_norm.gradient(F.conv2d(grad, self.second, padding=1), saved_out)
        h = F.conv2d(h, self.first, padding=1)
        if self.skip is not None:
            grad = F.conv2d(grad, self.skip)
        return input_gradients.ada_group_norm_resample_input_gradient(
            h, grad, saved_in, self.block.in_layers[0].num_groups, resample=self.resample
        )


class AttentionBlockGradient(_Gradient):
    """An ``AttentionBlock`` in either order of its channels."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.keep("qkv", rotated(block.qkv.weight))
        self.keep("proj_out", rotated(block.proj_out.weight))
        self.norm = _NormGradient(block.norm, silu=False)

    def forward(self, x):
        """x [N, C, H, W] -> (y, saved)."""
        block, flat = self.block, x.flatten(2)
        h, saved_norm = self.norm.forward(flat)
        qkv = pointwise(h, block.qkv.weight, block.qkv.bias)
        h, saved_attention = input_gradients.qkv_attention_forward(
            qkv, block.num_heads, block.order
        )
        y = (flat + pointwise(h, block.proj_out.weight, block.proj_out.bias)).reshape(x.shape)
        return y, (saved_norm, saved_attention)

    def gradient(self, grad, saved):
        """Gradient of y -> gradient of x."""
        saved_norm, saved_attention = saved
        flat = grad.flatten(2)
        h = input_gradients.qkv_attention_input_gradient(
            pointwise(flat, self.proj_out), saved_attention, self.block.num_heads, self.block.order
        )
        h = self.norm.gradient(pointwise(h, self.qkv), saved_norm)
        return (h + flat).reshape(grad.shape)


class DownsampleGradient(nn.Module):
    """A strided 3x3 convolution (models without resblock_updown)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        """x [N, C, H, W] -> (y [N, C, H/2, W/2], ())."""
        return self.layer(x), ()

    def gradient(self, grad, saved):
        """Gradient of y -> gradient of x. H and W are even, hence output_padding."""
        weight = self.layer.op.weight
        return F.conv_transpose2d(grad, weight, stride=2, padding=1, output_padding=1)


class AttentionHeadGradient(_Gradient):
    """GroupNorm, SiLU and ``AttentionPool2d``: only token 0 asks."""

    def __init__(self, out):
        super().__init__()
        self.pool = out[2]
        self.norm = _NormGradient(out[0], silu=True)
        self.keep("qkv_proj", rotated(self.pool.qkv_proj.weight))
        self.keep("c_proj", rotated(self.pool.c_proj.weight))

    def forward(self, x):
        """x [N, C, S, S] -> (logits [N, K], saved)."""
        pool = self.pool
        h, saved_norm = self.norm.forward(x.to(self.norm.norm.weight.dtype))
        h = h.flatten(2)
        h = torch.cat([h.mean(dim=-1, keepdim=True), h], dim=-1)
        qkv = pool.qkv_proj(h + pool.positional_embedding[None].to(h.dtype))
        pooled, saved_attention = input_gradients.qkv_attention_forward(
            qkv, pool.num_heads, "new", num_queries=1
        )
        return pool.c_proj(pooled)[:, :, 0], (saved_norm, saved_attention)

    def gradient(self, grad, saved):
        """Gradient of the logits -> gradient of x (in the head's dtype)."""
        saved_norm, saved_attention = saved
        h = F.conv1d(grad[:, :, None], self.c_proj)
        h = input_gradients.qkv_attention_input_gradient(
            h, saved_attention, self.pool.num_heads, "new"
        )
        h = F.conv1d(h, self.qkv_proj)
        h = h[:, :, 1:] + h[:, :, :1] / (h.shape[2] - 1)  # token 0 is the mean of the others
        return self.norm.gradient(h.reshape(saved_norm[0].shape), saved_norm)


class AdaptiveHeadGradient(_Gradient):
    """GroupNorm, SiLU, global average, 1x1 convolution."""

    def __init__(self, out):
        super().__init__()
        self.out = out
        self.norm = _NormGradient(out[0], silu=True)
        self.keep("projection", rotated(out[3].weight))

    def forward(self, x):
        """x [N, C, S, S] -> (logits [N, K], saved)."""
        h, saved = self.norm.forward(x.to(self.norm.norm.weight.dtype))
        return self.out[3](h.mean(dim=(2, 3), keepdim=True)).flatten(1), saved

    def gradient(self, grad, saved):
        """Gradient of the logits -> gradient of x (in the head's dtype)."""
        x = saved[0]
        h = F.conv2d(grad[:, :, None, None], self.projection) / (x.shape[2] * x.shape[3])
        return self.norm.gradient(h.expand(x.shape), saved)


class SpatialHeadGradient(nn.Module):
    """Two dense layers on the means of every block's output ("spatial", "spatial_v2")."""

    def __init__(self, out):
        super().__init__()
        self.out = out
        self.norm = _NormGradient(out[1], silu=True) if len(out) == 4 else None

    def forward(self, means):
        """means: the block outputs' [N, C_i], in order -> (logits [N, K], saved)."""
        h = self.out[0](torch.cat(means, dim=-1))
        if self.norm is None:
            return self.out[-1](F.relu(h)), h
        h, saved = self.norm.forward(h)
        return self.out[-1](h), saved

    def gradient(self, grad, saved):
        """Gradient of the logits -> gradient of the concatenated means [N, sum C_i]."""
        h = F.linear(grad, self.out[-1].weight.t())
        h = h * (saved > 0) if self.norm is None else self.norm.gradient(h, saved)
        return F.linear(h, self.out[0].weight.t())


class ClassifierGradient(nn.Module):
    """The gradient network of a ``NoisyClassifier``, to be used under ``torch.no_grad()``.

    ``ClassifierGradient(classifier, loss_scale=1.0)`` shares the classifier's parameters and keeps
    rotated copies of its convolution weights, and the embedding layers of all residual blocks as
    one matrix: make a new one after changing them. The classifier's dropout is left out, as in
    evaluation mode.

    loss_scale: the gradient is carried through the network multiplied by it and divided by it at
    the end (Micikevicius et al. 2018, section 3.2). 1.0 unless the network computes in float16,
    whose smallest normal number is 6e-5: a power of two such as 1024.0 then.

    Works in every dtype and on every device the classifier is moved to.
    """

    def __init__(self, classifier, loss_scale=1.0):
        super().__init__()
        if not 0 < loss_scale < float("inf"):
            raise ValueError(f"loss_scale={loss_scale} must be positive and finite; 1.0 for none")
        self.classifier = classifier
        self.loss_scale = float(loss_scale)
        self.stem = classifier.input_blocks[0][0]
        self.register_buffer("stem_rotated", rotated(self.stem.weight), persistent=False)
        blocks = [*classifier.input_blocks[1:], classifier.middle_block]
        self.blocks = nn.ModuleList(
            nn.ModuleList(_layer_gradient(layer) for layer in block) for block in blocks
        )
        layers = [m.block.emb_layers[1] for m in self.modules() if isinstance(m, ResBlockGradient)]
        self.widths = [layer.out_features for layer in layers]
        for part in ("weight", "bias"):
            values = torch.cat([getattr(layer, part).detach() for layer in layers])
            self.register_buffer(f"modulation_{part}", values, persistent=False)
        self.spatial = classifier.cfg.pool.startswith("spatial")
        heads = {"attention": AttentionHeadGradient, "adaptive": AdaptiveHeadGradient}
        self.head = heads.get(classifier.cfg.pool, SpatialHeadGradient)(classifier.out)

    def forward(self, x, t, y):
        """x [N, C, S, S]; t [N] original timesteps; y [N] int64 -> like x, float32 (or float64)."""
        modulations = iter(self._modulations(t))
        h = self.stem(x.to(self.stem.weight.dtype))
        shapes, means, saved = [h.shape], [], []
        for block in self.blocks:
            if self.spatial:
                means.append(h.to(x.dtype).mean(dim=(2, 3)))
            for layer in block:
                conditioned = isinstance(layer, ResBlockGradient)
                h, kept = layer(h, next(modulations)) if conditioned else layer(h)
                saved.append(kept)
            shapes.append(h.shape)
        if self.spatial:
            logits, kept = self.head([*means, h.to(x.dtype).mean(dim=(2, 3))])
        else:
            logits, kept = self.head(h)
        grad = self.head.gradient(self._logits_gradient(logits, y).to(logits.dtype), kept)
        grad = self._trunk_gradient(grad, h.dtype, shapes, saved)
        grad = grad if grad.dtype == torch.float64 else grad.float()
        return grad if self.loss_scale == 1 else grad / self.loss_scale

    def _modulations(self, t):
        """Of every residual block, in order: all their embedding layers are one matrix product."""
        emb = F.silu(self.classifier.embed(t)).to(self.modulation_weight.dtype)
        rows = F.linear(emb, self.modulation_weight, self.modulation_bias)
        norm = self.classifier.middle_block[0].out_layers[0]
        return rows.to(norm.weight.dtype).split(self.widths, dim=1)

    def _logits_gradient(self, logits, y):
        """loss_scale * d log softmax(logits)[y] / d logits = loss_scale * (one_hot(y) - softmax)"""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        one_hot = torch.zeros_like(wide).scatter(1, y[:, None], 1.0)
        return (one_hot - torch.softmax(wide, dim=-1)) * self.loss_scale

    def _trunk_gradient(self, grad, dtype, shapes, saved):
        """shapes: of the stem's output and of every block's; empties ``saved`` from its end."""
        on_means = []
        if self.spatial:
            on_means = list(grad.split([shape[1] for shape in shapes], dim=-1))
            grad = _spread(on_means.pop(), shapes[-1])
        grad = grad.to(dtype)
        for block, shape in zip(reversed(self.blocks), reversed(shapes[:-1]), strict=True):
            for layer in reversed(block):
                grad = layer.gradient(grad, saved.pop())
            if self.spatial:
                grad = grad + _spread(on_means.pop(), shape).to(dtype)
        return F.conv2d(grad, self.stem_rotated, padding=1)


def _layer_gradient(layer):
    kinds = {ResBlock: ResBlockGradient, AttentionBlock: AttentionBlockGradient}
    return kinds.get(type(layer), DownsampleGradient)(layer)


def _spread(means, shape):
    """Gradient of per-channel means [N, C] -> gradient of the [N, C, H, W] they were taken of."""
    return (means / (shape[2] * shape[3]))[:, :, None, None].expand(shape)
