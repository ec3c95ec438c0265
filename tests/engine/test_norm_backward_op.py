"""norm_backward and average_backward of the native engine against float64 autograd."""

import numpy as np
import pytest
import torch
from op_checks import C, OpCase, check_cases, check_op, check_shapes, random_array

SEED = 811
OFFSET = 3  # of the modulation in its row


def forward(x, parts, attributes, dtype, factor):
    """The activation (averaged over factor x factor pixels) of NCHW x."""
    weight, bias, row = (torch.from_numpy(parts[key]).to(dtype) for key in ("w", "b", "row"))
    channels, mode = x.shape[1], attributes["mode"]
    row = row[:, OFFSET:]
    if mode == 2:
        x = x + row[:, :channels, None, None]
    v = torch.nn.functional.group_norm(x, attributes["groups"], weight, bias, attributes["eps"])
    if mode == 1:
        v = v * (1 + row[:, :channels, None, None]) + row[:, channels : 2 * channels, None, None]
    v = torch.nn.functional.silu(v) if attributes["activation"] else v
    return torch.nn.functional.avg_pool2d(v, factor)


def make_case(batch, height, width, channels, groups, mode, activation, factors, shift=0.0):
    """(inputs, attributes, exact, plain); factors: pixels per pixel of (grad, residual or None)."""
    rng = np.random.default_rng([SEED, height, channels, groups, mode])
    x = random_array(rng, batch, height, width, channels, scale=2.0, shift=shift)
    parts = {"w": random_array(rng, channels) + 1, "b": random_array(rng, channels)}
    parts["row"] = random_array(rng, batch, 2 * channels + 2 * OFFSET)
    attributes = {"groups": groups, "eps": 1e-5, "mode": mode, "activation": activation}
    attributes["offset"] = OFFSET
    wide = x.astype(np.float64)
    stats = np.stack([wide.mean((1, 2)), wide.var((1, 2))], 1)[:, None].astype(np.float32)
    inputs = {"x": x, "stats": stats}
    weights = {"weight": parts["w"], "bias": parts["b"]}
    norm = {key: attributes[key] for key in ("groups", "eps", "mode", "offset")}
    modulation = {"modulation": parts["row"][:, None, None]} if mode else {}
    inputs["affine"] = C.run_engine_op(
        "group_norm", {"stats": stats, **modulation}, {"affine": (1, 2, channels)}, norm, weights
    )["affine"]
    if mode == 2:
        inputs |= modulation
    for name, factor in zip(("grad", "residual"), factors, strict=True):
        if factor is not None:
            shape = batch, height // factor, width // factor, channels
            inputs[name] = random_array(rng, *shape)
    if factors[1] is not None:
        attributes["residual_scale"] = 0.75
    results = []
    for dtype in (torch.float64, torch.float32):
        image = torch.from_numpy(x).to(dtype).permute(0, 3, 1, 2).requires_grad_(True)
        y = forward(image, parts, attributes, dtype, factors[0])
        grad = torch.from_numpy(inputs["grad"]).to(dtype).permute(0, 3, 1, 2)
        (dx,) = torch.autograd.grad(y, image, grad)
        if factors[1] is not None:
            residual = torch.from_numpy(inputs["residual"]).to(dtype).permute(0, 3, 1, 2)
            dx = dx + 0.75 / factors[1] ** 2 * torch.nn.functional.interpolate(
                residual, size=(height, width)
            )
        results.append({"dx": dx.permute(0, 2, 3, 1).numpy()})
    return inputs, attributes, *results


