"""qkv_attention against reference.py in float64: forward, gradient, every instruction set."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from adm_rt import ops
from adm_rt.ops import reference
from adm_rt.ops._library import extension, extension_available

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)

C = extension()
ISAS = C.available_cpu_isas()
SEED = 20260

# (T, H, d): every attention of the released models, with fewer heads where they are many alike.
PRESET_SHAPES = [
    (1024, 2, 64),  # 64x64_diffusion, 256x256_*, 512x512_*, lsun_*, classifiers: 64 channels a head
    (256, 3, 64),
    (64, 4, 64),
    (1024, 1, 96),  # 64_256_upsampler: 4 heads
    (256, 1, 192),
    (64, 2, 192),
    (1024, 1, 128),  # 128x128_diffusion: 4 heads
    (64, 1, 256),
]
ODD_SHAPES = [(1, 2, 64), (7, 1, 8), (63, 1, 64), (65, 2, 64), (100, 2, 96), (257, 1, 40)]
ODD_SHAPES += [(33, 2, 6), (50, 1, 2), (129, 1, 130), (20, 1, 7)]


@pytest.fixture(params=ISAS)
def isa(request):
    previous = C.cpu_isa()
    C.set_cpu_isa(request.param)
    yield request.param
    C.set_cpu_isa(previous)


@pytest.fixture
def threads():
    previous = C.num_threads()
    yield C.set_num_threads
    C.set_num_threads(previous)


def make_qkv(length, heads, d, batch=1, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(SEED + length + 31 * heads + 101 * d)
    qkv = torch.randn(batch, 3 * heads * d, length, generator=generator) * size
    return qkv.to(dtype)


def error(x, exact):
    return (x.double() - exact).abs().max().item()


def gradient(function, qkv, weight, *args):
    qkv = qkv.detach().clone().requires_grad_()
    (dqkv,) = torch.autograd.grad((function(qkv, *args) * weight.to(qkv.dtype)).sum(), qkv)
    return dqkv


def check_forward(qkv, *args, slack=1e-6):
    exact = reference.qkv_attention(qkv.double(), *args)
    plain = reference.qkv_attention(qkv, *args)
    ours = ops.qkv_attention(qkv, *args)
    assert ours.dtype == qkv.dtype and ours.shape == plain.shape
    assert error(ours, exact) <= 2 * error(plain, exact) + slack
    return ours


def check_gradient(qkv, *args, slack=2e-6):
    generator = torch.Generator().manual_seed(SEED)
    exact_out = reference.qkv_attention(qkv.double(), *args)
    weight = torch.randn(exact_out.shape, generator=generator)
    exact = gradient(reference.qkv_attention, qkv.double(), weight, *args)
    plain = gradient(reference.qkv_attention, qkv, weight, *args)
    ours = gradient(ops.qkv_attention, qkv, weight, *args)
    assert ours.dtype == qkv.dtype
    scale = exact.abs().max().item()
    assert error(ours, exact) <= 2 * error(plain, exact) + slack * scale
    return ours


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("shape", PRESET_SHAPES + ODD_SHAPES)
def test_forward(shape, order, isa):
    check_forward(make_qkv(*shape, batch=2 if shape[0] < 300 else 1), shape[1], order)


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("num_queries", [1, 2, 17, 64, 65])
def test_num_queries(num_queries, order, isa):
    qkv = make_qkv(65, 3, 64, batch=2)
    few = check_forward(qkv, 3, order, num_queries)
    everything = ops.qkv_attention(qkv, 3, order)
    torch.testing.assert_close(few, everything[..., :num_queries], rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("shape", [*PRESET_SHAPES[1:3], (300, 1, 96), *ODD_SHAPES])
def test_gradient(shape, order, isa):
    check_gradient(make_qkv(*shape, batch=2), shape[1], order)


@pytest.mark.parametrize("shape", [(1024, 1, 64), (256, 1, 192), (64, 1, 256)])
def test_gradient_of_large_shapes(shape):
    check_gradient(make_qkv(*shape), shape[1])


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("num_queries", [1, 2, 33])
def test_gradient_of_few_queries(num_queries, order, isa):
    dqkv = check_gradient(make_qkv(65, 2, 64, batch=2), 2, order, num_queries)
    dq = dqkv.reshape(2, 2, 3, 64, 65)[:, :, 0] if order == "legacy" else dqkv[:, :128]
    assert not dq[..., num_queries:].any()


@pytest.mark.parametrize("num_queries", [None, 1])
@pytest.mark.parametrize("shape", [(64, 2, 64), (65, 2, 64), (300, 1, 96)])
def test_bfloat16(shape, num_queries, isa):
    """At most one rounding of the result away from exact arithmetic on the bfloat16 inputs."""
    qkv = make_qkv(*shape, batch=2, dtype=torch.bfloat16)
    exact = reference.qkv_attention(qkv.double(), shape[1], "new", num_queries)
    ours = check_forward(qkv, shape[1], "new", num_queries)
    assert ((ours.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()
    check_gradient(qkv, shape[1], "new", num_queries)


@pytest.mark.parametrize("num_queries", [None, 1])
def test_huge_logits(num_queries, isa):
    """Logits of +-1e4 (and rows whose maximum comes late) neither overflow nor vanish."""
    qkv = make_qkv(300, 2, 64, size=40.0)
    qkv[:, :, 280:] *= 3  # raises the running maximum in the last block of keys
    ours = check_forward(qkv, 2, "legacy", num_queries, slack=1e-4)
    assert torch.isfinite(ours).all()
    shifted = make_qkv(300, 1, 64)
    shifted[:, :64] = 1.0
    shifted[:, 64:128] = -500.0  # all logits are -4000: the softmax is uniform
    expected = shifted[:, 128:].mean(2, keepdim=True)
    ours = ops.qkv_attention(shifted, 1, "legacy", num_queries)
    torch.testing.assert_close(ours, expected.expand_as(ours), rtol=0, atol=1e-5)
    assert torch.isfinite(check_gradient(qkv, 2, "legacy", num_queries, slack=1e-3)).all()


@pytest.mark.parametrize("num_queries", [None, 1])
def test_nan_is_not_hidden(num_queries, isa):
    qkv = make_qkv(130, 2, 16)
    qkv[0, 20, 5] = float("nan")  # a key of head 0
    out = ops.qkv_attention(qkv, 2, "legacy", num_queries)
    assert out[:, :16].isnan().all() and torch.isfinite(out[:, 16:]).all()


@pytest.mark.parametrize("num_queries", [None, 1, 40])
@pytest.mark.parametrize("shape", [(64, 3, 64), (257, 2, 24)])
def test_result_depends_on_neither_threads_nor_batch(shape, num_queries, threads, isa):
    qkv = make_qkv(*shape, batch=3)
    weight = torch.ones(3, shape[1] * shape[2], num_queries or shape[0]).cos()
    args = shape[1], "new", num_queries
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            (ops.qkv_attention(qkv, *args), gradient(ops.qkv_attention, qkv, weight, *args))
        )
        alone = [
            (
                ops.qkv_attention(qkv[i : i + 1], *args),
                gradient(ops.qkv_attention, qkv[i : i + 1], weight[i : i + 1], *args),
            )
            for i in range(3)
        ]
        results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
    for out, dqkv in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(dqkv, results[0][1])


def test_length_4096():
    qkv = make_qkv(4096, 1, 16)
    exact = reference.qkv_attention(qkv.double(), 1)
    assert error(ops.qkv_attention(qkv, 1), exact) <= 1e-6
    check_gradient(qkv[:, :, :2100].contiguous(), 1)


MEMORY_PROBE = """
import resource, sys
import numpy as np
from adm_rt.ops import qkv_attention
from adm_rt.ops._library import extension
qkv = np.random.default_rng(0).standard_normal((1, 24, 8192), dtype=np.float32)
qkv_attention(qkv[:, :, :64], 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = qkv_attention(qkv, 1)
stats, dqkv = np.ones((1, 1, 2, 8192), np.float32), np.empty_like(qkv)
extension().qkv_attention_backward(out.ctypes.data, qkv.ctypes.data, out.ctypes.data,
                                   stats.ctypes.data, dqkv.ctypes.data, 1, 1, 8, 8192, 8192, 0, 0)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert "torch" not in sys.modules
assert grown < 24 * 1024, f"{grown} KiB for T=8192, where T * T floats are 262144 KiB"
"""


def test_memory_is_linear_in_length_and_numpy_needs_no_torch():
    subprocess.run([sys.executable, "-c", MEMORY_PROBE], check=True, timeout=120)


def test_numpy():
    qkv = make_qkv(65, 2, 24, batch=2)
    for args in ((2,), (2, "new"), (2, "new", 1)):
        expected = ops.qkv_attention(qkv, *args).numpy()
        np.testing.assert_array_equal(ops.qkv_attention(qkv.numpy(), *args), expected)
        strided = np.ascontiguousarray(qkv.numpy().transpose(0, 2, 1)).transpose(0, 2, 1)
        np.testing.assert_array_equal(ops.qkv_attention(strided, *args), expected)
        with ops.use_reference():
            np.testing.assert_allclose(ops.qkv_attention(qkv.numpy(), *args), expected, atol=2e-6)
    assert ops.qkv_attention(np.zeros((0, 6, 5), np.float32), 1).shape == (0, 2, 5)


def test_strides():
    qkv = make_qkv(65, 2, 24, batch=2)
    strided = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(ops.qkv_attention(strided, 2), ops.qkv_attention(qkv, 2))
    leaf = strided.clone(memory_format=torch.preserve_format).requires_grad_()
    grad = torch.ones(2, 65, 48).cos().transpose(1, 2)
    ops.qkv_attention(leaf, 2).backward(grad)
    expected = gradient(reference.qkv_attention, qkv, grad, 2)
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-5)


def test_orders_are_permutations_of_each_other():
    legacy = make_qkv(70, 3, 16)
    new = legacy.reshape(1, 3, 3, 16, 70).transpose(1, 2).reshape(1, 144, 70)
    assert torch.equal(ops.qkv_attention(legacy, 3, "legacy"), ops.qkv_attention(new, 3, "new"))


def test_gradient_twice():
    qkv = make_qkv(9, 2, 4).requires_grad_()
    found = []
    for function in (ops.qkv_attention, reference.qkv_attention):
        out = function(qkv, 2, "new")
        (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), qkv)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_other_dtypes_and_use_reference_run_the_reference():
    qkv = make_qkv(40, 2, 8)
    for dtype in (torch.float64, torch.float16):
        wide = qkv.to(dtype)
        assert torch.equal(ops.qkv_attention(wide, 2), reference.qkv_attention(wide, 2))
    with ops.use_reference():
        assert torch.equal(ops.qkv_attention(qkv, 2), reference.qkv_attention(qkv, 2))
    wide = make_qkv(5, 1, 2).double().requires_grad_()
    torch.autograd.gradcheck(lambda x: ops.qkv_attention(x, 1), wide)


def test_no_graph_is_kept_without_a_gradient():
    qkv = make_qkv(20, 1, 8).requires_grad_()
    with torch.no_grad():
        assert ops.qkv_attention(qkv, 1).grad_fn is None
    assert ops.qkv_attention(qkv.detach(), 1).grad_fn is None
    assert ops.qkv_attention(qkv, 1).grad_fn is not None


def test_meta_and_empty_batch():
    meta = torch.empty(2, 144, 70, device="meta")
    assert ops.qkv_attention(meta, 3, "new", 5).shape == (2, 48, 5)
    assert ops.qkv_attention(torch.empty(0, 144, 70), 3).shape == (0, 48, 70)


@pytest.mark.parametrize("num_queries", [1, 20])
def test_opcheck(num_queries):
    ops.qkv_attention(make_qkv(4, 1, 2), 1)  # registers
    qkv = make_qkv(20, 2, 8, batch=2)
    library = torch.ops.adm_rt
    torch.library.opcheck(library.qkv_attention.default, (qkv, 2, "new", num_queries))
    args = (qkv, 2, "legacy", num_queries)
    torch.library.opcheck(library.qkv_attention_with_stats.default, args)
    out, stats = library.qkv_attention_with_stats(*args)
    args = (torch.ones_like(out), qkv, out, stats, 2, "legacy")
    torch.library.opcheck(library.qkv_attention_backward.default, args)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 12, 4, 4), 2), r"\[N, 3\*H\*d, T\]"),
        ((torch.zeros(2, 13, 4), 2), "13 channels, which num_heads=2"),
        ((torch.zeros(2, 12, 4), 0), "num_heads=0"),
        ((torch.zeros(2, 12, 4), 2, "old"), "order='old' is not one of 'legacy', 'new'"),
        ((torch.zeros(2, 12, 4), 2, "new", 0), r"num_queries=0 is not in \[1, T=4\]"),
        ((torch.zeros(2, 12, 4), 2, "new", 5), r"num_queries=5 is not in \[1, T=4\]"),
        ((torch.zeros(2, 12, 0), 2), "T must be at least 1"),
        ((np.zeros((2, 13, 4), np.float32), 2), "13 channels"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.qkv_attention(*arguments)


@pytest.mark.parametrize(
    "qkv, message",
    [
        ([[[0.0]]], "qkv is list"),
        (torch.zeros(1, 3, 4, dtype=torch.int64), "torch.int64"),
        (np.zeros((1, 3, 4)), "float64"),
    ],
)
def test_bad_types(qkv, message):
    with pytest.raises(TypeError, match=message):
        ops.qkv_attention(qkv, 1)


def test_bad_arguments_of_the_extension():
    ops.qkv_attention(make_qkv(4, 1, 2), 1)
    with pytest.raises(TypeError, match="float64"):
        torch.ops.adm_rt.qkv_attention(torch.zeros(1, 6, 4).double(), 1, "new", 4)
    with pytest.raises(ValueError, match="order=7"):
        C.qkv_attention(0, 0, 0, 1, 1, 8, 4, 4, 7, 0)
    with pytest.raises(ValueError, match="null pointer"):
        C.qkv_attention(0, 0, 0, 1, 1, 8, 4, 4, 0, 0)
    with pytest.raises(ValueError, match=r"num_queries=5 is not in \[1, length=4\]"):
        C.qkv_attention(0, 0, 0, 1, 1, 8, 4, 5, 0, 0)
