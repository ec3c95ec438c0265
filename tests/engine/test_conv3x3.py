"""conv3x3 of the native engine: every algorithm, all that is fused into it, all edges of tiles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_checks import C, check_op, random_array, run, same_bits

SEED = 6303
NONE, POOL, UP = 0, 1, 2


def make_case(
    batch,
    h,
    w,
    c1,
    c2,
    co,
    *,
    affine=False,
    silu=False,
    bias=True,
    residual=None,
    resample=NONE,
    scale=1.0,
    stats=False,
    fast=False,
):
    """Inputs, outputs, attributes and weights of an op whose output is h x w."""
    rng = np.random.default_rng([SEED, batch, h, w, c1, c2, co])

    def resized(mode, channels):
        height, width = {NONE: (h, w), POOL: (2 * h, 2 * w), UP: (h // 2, w // 2)}[mode]
        return random_array(rng, batch, height, width, channels)

    inputs = {"x": resized(resample, c1)}
    if c2:
        inputs["x2"] = resized(resample, c2)
    if affine:
        inputs["affine"] = random_array(rng, batch, 1, 2, c1 + c2)
    if residual is not None:
        inputs["residual"] = resized(residual, co)
    weights = {"weight": random_array(rng, co, c1 + c2, 3, 3, scale=(9 * (c1 + c2)) ** -0.5)}
    if bias:
        weights["bias"] = random_array(rng, co)
    outputs = {"y": (h, w, co)}
    if stats:
        outputs["stats"] = (1, 2, co)
    attributes = {
        "activation": int(silu),
        "resample": resample,
        "residual_resample": residual or NONE,
        "output_scale": scale,
        "fast": int(fast),
    }
    return inputs, outputs, attributes, weights


def nchw(x, dtype):
    return torch.from_numpy(x).to(dtype).permute(0, 3, 1, 2)


def resampled(x, mode):
    if mode == POOL:
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if mode == UP else x


def reference(inputs, attributes, weights, dtype=torch.float64):
    """The op in torch, at the precision of ``dtype``."""
    x = torch.cat([nchw(inputs[key], dtype) for key in ("x", "x2") if key in inputs], dim=1)
    if "affine" in inputs:
        a, b = torch.from_numpy(inputs["affine"]).to(dtype)[:, 0, :, :, None, None].unbind(1)
        x = a * x + b
    if attributes["activation"]:
        x = F.silu(x)
    bias = torch.from_numpy(weights["bias"]).to(dtype) if "bias" in weights else None
    y = F.conv2d(
        resampled(x, attributes["resample"]),
        torch.from_numpy(weights["weight"]).to(dtype),
        bias,
        padding=1,
    )
    if "residual" in inputs:
        y = y + resampled(nchw(inputs["residual"], dtype), attributes["residual_resample"])
    y = (y * attributes["output_scale"]).permute(0, 2, 3, 1)
    pixels = y.flatten(1, 2)
    stats = torch.stack([pixels.mean(1), pixels.var(1, correction=0)], dim=1)
    return {"y": y.numpy(), "stats": stats.numpy()}


def check(*shape, slack=2e-6, **fused):
    inputs, outputs, attributes, weights = make_case(*shape, **fused)
    exact = reference(inputs, attributes, weights)
    plain = reference(inputs, attributes, weights, torch.float32)
    check_op("conv3x3", inputs, outputs, exact, plain, attributes, weights, slack=slack)


# (batch, H, W, C1, C2, Co, what is fused)
EVERYTHING = {"affine": True, "silu": True, "residual": NONE, "scale": 0.7071, "stats": True}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 19, 31, 32, 33])
def test_sizes(size):
    check(2, size, size, 6, 0, 5, **EVERYTHING)
    check(1, size, 2 * size + 1, 17, 3, 18, bias=False, stats=True)
    check(1, 3 * size, size, 16, 16, 32, affine=True)
