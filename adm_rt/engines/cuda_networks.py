"""Both networks in the form in which the torch engine runs them on CUDA; for inference only.

Activations and weights lie pixel by pixel (channels_last) and may be of a 16-bit type. Convolutions
are cuDNN's, 1x1 convolutions matrix products, norms and attention our ops: GroupNorm with AdaGN,
SiLU, the resampling and the concatenation with a skip connection is one op. The embedding layers of
all residual blocks are one matrix product. In float32 whatever the type: timestep and class
embedding, parameters and statistics of norms, softmax, the last convolution and the result.

All of it runs on the CPU, too, as the tests do. On a GPU it has not been measured, or run, yet.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F

from adm_rt import ops
from adm_rt.engines.base import LOSS_SCALES
from adm_rt.models.blocks import timestep_frequencies
from adm_rt.models.checkpoint import module_of
from adm_rt.models.classifier_gradient import ClassifierGradient
from adm_rt.models.structure import (
    DOWN,
    KEEP,
    UP,
    decoder_blocks,
    encoder_blocks,
    middle_layers,
    residual_layers,
)

_RESAMPLE = {KEEP: None, DOWN: "down", UP: "up"}


class CudaUNet:
    """A UNet or SuperResUNet: ``CudaUNet(unet, device, dtype)``.

    unet: the module or its ``ModelWeights``, which are copied; dtype: torch.float32, bfloat16 or
    float16, of the activations.
    """

    def __init__(self, unet, device, dtype):
        self.cfg, self._dtype = unet.cfg, dtype
        state = {name: t.detach() for name, t in module_of(unet).state_dict().items()}
        place = _Placement(state, device, dtype)
        self._layers = residual_layers(self.cfg)
        names = [f"{layer.name}.emb_layers.1" for layer in self._layers]
        self._widths = [len(state[f"{name}.bias"]) for name in names]
        self._modulation = place.joined(names)
        self._weights = {}
        for layer in self._layers:
            self._weights.update(place.residual_block(layer.name))
        for name in state:
            if name not in place.placed:
                self._weights[name] = place.placed_as_it_is(name)
        self._frequencies = timestep_frequencies(self.cfg.num_channels // 2, device)

    def __call__(self, x, t, y=None, low_res=None):
        """x [N, C, S, S] float32; t [N] float32; y, low_res as the module's -> [N, C or 2C, S, S]
        float32, channels_last."""
        if low_res is not None:
            enlarged = F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")
            x = torch.cat([x, enlarged], dim=1)
        modulations = self._modulations(t, y)
        h = x.to(self._dtype, memory_format=torch.channels_last)
        skips = []
        for block in encoder_blocks(self.cfg):
            h = self._run(block, h, modulations)
            skips.append(h)
        h = self._run(middle_layers(self.cfg), h, modulations)
        for block in decoder_blocks(self.cfg):
            h = self._run(block, h, modulations, skip=skips.pop())
        h = self._norm("out.0", h, silu=True).float()
        return F.conv2d(h, self._weights["out.2.weight"], self._weights["out.2.bias"], padding=1)

    def _modulations(self, t, y):
        """An iterator over those of all residual blocks, [N, 2C or C] each, in order."""
        angles = t[:, None] * self._frequencies
        emb = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        emb = F.pad(emb, (0, self.cfg.num_channels % 2)) if self.cfg.num_channels % 2 else emb
        emb = self._linear("time_embed.2", F.silu(self._linear("time_embed.0", emb)))
        if y is not None:
            emb = emb + F.embedding(y, self._weights["label_emb.weight"])
        rows = F.linear(F.silu(emb).to(self._dtype), *self._modulation)
        return iter(rows.split(self._widths, dim=1))

    def _run(self, layers, h, modulations, skip=None):
        for layer in layers:
            if layer.kind == "res":
                h = self._residual_block(layer, h, skip, next(modulations))
                skip = None  # the first layer's
            elif layer.kind == "attention":
                h = self._attention_block(layer, h)
            else:
                h = self._plain(layer, h)
        return h

    def _residual_block(self, layer, x, skip, modulation):
        w, name, cfg = self._weights, layer.name, self.cfg
        h, x = ops.ada_group_norm_resample(
            x,
            w[f"{name}.in_layers.0.weight"],
            w[f"{name}.in_layers.0.bias"],
            groups=cfg.norm_groups,
            skip=skip,
            resample=_RESAMPLE[layer.resample],
        )
        h = self._conv(f"{name}.in_layers.2", h)
        if cfg.use_scale_shift_norm:
            h = self._norm(f"{name}.out_layers.0", h, modulation, silu=True)
        else:
            h = self._norm(f"{name}.out_layers.0", h + modulation[:, :, None, None], silu=True)
        h = self._conv(f"{name}.out_layers.3", h)
        if f"{name}.skip_connection.weight" in w:
            x = self._linear(f"{name}.skip_connection", x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h += x
        if cfg.rescale_residual:
            h *= math.sqrt(0.5)
        return h

    def _attention_block(self, layer, x):
        name, tokens = layer.name, x.permute(0, 2, 3, 1).flatten(1, 2)  # [N, T, C], not a copy
        h = self._norm(f"{name}.norm", x, silu=False).permute(0, 2, 3, 1).flatten(1, 2)
        qkv = self._linear(f"{name}.qkv", h).transpose(1, 2)
        order = "new" if self.cfg.use_new_attention_order else "legacy"
        h = ops.qkv_attention(qkv, layer.heads, order).transpose(1, 2)
        h = self._linear(f"{name}.proj_out", h)
        h += tokens
        return h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _plain(self, layer, x):
        if layer.kind == "up_conv":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self._conv(layer.name, x, stride=2 if layer.kind == "down_conv" else 1)

    def _norm(self, name, x, modulation=None, *, silu):
        w = self._weights
        return ops.ada_group_norm(
            x, w[f"{name}.weight"], w[f"{name}.bias"], modulation, self.cfg.norm_groups, silu=silu
        )

    def _conv(self, name, x, stride=1):
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride=stride, padding=1)

    def _linear(self, name, x):
        """x [..., C] -> [..., C']. As a matrix: only so is the bias surely part of the product."""
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


class _Placement:
    """Weights of a state_dict on their way to the device: types, orders of memory, what is joined.

    ``placed``: names that are done.
    """

    def __init__(self, state, device, dtype):
        self._state, self._device, self._dtype = state, device, dtype
        self.placed = set()

    def joined(self, names):
        """(weight, bias) of several linear layers as one."""
        pair = []
        for part in ("weight", "bias"):
            keys = [f"{name}.{part}" for name in names]
            self.placed.update(keys)
            pair.append(torch.cat([self._state[key] for key in keys]).to(self._device, self._dtype))
        return pair

    def residual_block(self, name):
        """The second convolution's bias goes into that of the skip connection, if there is one: a
        matrix product adds it on its way, a convolution in a pass of its own."""
        skip, conv = f"{name}.skip_connection.bias", f"{name}.out_layers.3.bias"
        if skip not in self._state:
            return {}
        self.placed.update((skip, conv))
        both = self._state[skip].float() + self._state[conv].float()
        return {skip: both.to(self._device, self._dtype)}

    def placed_as_it_is(self, name):
        value = self._state[name]
        wide = name.startswith(("time_embed.", "label_emb.", "out.")) or _is_norm(name)
        value = value.to(self._device, torch.float32 if wide else self._dtype)
        if value.dim() == 4 and value.shape[2:] != (1, 1):
            return value.contiguous(memory_format=torch.channels_last)
        return value.flatten(1) if value.dim() > 2 else value  # a 1x1 convolution as a matrix


def _is_norm(name):
    return ".in_layers.0." in name or ".out_layers.0." in name or ".norm." in name


def gradient_network(classifier, device, dtype):
    """``ClassifierGradient`` of a copy of the classifier: blocks in dtype, channels_last.

    classifier: the module or its ``ModelWeights``. The head stays float32, as in the published
    half-precision form.
    """
    module = module_of(classifier)
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for part in (module.input_blocks, module.middle_block):
        for layer in part.modules():
            if isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d)):
                layer.to(dtype)
    network = ClassifierGradient(module, LOSS_SCALES[str(dtype).removeprefix("torch.")])
    network.modulation_weight = network.modulation_weight.to(dtype)
    network.modulation_bias = network.modulation_bias.to(dtype)
    return network.to(device, memory_format=torch.channels_last)
