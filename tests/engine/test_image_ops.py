"""The native engine's ops around the blocks: layout, embeddings, resampling, pooling, im2col."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_checks import C, OpCase, check_cases, check_op, check_shapes, random_array, run

from adm_rt.models.blocks import timestep_embedding, timestep_frequencies

SEED = 614
IMAGES = [(1, 1, 1, 1), (2, 1, 1, 8), (3, 5, 7, 3), (2, 16, 16, 6), (1, 64, 64, 3), (2, 3, 2, 40)]


def rng_for(*key):
    return np.random.default_rng([SEED, *key])


def planes(x):
    """NHWC -> the [N, 1, 1, C * H * W] planes of the same images."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(x.shape[0], 1, 1, -1)


def nchw(x, dtype):
    return torch.from_numpy(x).to(dtype).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1).numpy()


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_layout(shape):
    x = random_array(rng_for(*shape), *shape)
    flat, (h, w, c) = planes(x), shape[1:]
    check_op("to_nhwc", {"x": flat}, {"y": (h, w, c)}, {"y": x}, slack=0)
    check_op("to_nchw", {"x": x}, {"y": (1, 1, c * h * w)}, {"y": flat}, slack=0)


def layout_case(rng):
    batch, h, w, c = (int(rng.integers(1, high)) for high in (4, 12, 12, 20))
    x = random_array(rng, batch, h, w, c)
    return OpCase({"x": x}, {"y": (1, 1, c * h * w)}, {"y": planes(x)})


def inverse_layout_case(rng):
    case = layout_case(rng)
    flat = {"x": case.exact["y"]}
    return OpCase(flat, {"y": case.inputs["x"].shape[1:]}, {"y": case.inputs["x"]})


def test_layout_random_shapes():
    check_shapes("to_nchw", layout_case, slack=0)
    check_shapes("to_nhwc", inverse_layout_case, slack=0)


@pytest.mark.parametrize("channels", [(1,), (5, 3), (192, 1, 384), (64, 64, 64, 64)], ids=str)
@pytest.mark.parametrize("pixels", [(1, 1), (3, 5), (32, 16)], ids=str)
def test_concat(channels, pixels):
    rng = rng_for(*channels, *pixels)
    inputs = {f"x{i}": random_array(rng, 2, *pixels, c) for i, c in enumerate(channels)}
    y = np.concatenate(list(inputs.values()), axis=-1)
    check_op("concat", inputs, {"y": (*pixels, sum(channels))}, {"y": y}, slack=0)


def concat_case(rng):
    batch, h, w = (int(n) for n in rng.integers(1, (4, 8, 8)))
    channels = rng.integers(1, 50, size=int(rng.integers(1, 6)))
    inputs = {f"x{i}": random_array(rng, batch, h, w, int(c)) for i, c in enumerate(channels)}
    y = np.concatenate(list(inputs.values()), axis=-1)
    return OpCase(inputs, {"y": y.shape[1:]}, {"y": y})


def test_concat_random_shapes():
    check_shapes("concat", concat_case, slack=0)


@pytest.mark.parametrize("dim", [2, 3, 32, 64, 128, 192, 256, 257, 512])
def test_timestep_embedding(dim):
    t = np.array([0, 1, 0.25, 17.5, 500, 999, 999.75], np.float32).reshape(-1, 1, 1, 1)
    half = dim // 2
    exact = t.reshape(-1, 1).astype(np.float64) * 10000.0 ** (-np.arange(half) / half)
    exact = np.concatenate([np.cos(exact), np.sin(exact), np.zeros((len(t), dim % 2))], axis=1)
    plain = timestep_embedding(torch.from_numpy(t.reshape(-1)), dim).numpy()
    outputs = {"out": (1, 1, dim)}
    check_op("timestep_embedding", {"t": t}, outputs, {"out": exact}, {"out": plain})
    # The networks were trained with angles that are rounded as torch rounds them: one unit in the
    # last place of a frequency would weigh more than a whole network's rounding.
    ours = run("timestep_embedding", {"t": t}, outputs)["out"].reshape(plain.shape)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-7)


