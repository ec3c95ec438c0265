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


def check(*shape, slack=2e-6, isas=None, **fused):
    """F(4x4) on few channels errs more than a direct sum of few terms: hence the slack."""
    inputs, outputs, attributes, weights = make_case(*shape, **fused)
    exact = reference(inputs, attributes, weights)
    plain = reference(inputs, attributes, weights, torch.float32)
    check_op("conv3x3", inputs, outputs, exact, plain, attributes, weights, slack=slack, isas=isas)


EVERYTHING = {"affine": True, "silu": True, "residual": NONE, "scale": 0.7071, "stats": True}
# Edges of tiles, of strips of tiles (16 of 2, 8 of 4 outputs) and of blocks of tiles, and primes.
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 19, 31, 32, 33, 37]


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    """F(2x2) for few channels and up to 8x8, F(4x4) above."""
    check(2, size, size, 6, 0, 5, **EVERYTHING)
    check(1, size, 2 * size + 1, 17, 19, 18, bias=False, stats=True)
    check(1, 3 * size, size, 36, 0, 32, affine=True)
    check(3, size, 1, 33, 0, 17, **EVERYTHING)


@pytest.mark.parametrize("h, w", [(7, 7), (8, 8), (8, 9), (7, 10), (4, 15), (12, 5), (9, 8)])
def test_sizes_around_8x8(h, w):
    """F(4x2), which more than 128 channels get."""
    check(2, h, w, 131, 0, 17, **EVERYTHING)
    check(1, h, w, 100, 29, 33, stats=True)


@pytest.mark.parametrize("h, w", [(1, 1), (1, 2), (3, 2), (5, 7), (8, 8), (17, 16), (6, 37)])
def test_sizes_of_up_sampled_images(h, w):
    """Of x: y has 4 times the pixels."""
    check(2, 2 * h, 2 * w, 6, 0, 5, resample=UP, **{**EVERYTHING, "residual": UP})
    check(1, 2 * h, 2 * w, 17, 19, 33, resample=UP, stats=True)


@pytest.mark.parametrize("c1", [1, 2, 3, 6, 15, 16, 17, 31, 32, 33, 36, 64, 96, 100])
def test_channels(c1):
    for co in (1, 2, 3, 6, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65):
        check(2 if co < 4 else 1, 7, 5, c1, 0, co)
    for co in (16, 17, 32, 36, 50):
        check(1, 13, 14, c1, 0, co, stats=True)


@pytest.mark.parametrize(
    "c1, c2", [(1, 1), (3, 6), (16, 16), (16, 1), (17, 16), (36, 100), (64, 31)]
)
def test_two_sources(c1, c2):
    """Skip concatenation; chunks of channels begin anywhere in the second source."""
    for co in (5, 17, 40):
        check(2, 13, 17, c1, c2, co, affine=True, silu=True, stats=True)
        check(2, 6, 5, c1, c2, co)


@pytest.mark.parametrize("resample", [NONE, POOL, UP])
@pytest.mark.parametrize("residual", [None, NONE, POOL, UP])
@pytest.mark.parametrize("h, w, c", [(6, 4, 5), (14, 18, 34)])
def test_fusions(h, w, c, resample, residual):
    for number in range(16) if c < 16 else (0, 3, 6, 9, 12, 15):
        affine, silu, bias, stats = ((number >> bit) & 1 == 1 for bit in range(4))
        check(
            1 + number % 2,
            h,
            w,
            c,
            3 * (number % 3),
            c + 1,
            affine=affine,
            silu=silu,
            bias=bias,
            stats=stats,
            residual=residual,
            resample=resample,
            scale=(1.0, 0.5, -1.25)[number % 3],
        )


def test_pool_of_an_odd_size_drops_the_last_row():
    inputs, outputs, attributes, weights = make_case(1, 6, 5, 4, 0, 7, resample=POOL)
    inputs["x"] = random_array(np.random.default_rng(SEED), 1, 13, 11, 4)
    exact = reference(inputs, attributes, weights)
    check_op("conv3x3", inputs, outputs, exact, exact, attributes, weights, slack=4e-6)


# (size, C1, C2, Co, resample) of the released models, each once per kind, channels divided by 8:
# 64x64 (192 wide, x1 2 3 4), 128x128, 256x256 and 512x512 (256 wide), the classifiers (128 wide).
ADM_LAYERS = [
    (64, 24, 0, 24, NONE),
    (32, 24, 0, 48, POOL),
    (32, 48, 0, 48, NONE),
    (16, 48, 0, 72, NONE),
    (8, 72, 0, 96, NONE),
    (8, 96, 96, 96, NONE),
    (16, 96, 72, 72, NONE),
    (16, 96, 0, 96, UP),
    (32, 72, 48, 48, NONE),
    (32, 48, 48, 48, NONE),
    (64, 48, 48, 24, NONE),
    (64, 48, 24, 24, NONE),
    (32, 64, 0, 64, NONE),
    (16, 128, 64, 64, NONE),
    (16, 128, 128, 128, NONE),
    (8, 128, 0, 128, POOL),
    (32, 16, 0, 32, NONE),
    (64, 16, 0, 16, POOL),
]


