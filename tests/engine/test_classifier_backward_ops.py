"""attention_backward and the small ops of a classifier's gradient against float64 autograd."""

import numpy as np
import pytest
import torch
from op_checks import C, OpCase, check_cases, check_op, check_shapes, random_array, run

from adm_rt.ops import reference

SEED = 417
ORDERS = ("legacy", "new")


def attention_case(batch, tokens, queries, heads, head_dim, order, scale=1.0):
    """(inputs, outputs, attributes, exact, plain)."""
    rng = np.random.default_rng([SEED, tokens, heads, head_dim])
    channels = heads * head_dim
    attributes = {"heads": heads, "order": ORDERS.index(order)}
    qkv = random_array(rng, batch, 1, tokens, 3 * channels, scale=scale)
    p_shape = (heads, tokens, 16 * (queries // 16 + 1))
    kept = {"y": (1, queries, channels), "p": p_shape}
    inputs = {
        "qkv": qkv,
        "grad": random_array(rng, batch, 1, queries, channels),
        "p": run("attention", {"qkv": qkv}, kept, attributes)["p"],
    }
    results = []
    for dtype in (torch.float64, torch.float32):
        qkv = torch.from_numpy(inputs["qkv"][:, 0]).to(dtype).mT.requires_grad_(True)
        grad = torch.from_numpy(inputs["grad"][:, 0]).to(dtype).mT
        out = reference.qkv_attention(qkv, heads, order, queries)
        (dqkv,) = torch.autograd.grad(out, qkv, grad)
        results.append({"dqkv": dqkv.mT.numpy()})
    return inputs, {"dqkv": (1, tokens, 3 * channels)}, attributes, *results


ATTENTION = [
    # batch, tokens, queries, heads, head_dim
    (1, 1024, 1024, 1, 64),
    (2, 256, 256, 3, 64),
    (3, 64, 64, 2, 64),
    (2, 65, 1, 4, 64),
    (2, 400, 400, 1, 32),
    (1, 1, 1, 1, 1),
    (2, 47, 13, 3, 7),
    (2, 97, 97, 2, 20),
    (1, 770, 769, 1, 5),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_backward(case, order):
    inputs, outputs, attributes, exact, plain = attention_case(*case, order)
    check_op("attention_backward", inputs, outputs, exact, plain, attributes, slack=2e-6)


def random_attention(rng):
    tokens = int(rng.integers(1, 200 if rng.integers(25) == 0 else 50))
    case = (
        int(rng.integers(1, 4)),
        tokens,
        int(rng.integers(1, tokens + 1)),
        int(rng.integers(1, 4)),
        int(rng.integers(1, 72 if rng.integers(25) == 0 else 36)),
    )
    inputs, outputs, attributes, exact, plain = attention_case(*case, ORDERS[int(rng.integers(2))])
    return OpCase(inputs, outputs, exact, plain, attributes)


def test_attention_backward_random_shapes():
    check_shapes("attention_backward", random_attention, seed=SEED, slack=2e-6)


def test_saturated_attention():
    """Logits of hundreds: one probability is 1, the others underflow, nothing is NaN."""
    case = attention_case(2, 70, 70, 2, 16, "legacy", scale=12.0)
    inputs, outputs, attributes, exact, plain = case
    check_op("attention_backward", inputs, outputs, exact, plain, attributes, slack=1e-5)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"heads": 3}, "3 heads do not divide"),
        ({"heads": 2, "order": 2}, "order=2"),
        ({"heads": 4}, "p is 2x4x16, not 4x4xR"),
    ],
)
def test_attention_backward_bad_arguments(attributes, message):
    inputs, outputs, _, _, _ = attention_case(1, 4, 4, 2, 4, "new")
    with pytest.raises(ValueError, match=message):
        C.run_engine_op("attention_backward", inputs, outputs, attributes)


def log_softmax_case(rng, classes=None, scale=None):
    classes = classes or int(rng.integers(1, 600))
    scale = scale or float(rng.choice([1.0, 40.0]))
    count = int(rng.integers(1, 5))
    logits = random_array(rng, count, 1, 1, classes, scale=scale, shift=5.0)
    index = rng.integers(0, classes, size=count)
    wide = torch.from_numpy(logits[:, 0, 0]).double().requires_grad_(True)
    chosen = torch.log_softmax(wide, -1)[torch.arange(count), torch.from_numpy(index)].sum()
    exact = {"y": torch.autograd.grad(chosen, wide)[0].numpy()}
    inputs = {"logits": logits, "index": index.astype(np.float32).reshape(count, 1, 1, 1)}
    return OpCase(inputs, {"y": (1, 1, classes)}, exact)


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_log_softmax_gradient(classes, scale):
    case = log_softmax_case(np.random.default_rng(SEED), classes, scale)
    check_cases("log_softmax_gradient", [case], slack=3e-7)