CASES = [
    # batch, height, width, channels, groups, mode, activation, (grad, residual) factors
    (1, 64, 64, 128, 32, 1, 1, (1, None)),
    (2, 32, 32, 128, 32, 0, 1, (2, 2)),
    (3, 8, 8, 512, 32, 1, 1, (1, 1)),
    (2, 16, 16, 96, 32, 2, 1, (1, 2)),
    (2, 16, 16, 256, 32, 0, 0, (1, 1)),
    (3, 8, 8, 64, 8, 0, 1, (8, None)),
    (2, 1, 1, 96, 32, 0, 1, (1, None)),
    (2, 12, 20, 7, 7, 1, 1, (4, 1)),
    (3, 7, 5, 17, 1, 2, 0, (1, 1)),
    (2, 6, 10, 33, 3, 1, 1, (2, None)),
    (1, 3, 130, 40, 5, 0, 1, (1, None)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case):
    inputs, attributes, exact, plain = make_case(*case)
    channels = case[3]
    outputs = {"dx": (case[1], case[2], channels)}
    check_op("norm_backward", inputs, outputs, exact, plain, attributes, slack=2e-6)


def random_case(rng):
    batch, factor = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    height, width = (int(n) * factor for n in rng.integers(1, 12, size=2))
    groups = int(rng.integers(1, 6))
    channels = groups * int(rng.integers(1, 9))
    factors = factor, (1, factor, None)[int(rng.integers(3))]
    mode, activation = int(rng.integers(3)), int(rng.integers(2))
    case = batch, height, width, channels, groups, mode, activation, factors
    inputs, attributes, exact, plain = make_case(*case)
    return OpCase(inputs, {"dx": (height, width, channels)}, exact, plain, attributes)


def test_random_shapes():
    # A group of few values makes rstd, and every error, large.
    check_shapes("norm_backward", random_case, seed=SEED, slack=1e-5)


def test_a_mean_far_from_zero_does_not_cancel():
    """|mean| = 1000 standard deviations: the affine map itself has lost three digits by then."""
    case = make_case(1, 16, 16, 64, 8, 0, 0, (1, None), shift=2000.0)
    inputs, attributes, exact, plain = case
    check_op("norm_backward", inputs, {"dx": (16, 16, 64)}, exact, plain, attributes, slack=1e-4)


def average_case(rng, shape=None, small=None, offset=None, with_add=None):
    if shape is None:
        height, width, tall, wide, channels = (int(n) for n in rng.integers(1, (5, 5, 4, 4, 40)))
        shape, offset = (height * tall, width * wide, channels), int(rng.integers(0, 20))
        small = height, width, offset + channels + int(rng.integers(0, 5))
        with_add = bool(rng.integers(2))
    inputs = {"grad": random_array(rng, 3, *small)}
    factor = shape[0] // small[0], shape[1] // small[1]
    exact = inputs["grad"][..., offset : offset + shape[2]].astype(np.float64)
    exact = exact.repeat(factor[0], 1).repeat(factor[1], 2) / (factor[0] * factor[1])
    if with_add:
        inputs["add"] = random_array(rng, 3, *shape)
        exact = exact + inputs["add"]
    return OpCase(inputs, {"y": shape}, {"y": exact}, None, {"offset": offset})


@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize(
    "shape, small, offset", [((8, 8, 96), (1, 1, 200), 40), ((6, 10, 5), (3, 5, 5), 0)]
)
def test_average_backward(shape, small, offset, with_add):
    case = average_case(np.random.default_rng(SEED), shape, small, offset, with_add)
    check_cases("average_backward", [case])


def test_average_backward_random_shapes():
    check_shapes("average_backward", average_case, seed=SEED)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"groups": 3}, "groups=3 does not divide the 8 channels"),
        ({"activation": 2}, "activation=2"),
        ({"mode": 2}, "mode=2 needs the input modulation"),
        ({"eps": 0}, "eps=0"),
    ],
)
def test_bad_attributes(change, message):
    inputs, attributes, _, _ = make_case(1, 4, 4, 8, 2, 0, 1, (1, None))
    with pytest.raises(ValueError, match=message):
        C.run_engine_op("norm_backward", inputs, {"dx": (4, 4, 8)}, {**attributes, **change})


def test_a_gradient_that_does_not_tile_the_image():
    inputs, attributes, _, _ = make_case(1, 4, 4, 8, 2, 0, 1, (1, None))
    inputs["grad"] = inputs["grad"][:, :3]
    with pytest.raises(ValueError, match="grad is 3x4x8, which does not tile 4x4x8"):
        C.run_engine_op("norm_backward", inputs, {"dx": (4, 4, 8)}, attributes)