@pytest.mark.parametrize("half", [16, 32, 64, 96, 128, 192, 256])
def test_timestep_frequencies_are_rounded_once(half):
    """torch's float32 exp is an ulp off at some of them, at other ones on other processors."""
    exponents = torch.arange(half, dtype=torch.float32) * np.float32(-np.log(10000)) / half
    exact = np.exp(exponents.double().numpy())
    assert np.array_equal(timestep_frequencies(half).numpy(), exact.astype(np.float32))


def timestep_case(rng):
    """Small timesteps, whose angles float32 rounds by little."""
    batch, dim = int(rng.integers(1, 6)), int(rng.integers(2, 400))
    t = (8 * rng.random((batch, 1))).astype(np.float32)
    angles = t.astype(np.float64) * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    exact = [np.cos(angles), np.sin(angles), np.zeros((batch, dim % 2))]
    out = {"out": np.concatenate(exact, axis=1)}
    return OpCase({"t": t[:, :, None, None]}, {"out": (1, 1, dim)}, out)


def test_timestep_embedding_random_shapes():
    check_shapes("timestep_embedding", timestep_case, slack=3e-6)


def lookup_case(rng):
    batch, rows, width = (int(n) for n in rng.integers(1, (6, 30, 80)))
    table, index = random_array(rng, rows, width), rng.integers(0, rows, batch)
    inputs = {"index": index.astype(np.float32).reshape(-1, 1, 1, 1)}
    exact = table[index].astype(np.float64)
    if rng.integers(2):
        inputs["add"] = random_array(rng, batch, 1, 1, width)
        exact = exact + inputs["add"].reshape(exact.shape)
    return OpCase(inputs, {"y": (1, 1, width)}, {"y": exact}, weights={"table": table})


def test_embedding_lookup_random_shapes():
    check_shapes("embedding_lookup", lookup_case, slack=1e-7)


@pytest.mark.parametrize("add", [False, True])
def test_embedding_lookup(add):
    rng = rng_for(add)
    table = random_array(rng, 11, 37)
    inputs = {"index": np.array([0, 10, 3, 3], np.float32).reshape(-1, 1, 1, 1)}
    exact = table[[0, 10, 3, 3]].astype(np.float64)
    if add:
        inputs["add"] = random_array(rng, 4, 1, 1, 37)
        exact = exact + inputs["add"].reshape(4, 37)
    outputs = {"y": (1, 1, 37)}
    check_op(
        "embedding_lookup", inputs, outputs, {"y": exact}, weights={"table": table}, slack=1e-7
    )


@pytest.mark.parametrize("index", [-1, 11, 0.5, np.nan, np.inf])
def test_embedding_lookup_outside_the_table(index):
    inputs = {"index": np.full((1, 1, 1, 1), index, np.float32)}
    with pytest.raises(ValueError, match=r"index=.* of image 0 is not a whole number in \[0, 11\)"):
        run("embedding_lookup", inputs, {"y": (1, 1, 4)}, {}, {"table": np.zeros((11, 4), "f4")})


@pytest.mark.parametrize(
    "shape, size",
    [
        ((1, 64, 64, 3), (256, 256)),
        ((2, 8, 8, 3), (32, 32)),
        ((2, 1, 1, 5), (4, 3)),
        ((1, 5, 7, 17), (11, 13)),
        ((1, 6, 4, 2), (6, 4)),
        ((1, 9, 9, 1), (4, 5)),
    ],
    ids=str,
)
def test_bilinear_upsample(shape, size):
    check_cases("bilinear_upsample", [bilinear_case(rng_for(*shape), shape, size)])


def bilinear_case(rng, shape=None, size=None):
    shape = shape or tuple(int(n) for n in rng.integers(1, (4, 9, 9, 20)))
    size = size or tuple(int(n) for n in rng.integers(1, 20, size=2))
    x = random_array(rng, *shape)
    exact, plain = (
        {"y": nhwc(F.interpolate(nchw(x, dtype), size, mode="bilinear"))}
        for dtype in (torch.float64, torch.float32)
    )
    return OpCase({"x": x}, {"y": (*size, shape[3])}, exact, plain)


