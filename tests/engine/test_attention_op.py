"""attention of the native engine against torch's bmm, softmax, bmm in float64."""

import numpy as np
import pytest
import torch
from op_checks import C, OpCase, check_op, check_shapes, random_array, run, same_bits

SEED = 613

# (T, heads, d): every attention of the released models with fewer heads, then tile edges.
PRESET_SHAPES = [
    (1024, 1, 64),
    (256, 3, 64),
    (64, 4, 64),
    (256, 1, 192),
    (64, 2, 96),
    (256, 2, 128),
    (64, 1, 256),
    (64, 1, 512),
]
ODD_SHAPES = [(1, 2, 64), (2, 1, 8), (7, 3, 8), (31, 2, 32), (33, 1, 32), (47, 1, 64), (49, 2, 64)]
ODD_SHAPES += [(65, 2, 64), (97, 2, 40), (100, 1, 96), (257, 1, 24), (1023, 1, 16), (1025, 1, 16)]


def make_qkv(batch, length, heads, d, size=1.0):
    rng = np.random.default_rng(SEED + length + 31 * heads + 101 * d)
    return random_array(rng, batch, 1, length, 3 * heads * d, scale=size)


def probability_row(queries):
    return 16 * (queries // 16 + 1)


def reference(qkv, heads, order, queries, dtype):
    """As the released networks compute it: q and k are both scaled by d ** -0.25."""
    batch, _, length, channels = qkv.shape
    d = channels // (3 * heads)
    x = torch.from_numpy(qkv[:, 0]).to(dtype)
    if order == 0:
        x = x.reshape(batch, length, heads, 3, d).permute(3, 0, 2, 1, 4)
    else:
        x = x.reshape(batch, length, 3, heads, d).permute(2, 0, 3, 1, 4)
    q, k, v = x
    scale = d**-0.25
    weights = torch.softmax((q[:, :, :queries] * scale) @ (k * scale).transpose(-1, -2), dim=-1)
    p = np.zeros((batch, heads, length, probability_row(queries)), np.float64)
    p[..., :queries] = weights.transpose(-1, -2).numpy()
    return {"y": (weights @ v).transpose(1, 2).reshape(batch, queries, heads * d).numpy(), "p": p}


def check(qkv, heads, order=0, queries=None, **options):
    length, channels = qkv.shape[2], qkv.shape[3] // 3
    queries = queries or length
    exact = reference(qkv, heads, order, queries, torch.float64)
    plain = reference(qkv, heads, order, queries, torch.float32)
    attributes = {"heads": heads, "order": order}
    outputs = {"y": (1, queries, channels)}
    check_op("attention", {"qkv": qkv}, outputs, exact, plain, attributes, **options)
    outputs["p"] = (heads, length, probability_row(queries))
    check_op("attention", {"qkv": qkv}, outputs, exact, plain, attributes, **options)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("shape", PRESET_SHAPES + ODD_SHAPES, ids=str)
def test_forward(shape, order):
    length, heads, d = shape
    check(make_qkv(2 if length < 300 else 1, *shape), heads, order, threads=(1, 2, 3, 7))


@pytest.mark.parametrize("length, d", [(2048, 8), (2500, 16), (4096, 8)])
def test_several_tiles_of_keys(length, d):
    check(make_qkv(1, length, 1, d, size=2.0), 1, isas=C.available_cpu_isas()[1:], threads=(1, 3))


def test_a_late_maximum():
    """The first tile of keys has the small logits: what was summed up is scaled down to nothing."""
    qkv = make_qkv(1, 1200, 1, 8)
    qkv[0, 0, 1100, 8:16] = 60 * np.sign(qkv[0, 0, 5, :8])
    check(qkv, 1, queries=30)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("queries", [1, 2, 17, 48, 49, 64])
def test_first_queries(queries, order):
    check(make_qkv(2, 65, 3, 64), 3, order, queries)


@pytest.mark.parametrize("d", [8, 24, 64, 104, 512])
@pytest.mark.parametrize("length", [1, 2, 17, 50, 65, 1025])
def test_single_query(length, d):
    check(make_qkv(2, length, 2, d), 2, 1, 1, threads=(1, 3))


def random_case(rng):
    # Mostly short: a block of queries has 48, and the cost grows with the square.
    length, heads = (
        int(rng.integers(1, 150 if rng.integers(8) == 0 else 40)),
        int(rng.integers(1, 4)),
    )
    d, order = 8 * int(rng.integers(1, 14)), int(rng.integers(2))
    queries = int(rng.integers(1, length + 1))
    qkv = make_qkv(int(rng.integers(1, 3)), length, heads, d)
    exact = reference(qkv, heads, order, queries, torch.float64)
    plain = reference(qkv, heads, order, queries, torch.float32)
    outputs = {"y": (1, queries, heads * d)}
    if rng.integers(2):
        outputs["p"] = (heads, length, probability_row(queries))
    return OpCase({"qkv": qkv}, outputs, exact, plain, {"heads": heads, "order": order})


def test_random_shapes():
    check_shapes("attention", random_case, seed=SEED)


def test_a_query_does_not_depend_on_the_others():
    """The same rows of q, whatever block of queries they are in."""
    qkv = make_qkv(1, 200, 1, 64)
    attributes = {"heads": 1, "order": 0}
    whole = run("attention", {"qkv": qkv}, {"y": (1, 200, 64)}, attributes)
    few = run("attention", {"qkv": qkv}, {"y": (1, 61, 64)}, attributes)
    assert same_bits(few, {"y": np.ascontiguousarray(whole["y"][:, :, :61])})


def test_the_result_is_the_same_where_the_probabilities_are_kept():
    qkv = make_qkv(1, 600, 2, 32)
    y = run("attention", {"qkv": qkv}, {"y": (1, 600, 64)}, {"heads": 2})
    outputs = {"y": (1, 600, 64), "p": (2, 600, probability_row(600))}
    kept = run("attention", {"qkv": qkv}, outputs, {"heads": 2})
    assert same_bits(y, {"y": kept["y"]})


def test_large_logits():
    check(make_qkv(1, 129, 1, 64, size=12.0), 1)


def test_nan_stays_nan():
    qkv = make_qkv(1, 70, 1, 64)
    qkv[0, 0, 3, 0] = np.nan
    y = run("attention", {"qkv": qkv}, {"y": (1, 70, 64)}, {"heads": 1})["y"]
    assert np.isnan(y[0, 0, 3]).all() and np.isfinite(np.delete(y[0, 0], 3, axis=0)).all()


@pytest.mark.parametrize(
    "attributes, outputs, message",
    [
        ({"heads": 5}, (1, 9, 16), "5 heads do not divide the 16 channels"),
        ({"heads": 2, "order": 2}, (1, 9, 16), "order=2"),
        ({"heads": 2}, (1, 10, 16), "10 positions"),
        ({"heads": 2}, (1, 9, 8), "not 3 [*] 8"),
    ],
)
def test_bad_arguments(attributes, outputs, message):
    with pytest.raises(ValueError, match=message):
        run("attention", {"qkv": np.zeros((1, 1, 9, 48), np.float32)}, {"y": outputs}, attributes)


@pytest.mark.parametrize("shape", [(2, 9, 8), (2, 9, 20), (3, 9, 16), (2, 8, 16)])
def test_bad_shapes_of_the_probabilities(shape):
    qkv = np.zeros((1, 1, 9, 48), np.float32)
    with pytest.raises(ValueError, match="p is .*, not 2x9xR, R a multiple of 16 and at least 9"):
        run("attention", {"qkv": qkv}, {"y": (1, 9, 16), "p": shape}, {"heads": 2})
