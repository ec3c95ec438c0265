"""group_norm of the native engine: channel statistics in, one affine map per channel out."""

import numpy as np
import pytest
import torch
from op_checks import C, OpCase, check_op, check_shapes, random_array

SEED = 612


def make_case(batch, c1, c2, groups, mode, *, extra=3, shift=0.0):
    """Statistics of random images, so that torch's group_norm of the images can judge."""
    rng = np.random.default_rng(SEED + c1 + 5 * c2 + groups)
    channels = c1 + c2
    x = random_array(rng, batch, 6, 5, channels, scale=2.0, shift=shift)
    stats = np.stack(
        [x.mean(axis=(1, 2), dtype=np.float64), x.var(axis=(1, 2), dtype=np.float64)], 1
    )
    stats = stats[:, None].astype(np.float32)
    inputs = {"stats": np.ascontiguousarray(stats[..., :c1])}
    if c2:
        inputs["stats2"] = np.ascontiguousarray(stats[..., c1:])
    attributes = {"groups": groups, "eps": 1e-5, "mode": mode}
    if mode:
        size = (2 if mode == 1 else 1) * channels
        inputs["modulation"] = random_array(rng, batch, 1, 1, size + 2 * extra)
        attributes["offset"] = extra
    weights = {"weight": random_array(rng, channels) + 1, "bias": random_array(rng, channels)}
    return x, inputs, attributes, weights


def group_norm(x, inputs, attributes, weights, dtype):
    """The normalised, modulated images [N, H, W, C]."""
    x = torch.from_numpy(x).to(dtype).permute(0, 3, 1, 2)
    channels, mode = x.shape[1], attributes["mode"]
    if mode:
        row = torch.from_numpy(inputs["modulation"][:, 0, 0, attributes["offset"] :]).to(dtype)
    if mode == 2:
        x = x + row[:, :channels, None, None]
    weight, bias = (torch.from_numpy(weights[key]).to(dtype) for key in ("weight", "bias"))
    y = torch.nn.functional.group_norm(x, attributes["groups"], weight, bias, attributes["eps"])
    if mode == 1:
        scale, shift = row[:, :channels, None, None], row[:, channels : 2 * channels, None, None]
        y = y * (1 + scale) + shift
    return y.permute(0, 2, 3, 1).numpy()


CASES = [(192, 0, 32), (192, 192, 32), (768, 576, 32), (1, 0, 1), (5, 0, 5), (7, 2, 3), (6, 10, 1)]


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("c1, c2, groups", CASES)
def test_against_torch(c1, c2, groups, mode):
    x, inputs, attributes, weights = make_case(3, c1, c2, groups, mode)
    exact = group_norm(x, inputs, attributes, weights, torch.float64)
    plain = group_norm(x, inputs, attributes, weights, torch.float32)
    outputs = {"affine": (1, 2, c1 + c2)}
    affine = C.run_engine_op("group_norm", inputs, outputs, attributes, weights)["affine"]
    a, b = affine[:, :, :1], affine[:, :, 1:]
    error = np.abs(a.astype(np.float32) * x + b - exact).max()
    assert error <= 2 * np.abs(plain - exact).max() + 1e-6
    check_op("group_norm", inputs, outputs, {"affine": affine}, None, attributes, weights)


def random_case(rng):
    """Judged by the formula of the affine map itself."""
    groups, mode, batch = (int(n) for n in rng.integers((1, 0, 1), (7, 3, 4)))
    channels = groups * int(rng.integers(1, 40))
    c2 = int(rng.integers(0, channels))
    _, inputs, attributes, weights = make_case(batch, channels - c2, c2, groups, mode)
    stats = [inputs[key].astype(np.float64) for key in ("stats", "stats2") if key in inputs]
    mean, variance = np.concatenate(stats, axis=-1)[:, 0].transpose(1, 0, 2)
    scale, shift = np.zeros((2, batch, channels))
    if mode:
        row = inputs["modulation"][:, 0, 0, attributes["offset"] :].astype(np.float64)
        scale, shift = (row[:, i * channels :][:, :channels] for i in (0, mode % 2))
    added = shift if mode == 2 else 0.0
    mean = (mean + added).reshape(batch, groups, -1)
    of_group = mean.mean(-1, keepdims=True)
    spread = variance.reshape(mean.shape) + (mean - of_group) ** 2
    slope = (spread.mean(-1, keepdims=True) + attributes["eps"]) ** -0.5 * np.ones_like(mean)
    a = slope.reshape(batch, channels) * weights["weight"]
    b = weights["bias"] + a * (added - (of_group + 0 * mean).reshape(batch, channels))
    if mode == 1:
        a, b = a * (1 + scale), b * (1 + scale) + shift
    exact = {"affine": np.stack([a, b], axis=1)}
    return OpCase(inputs, {"affine": (1, 2, channels)}, exact, None, attributes, weights)


def test_random_shapes():
    check_shapes("group_norm", random_case, seed=SEED)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_constant_image(mode):
    """No variance at all: eps alone keeps the slope finite."""
    _, inputs, attributes, weights = make_case(1, 8, 0, 2, 0)
    inputs["stats"][:] = np.float32(3.0) * np.array([1.0, 0.0], np.float32)[None, None, :, None]
    affine = C.run_engine_op("group_norm", inputs, {"affine": (1, 2, 8)}, attributes, weights)
    a, b = affine["affine"][0, 0]
    np.testing.assert_allclose(a, weights["weight"] / np.sqrt(1e-5), rtol=1e-6)
    np.testing.assert_allclose(a * 3 + b, weights["bias"], atol=1e-3)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"groups": 3}, "groups=3 does not divide the 8 channels"),
        ({"groups": 2, "mode": 1}, "mode=1 needs the input modulation"),
        ({"groups": 2, "mode": 4}, "mode=4"),
        ({"groups": 2, "eps": 0}, "eps=0"),
    ],
)
def test_bad_arguments(attributes, message):
    _, inputs, _, weights = make_case(1, 8, 0, 2, 0)
    with pytest.raises(ValueError, match=message):
        C.run_engine_op("group_norm", inputs, {"affine": (1, 2, 8)}, attributes, weights)


def test_modulation_too_short():
    _, inputs, attributes, weights = make_case(1, 8, 0, 2, 1)
    attributes["offset"] = 7
    with pytest.raises(ValueError, match="need 1x1x23"):
        C.run_engine_op("group_norm", inputs, {"affine": (1, 2, 8)}, attributes, weights)