def test_bilinear_upsample_random_shapes():
    check_shapes("bilinear_upsample", bilinear_case)


def convolution(inputs, weights, stride, dtype):
    x = torch.cat([nchw(x, dtype) for x in inputs], dim=1)
    weight, bias = (
        torch.from_numpy(weights[key]).to(dtype) if key in weights else None
        for key in ("weight", "bias")
    )
    y = nhwc(F.conv2d(x, weight, bias, stride=stride, padding=1))
    stats = np.stack([y.mean(axis=(1, 2)), y.var(axis=(1, 2))], axis=1)
    return {"y": y, "stats": stats}


def check_convolution(name, shape, channels2, out_channels, **options):
    rng = rng_for(*shape, channels2, out_channels)
    case = convolution_case(rng, name, shape, channels2, out_channels, **options)
    check_cases(name, [case], slack=2e-6)


def convolution_case(rng, name, shape, channels2, out_channels, bias=True, as_planes=False):
    stride = 2 if name == "conv3x3_stride2" else 1
    images = [random_array(rng, *shape)]
    if channels2:
        images.append(random_array(rng, *shape[:3], channels2))
    size = shape[3] + channels2
    weights = {"weight": random_array(rng, out_channels, size, 3, 3, scale=(9 * size) ** -0.5)}
    if bias:
        weights["bias"] = random_array(rng, out_channels)
    height, width = (-(-side // stride) for side in shape[1:3])
    inputs = {"x": planes(images[0]) if as_planes else images[0]}
    if channels2:
        inputs["x2"] = images[1]
    return OpCase(
        inputs,
        {"y": (height, width, out_channels), "stats": (1, 2, out_channels)},
        convolution(images, weights, stride, torch.float64),
        convolution(images, weights, stride, torch.float32),
        weights=weights,
    )


def random_stem(rng):
    *shape, channels, channels2, out = (int(n) for n in rng.integers(1, (4, 14, 14, 7, 5, 50)))
    options = {"bias": bool(rng.integers(2)), "as_planes": bool(rng.integers(2))}
    channels2 *= int(rng.integers(2))
    return convolution_case(rng, "conv_stem", (*shape, channels), channels2, out, **options)


def random_stride2(rng):
    *shape, out = (int(n) for n in rng.integers(1, (4, 14, 14, 40, 50)))
    return convolution_case(rng, "conv3x3_stride2", tuple(shape), 0, out, bool(rng.integers(2)))


def test_convolution_random_shapes():
    check_shapes("conv_stem", random_stem, slack=2e-6)
    check_shapes("conv3x3_stride2", random_stride2, slack=2e-6)


@pytest.mark.parametrize("as_planes", [False, True])
@pytest.mark.parametrize(
    "shape, channels2, out_channels",
    [
        ((2, 32, 32, 3), 0, 64),
        ((1, 64, 64, 3), 0, 192),
        ((1, 24, 24, 3), 3, 48),
        ((2, 5, 7, 1), 0, 33),
        ((3, 1, 1, 4), 0, 5),
        ((1, 1, 9, 8), 0, 16),
        ((1, 13, 1, 6), 2, 1),
    ],
    ids=str,
)
def test_conv_stem(shape, channels2, out_channels, as_planes):
    check_convolution("conv_stem", shape, channels2, out_channels, as_planes=as_planes)


@pytest.mark.parametrize(
    "shape, out_channels",
    [
        ((1, 16, 16, 64), 64),
        ((2, 8, 8, 192), 192),
        ((2, 5, 7, 9), 31),
        ((3, 1, 1, 4), 5),
        ((1, 2, 2, 3), 2),
        ((1, 33, 3, 17), 40),
    ],
    ids=str,
)
def test_conv3x3_stride2(shape, out_channels):
    check_convolution("conv3x3_stride2", shape, 0, out_channels, bias=shape[0] < 3)


POOL_SHAPES = [(2, 8, 8, 512), (1, 64, 64, 40), (3, 1, 1, 7), (2, 4, 3, 33), (1, 13, 11, 1)]


def pool_case(shape, affine, activation, rng=None):
    rng = rng or rng_for(*shape, affine, activation)
    x = random_array(rng, *shape, shift=0.5)
    inputs, z = {"x": x}, x.astype(np.float64)
    if affine:
        inputs["affine"] = random_array(rng, shape[0], 1, 2, shape[3])
        z = inputs["affine"][:, :, :1] * z + inputs["affine"][:, :, 1:].astype(np.float64)
    z = silu(z) if activation == 1 else np.maximum(z, 0) if activation == 2 else z
    return rng, inputs, z


def mean_pool_case(shape, affine, activation, rng=None):
    _, inputs, z = pool_case(shape, affine, activation, rng)
    exact = {"y": z.mean(axis=(1, 2))}
    return OpCase(inputs, {"y": (1, 1, shape[3])}, exact, attributes={"activation": activation})


@pytest.mark.parametrize("affine, activation", [(False, 0), (True, 1), (False, 2)])
@pytest.mark.parametrize("shape", POOL_SHAPES, ids=str)
def test_mean_pool(shape, affine, activation):
    check_cases("mean_pool", [mean_pool_case(shape, affine, activation)])


def pool_tokens_case(shape, affine, activation, rng=None):
    rng, inputs, z = pool_case(shape, affine, activation, rng)
    tokens = shape[1] * shape[2] + 1
    positional = random_array(rng, shape[3], tokens)
    z = z.reshape(shape[0], -1, shape[3])
    exact = np.concatenate([z.mean(axis=1, keepdims=True), z], axis=1) + positional.T
    return OpCase(
        inputs,
        {"y": (1, tokens, shape[3])},
        {"y": exact},
        attributes={"activation": activation},
        weights={"positional": positional},
    )


def random_pool(make):
    def case(rng):
        shape = tuple(int(n) for n in rng.integers(1, (4, 9, 9, 70)))
        return make(shape, bool(rng.integers(2)), int(rng.integers(3)), rng)

    return case


def test_pooling_random_shapes():
    check_shapes("mean_pool", random_pool(mean_pool_case))
    check_shapes("attention_pool_tokens", random_pool(pool_tokens_case))


@pytest.mark.parametrize("affine, activation", [(False, 0), (True, 1)])
@pytest.mark.parametrize("shape", POOL_SHAPES, ids=str)
def test_attention_pool_tokens(shape, affine, activation):
    check_cases("attention_pool_tokens", [pool_tokens_case(shape, affine, activation)])


@pytest.mark.parametrize(
    "name, inputs, output, weights, message",
    [
        ("to_nhwc", {"x": (1, 1, 1, 11)}, {"y": (2, 2, 3)}, {}, "planes of a 2x2x3 image"),
        ("concat", {"x0": (1, 2, 2, 3)}, {"y": (2, 2, 4)}, {}, "y has 4 channels, its parts 3"),
        ("timestep_embedding", {"t": (1, 1, 1, 2)}, {"out": (1, 1, 8)}, {}, "t is 1x1x2"),
        ("bilinear_upsample", {"x": (1, 2, 2, 3)}, {"y": (4, 4, 2)}, {}, "changes the channels"),
        ("mean_pool", {"x": (1, 2, 2, 3)}, {"y": (1, 1, 2)}, {}, "y is 1x1x2, not 1x1x3"),
        (
            "attention_pool_tokens",
            {"x": (1, 2, 2, 3)},
            {"y": (1, 5, 3)},
            {"positional": (3, 4)},
            r"positional must have the shape \[3, 5\]",
        ),
        (
            "conv3x3_stride2",
            {"x": (1, 5, 5, 2)},
            {"y": (2, 3, 4)},
            {"weight": (4, 2, 3, 3)},
            "y is 2x3x4, x 5x5",
        ),
        (
            "conv_stem",
            {"x": (1, 1, 1, 37)},
            {"y": (3, 4, 4)},
            {"weight": (4, 3, 3, 3)},
            "no whole number of 3x4 planes",
        ),
    ],
)
def test_bad_arguments(name, inputs, output, weights, message):
    inputs, weights = (
        {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        for shapes in (inputs, weights)
    )
    with pytest.raises(ValueError, match=message):
        C.run_engine_op(name, inputs, output, {}, weights)