@pytest.mark.parametrize("size, c1, c2, co, resample", ADM_LAYERS)
def test_layers_of_the_models(size, c1, c2, co, resample):
    check(1, size, size, c1, c2, co, **{**EVERYTHING, "residual": resample, "resample": resample})


def root_mean_square(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


# At full width, on the instruction sets that are used: (H = W, Ci, Co, options, allowed ratio).
@pytest.mark.parametrize(
    "size, ci, co, options, allowed",
    [
        (64, 192, 64, {}, 2),
        (32, 384, 32, {}, 2),
        (16, 1536, 32, {}, 2),
        (8, 1536, 48, {}, 1),
        (32, 64, 64, {}, 2.5),
        (32, 384, 32, {"resample": UP}, 1),
        (64, 96, 32, {"fast": True}, 8),
    ],
)
def test_rounding_error_against_torch(size, ci, co, options, allowed):
    """Root mean square error: at most twice that of torch's float32 (F(6x6) is asked for)."""
    inputs, outputs, attributes, weights = make_case(1, size, size, ci, 0, co, **options)
    exact = reference(inputs, attributes, weights)["y"]
    plain = reference(inputs, attributes, weights, torch.float32)["y"]
    before = C.cpu_isa()
    try:
        for isa in [isa for isa in C.available_cpu_isas() if isa != "portable"]:
            C.set_cpu_isa(isa)
            y = run("conv3x3", inputs, outputs, attributes, weights)["y"]
            ratio = root_mean_square(y - exact) / root_mean_square(plain - exact)
            assert ratio < allowed, f"{isa}: {ratio:.2f} times torch's error"
    finally:
        C.set_cpu_isa(before)


@pytest.mark.parametrize("h, w", [(64, 64), (65, 71), (67, 66)])
def test_fast(h, w):
    """F(6x6), where it is allowed."""
    check(1, h, w, 33, 3, 17, fast=True, slack=1e-4, **EVERYTHING)


def test_stats_of_channels_far_from_zero():
    inputs, outputs, attributes, weights = make_case(1, 19, 23, 40, 0, 20, stats=True)
    weights["bias"] += np.float32(3000)
    exact = reference(inputs, attributes, weights)
    result = run("conv3x3", inputs, outputs, attributes, weights)["stats"].reshape(2, 20)
    np.testing.assert_allclose(result[0], exact["stats"][0, 0], rtol=1e-6)
    # y itself has a step of 2^-12 there: 2e-4 of its deviation.
    np.testing.assert_allclose(result[1], exact["stats"][0, 1], rtol=2e-3)


def test_nan_and_infinity_stay_in_their_image():
    inputs, outputs, attributes, weights = make_case(3, 9, 20, 34, 0, 17, affine=True, silu=True)
    clean = run("conv3x3", inputs, outputs, attributes, weights)["y"]
    inputs["x"][1, 4, 4, 2] = np.nan
    dirty = run("conv3x3", inputs, outputs, attributes, weights)["y"]
    assert np.isnan(dirty[1, 3:6, 3:6]).all()
    assert same_bits({"y": dirty[::2]}, {"y": clean[::2]})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attributes": {"activation": 2}}, "activation=2"),
        ({"attributes": {"resample": 3}}, "resample=3"),
        ({"attributes": {"resample": 1}}, "x is 6x6x4 and y 6x6x5"),
        ({"attributes": {"colour": 1}}, "colour"),
        ({"outputs": {"y": (5, 6, 5)}}, "x is 6x6x4 and y 5x6x5"),
        ({"outputs": {"stats": (1, 2, 4)}}, "stats"),
        ({"inputs": {"x2": np.zeros((1, 6, 5, 4), np.float32)}}, "x2 6x5x4"),
        ({"inputs": {"affine": np.zeros((1, 1, 2, 5), np.float32)}}, "affine is not 1x2x4"),
        ({"inputs": {"residual": np.zeros((1, 6, 6, 4), np.float32)}}, "residual is 6x6x4"),
        ({"weights": {"weight": np.zeros((5, 4, 3, 1), np.float32)}}, r"\[5, 4, 3, 3\]"),
        ({"weights": {"bias": np.zeros(4, np.float32)}}, r"bias must have the shape \[5\]"),
    ],
)
def test_bad_arguments(change, message):
    parts = dict(zip(("inputs", "outputs", "attributes", "weights"), make_case(1, 6, 6, 4, 0, 5)))
    for key, value in change.items():
        parts[key].update(value)
    with pytest.raises(ValueError, match=message):
        run("conv3x3", *parts.values())
