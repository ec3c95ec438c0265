"""linear of the native engine: 1x1 convolutions with what is fused into them."""

import numpy as np
import pytest
from op_checks import C, OpCase, check_op, check_shapes, random_array, run

SEED = 611
ACTIVATIONS = {0: lambda x: x, 1: lambda x: x / (1 + np.exp(-x)), 2: lambda x: np.maximum(x, 0)}
# (batch, H, W, C1, C2, Co): those of the models, cut down in pixels, and the edges of all tiles.
SHAPES = [
    (2, 8, 8, 576, 0, 1728),
    (1, 16, 16, 384, 192, 384),
    (3, 4, 4, 768, 768, 768),
    (2, 1, 1, 128, 0, 512),
    (5, 1, 1, 768, 0, 1000),
    (1, 32, 32, 192, 192, 64),
    (1, 37, 41, 256, 0, 33),
]
SHAPES += [
    (2, 1, n, k, 0, co)
    for n, k, co in [(1, 1, 1), (2, 3, 5), (11, 255, 31), (12, 256, 32), (13, 257, 33)]
]
SHAPES += [
    (1, 7, 13, 17, 2, 65),
    (2, 5, 5, 511, 2, 15),
    (1, 1, 97, 64, 0, 17),
    (1, 29, 31, 300, 1, 16),
]


def make_case(batch, h, w, c1, c2, co, *, affine, bias, residual, activation, scale, stats=False):
    rng = np.random.default_rng(SEED + h * w * 7 + c1 + 3 * co)
    k = c1 + c2
    inputs = {"x": random_array(rng, batch, h, w, c1)}
    if c2:
        inputs["x2"] = random_array(rng, batch, h, w, c2)
    weights = {"weight": random_array(rng, co, k, scale=k**-0.5)}
    if affine:
        inputs["affine"] = random_array(rng, batch, 1, 2, k)
    if bias:
        weights["bias"] = random_array(rng, co)
    if residual:
        inputs["residual"] = random_array(rng, batch, h, w, co)
    outputs = {"y": (h, w, co)}
    if stats:
        outputs["stats"] = (1, 2, co)
    return inputs, outputs, {"activation": activation, "output_scale": scale}, weights


def reference(inputs, attributes, weights, dtype):
    x = np.concatenate([inputs[key] for key in ("x", "x2") if key in inputs], axis=-1).astype(dtype)
    if "affine" in inputs:
        a, b = np.split(inputs["affine"].astype(dtype), 2, axis=2)
        x = a * x + b
    x = ACTIVATIONS[attributes["activation"]](x)
    y = x @ weights["weight"].reshape(-1, x.shape[-1]).astype(dtype).T
    if "bias" in weights:
        y = y + weights["bias"].astype(dtype)
    if "residual" in inputs:
        y = y + inputs["residual"].astype(dtype)
    y = y * dtype(attributes["output_scale"])
    pixels = y.reshape(y.shape[0], -1, y.shape[-1])
    stats = np.stack([pixels.mean(axis=1), pixels.var(axis=1)], axis=1)
    return {"y": y, "stats": stats}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_everything_fused(shape):
    inputs, outputs, attributes, weights = make_case(
        *shape, affine=True, bias=True, residual=True, activation=1, scale=0.7, stats=True
    )
    exact = reference(inputs, attributes, weights, np.float64)
    plain = reference(inputs, attributes, weights, np.float32)
    check_op("linear", inputs, outputs, exact, plain, attributes, weights)


@pytest.mark.parametrize("shape", SHAPES[:10], ids=lambda s: "x".join(map(str, s)))
def test_plain(shape):
    inputs, outputs, attributes, weights = make_case(
        *shape, affine=False, bias=False, residual=False, activation=0, scale=1.0
    )
    exact = reference(inputs, attributes, weights, np.float64)
    plain = reference(inputs, attributes, weights, np.float32)
    check_op("linear", inputs, outputs, exact, plain, attributes, weights, threads=(1, 3))


@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_option(activation, affine, bias, residual):
    inputs, outputs, attributes, weights = make_case(
        2,
        3,
        5,
        24,
        9,
        37,
        affine=affine,
        bias=bias,
        residual=residual,
        activation=activation,
        scale=1.0,
        stats=residual,
    )
    exact = reference(inputs, attributes, weights, np.float64)
    plain = reference(inputs, attributes, weights, np.float32)
    check_op(
        "linear", inputs, outputs, exact, plain, attributes, weights, slack=2e-6, threads=(1, 2)
    )


def random_case(rng):
    batch, h, w = (int(rng.integers(1, high)) for high in (4, 9, 9))
    c1, c2, co = (int(rng.integers(low, high)) for low, high in ((1, 90), (0, 60), (1, 100)))
    inputs, outputs, attributes, weights = make_case(
        batch, h, w, c1, c2, co, affine=bool(rng.integers(2)), bias=bool(rng.integers(2)),
        residual=bool(rng.integers(2)), activation=int(rng.integers(3)), scale=1.0,
        stats=bool(rng.integers(2)),
    )  # fmt: skip
    exact = reference(inputs, attributes, weights, np.float64)
    plain = reference(inputs, attributes, weights, np.float32)
    return OpCase(inputs, outputs, exact, plain, attributes, weights)


def test_random_shapes():
    check_shapes("linear", random_case, seed=SEED, slack=2e-6)


def test_statistics_survive_a_large_mean():
    rng = np.random.default_rng(SEED)
    inputs = {"x": random_array(rng, 1, 32, 32, 40)}
    weights = {"weight": random_array(rng, 40, 40, scale=0.1), "bias": random_array(rng, 40) + 1000}
    y = run("linear", inputs, {"y": (32, 32, 40), "stats": (1, 2, 40)}, {}, weights)
    pixels = y["y"].astype(np.float64).reshape(-1, 40)
    np.testing.assert_allclose(y["stats"][0, 0, 0], pixels.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(y["stats"][0, 0, 1], pixels.var(axis=0), rtol=3e-6)


def test_weights_of_a_convolution_and_another_grid():
    rng = np.random.default_rng(SEED)
    inputs = {"x": random_array(rng, 2, 4, 6, 8)}
    weight = random_array(rng, 24, 8, 1, 1)
    y = run("linear", inputs, {"y": (1, 24, 24)}, {}, {"weight": weight})["y"]
    expected = inputs["x"].reshape(2, 1, 24, 8) @ weight.reshape(24, 8).T
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"outputs": {"y": (2, 2, 5)}}, "as many pixels"),
        ({"weights": {"weight": np.zeros((5, 3), np.float32)}}, r"shape \[5, 4\]"),
        ({"attributes": {"activation": 3}}, "activation=3"),
        ({"outputs": {"y": (2, 3, 5), "stats": (1, 1, 5)}}, "stats is 1x1x5"),
        ({"attributes": {"resample": 1}}, "takes no attribute resample"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "inputs": {"x": np.zeros((1, 2, 3, 4), np.float32)},
        "outputs": {"y": (2, 3, 5)},
        "weights": {"weight": np.zeros((5, 4), np.float32)},
        **change,
    }
    with pytest.raises(ValueError, match=message):
        C.run_engine_op("linear", **arguments)