def test_log_softmax_gradient_random_shapes():
    check_shapes("log_softmax_gradient", log_softmax_case, seed=SEED, slack=3e-7)


@pytest.mark.parametrize("index", [-1.0, 5.0, 1.5, np.nan])
def test_log_softmax_gradient_of_no_class(index):
    inputs = {
        "logits": np.zeros((1, 1, 1, 5), np.float32),
        "index": np.full((1, 1, 1, 1), index, np.float32),
    }
    with pytest.raises(ValueError, match=r"index=.* is not a whole number in \[0, 5\)"):
        C.run_engine_op("log_softmax_gradient", inputs, {"y": (1, 1, 5)})


def relu_case(rng, shape=None):
    shape = shape or tuple(int(rng.integers(1, high)) for high in (4, 6, 6, 300))
    x, grad = random_array(rng, *shape), random_array(rng, *shape)
    x[:, :, :, ::7] = 0.0
    return OpCase({"x": x, "grad": grad}, {"y": shape[1:]}, {"y": np.where(x > 0, grad, 0)})


def test_relu_backward():
    check_cases("relu_backward", [relu_case(np.random.default_rng(SEED), (3, 1, 1, 2048))], slack=0)


def test_relu_backward_random_shapes():
    check_shapes("relu_backward", relu_case, seed=SEED, slack=0)


def tokens_case(rng, shape=None):
    height, width, channels = shape or (int(rng.integers(1, high)) for high in (8, 8, 90))
    grad = random_array(rng, 3, 1, height * width + 1, channels)
    exact = grad[:, :, 1:].astype(np.float64) + grad[:, :, :1].astype(np.float64) / (height * width)
    return OpCase({"grad": grad}, {"y": (height, width, channels)}, {"y": exact})


@pytest.mark.parametrize("shape", [(8, 8, 512), (3, 5, 7), (1, 1, 1)])
def test_attention_pool_tokens_backward(shape):
    case = tokens_case(np.random.default_rng(SEED), shape)
    check_cases("attention_pool_tokens_backward", [case], slack=3e-7)


def test_attention_pool_tokens_backward_random_shapes():
    check_shapes("attention_pool_tokens_backward", tokens_case, seed=SEED, slack=3e-7)


def zero_insert_case(rng):
    batch, height, width, channels = (int(rng.integers(1, high)) for high in (4, 8, 8, 60))
    x = random_array(rng, batch, height, width, channels)
    exact = np.zeros((batch, 2 * height, 2 * width, channels))
    exact[:, ::2, ::2] = x
    return OpCase({"x": x}, {"y": exact.shape[1:]}, {"y": exact})


def test_zero_insert_random_shapes():
    check_shapes("zero_insert", zero_insert_case, seed=SEED, slack=0)


@pytest.mark.parametrize("height, width, channels", [(16, 16, 96), (3, 5, 7), (1, 1, 1)])
def test_zero_insert_and_a_rotated_convolution_is_the_gradient_of_stride_2(height, width, channels):
    rng = np.random.default_rng(SEED)
    grad = random_array(rng, 2, height, width, channels)
    made = C.run_engine_op("zero_insert", {"x": grad}, {"y": (2 * height, 2 * width, channels)})
    exact = np.zeros((2, 2 * height, 2 * width, channels))
    exact[:, ::2, ::2] = grad
    check_op("zero_insert", {"x": grad}, {"y": exact.shape[1:]}, {"y": exact}, slack=0)
    weight = torch.from_numpy(random_array(rng, channels, 4, 3, 3)).double()
    x = torch.zeros(2, 4, 2 * height, 2 * width, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, stride=2, padding=1)
    wide = torch.from_numpy(grad).double().permute(0, 3, 1, 2)
    (expected,) = torch.autograd.grad(y, x, wide)
    inserted = torch.from_numpy(made["y"]).double().permute(0, 3, 1, 2)
    ours = torch.nn.functional.conv2d(inserted, weight.flip(2, 3).transpose(0, 1), padding=1)
    torch.testing.assert_close(ours, expected)
