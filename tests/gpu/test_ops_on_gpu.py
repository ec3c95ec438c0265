"""The three ops on the GPU against float64: at most twice the error of the plain torch sequence in
the same precision, over the shapes of the presets and odd ones; reruns, streams and graphs."""

import contextlib

import devices
import numpy as np
import pytest
import torch

from adm_rt import ops, testing
from adm_rt.benchmarking import baselines
from adm_rt.ops import StepCoefficients, reference
from adm_rt.ops.philox import image_seeds
from adm_rt.testing import AdaGroupNormCase, AttentionCase

devices.require()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [
    *testing.ADA_GROUP_NORM_64,
    # channels per group 2, 4, 18, 36, 42, 64; sizes that are no multiple of anything
    AdaGroupNormCase(2, 64, 33, 17),
    AdaGroupNormCase(3, 128, 16, 16),
    AdaGroupNormCase(2, 576, 7, 5, silu=False),
    AdaGroupNormCase(1, 1152, 8, 8),
    AdaGroupNormCase(2, 2048, 8, 8, scale_shift=False, silu=False),
    AdaGroupNormCase(1, 256, 128, 128),
]
ATTENTIONS = [
    *testing.ATTENTION_64,
    AttentionCase(2, 4, 128, 1024),
    AttentionCase(2, 4, 192, 256),
    AttentionCase(2, 4, 256, 64, "new"),
    AttentionCase(1, 4, 96, 1024),
    AttentionCase(3, 8, 64, 65, "legacy", num_queries=1),
    AttentionCase(2, 3, 64, 77),
]


def identity(case):
    return "-".join(str(part) for part in case)


def gradients(function, tensors, upstream):
    """(result, gradients of the tensors) for the gradient `upstream` of the result."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(result, wanted, upstream.to(result.dtype))
    return result.detach(), list(found)


def compare(ours, plain, exact, names, floor):
    for name, mine, theirs, best in zip(names, ours, plain, exact, strict=True):
        assert mine.isfinite().all(), name
        testing.assert_as_good_as(mine, theirs, best, floor=floor, what=name)


FLOORS = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=identity)
def test_ada_group_norm(device, case, dtype, layout):
    torch.manual_seed(1)
    n, c = case.batch, case.channels
    x = (torch.randn(n, c, case.height, case.width, device=device) * 2 + 1).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, c, device=device)
    scale_shift = torch.randn(n, 2 * c, device=device).to(dtype) if case.scale_shift else None
    tensors = (x, weight, bias, scale_shift)
    upstream = torch.randn(x.shape, device=device).to(dtype)

    def ours(*t):
        return ops.ada_group_norm(*t, silu=case.silu)

    def plain(*t):
        return baselines.ada_group_norm(*t, silu=case.silu)

    def exact(*t):
        return reference.ada_group_norm(*t, silu=case.silu)

    wide = [None if t is None else t.double() for t in tensors]
    names = [name for name, t in zip("xwbs", tensors, strict=True) if t is not None]
    mine, my_gradients = gradients(ours, tensors, upstream)
    theirs, their_gradients = gradients(plain, tensors, upstream)
    best, best_gradients = gradients(exact, wide, upstream.double())
    assert mine.dtype == dtype and mine.stride() == x.stride()
    compare(
        [mine, *my_gradients],
        [theirs, *their_gradients],
        [best, *best_gradients],
        ["y", *names],
        FLOORS[dtype],
    )
    again, again_gradients = gradients(ours, tensors, upstream)
    for one, other in zip([mine, *my_gradients], [again, *again_gradients], strict=True):
        assert torch.equal(one, other)  # reruns have the same bits


@pytest.mark.parametrize("layout", ["channel-major", "token-major"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTIONS, ids=identity)
def test_qkv_attention(device, case, dtype, layout):
    torch.manual_seed(2)
    width = 3 * case.num_heads * case.head_dim
    qkv = torch.randn(case.batch, width, case.length, device=device).to(dtype)
    if layout == "token-major":
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    queries = case.num_queries or case.length

    def ours(t):
        return ops.qkv_attention(t, case.num_heads, case.order, case.num_queries)

    def plain(t):
        return baselines.qkv_attention(t, case.num_heads, case.order)[:, :, :queries]

    def exact(t):
        return reference.qkv_attention(t, case.num_heads, case.order, case.num_queries)

    shape = (case.batch, width // 3, queries)
    upstream = torch.randn(shape, device=device).to(dtype)
    mine, my_gradients = gradients(ours, [qkv], upstream)
    theirs, their_gradients = gradients(plain, [qkv], upstream)
    best, best_gradients = gradients(exact, [qkv.double()], upstream.double())
    compare(
        [mine, *my_gradients],
        [theirs, *their_gradients],
        [best, *best_gradients],
        ["out", "qkv"],
        FLOORS[dtype],
    )
    again, again_gradients = gradients(ours, [qkv], upstream)
    assert torch.equal(mine, again) and torch.equal(my_gradients[0], again_gradients[0])


ROW = StepCoefficients(
    cfg=1.5, x0_x=1.3, x0_out=-0.9, guide_x0=0.2, guide_mean=1.5, next_x=0.3, next_x0=0.6,
    next_h0=0.1, state_x=0.1, state_x0=0.2, min_log=-5.0, max_log=-3.0, noise=0.7,
)  # fmt: skip


def update_arguments(size, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)

    def normal(channels, dtype=torch.float32):
        return torch.randn(2, channels, size, size, generator=generator).to(device, dtype)

    x, out = normal(3), normal(6, dtype)
    more = {"gradient": normal(3, dtype), "uncond_output": normal(6, dtype), "history": [normal(3)]}
    more.update(seeds=torch.from_numpy(image_seeds(7, 2)).to(device), step=5, learned_variance=True)
    return (x, out, ROW), more


@pytest.mark.parametrize("clip", ["static", "dynamic", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [64, 7])
def test_guided_mean_update_has_the_bits_of_the_cpu(device, size, dtype, clip):
    first, more = update_arguments(size, device, dtype)
    results = ops.guided_mean_update(*first, **more, clip=clip, quantile=0.9)
    first, more = update_arguments(size, "cpu", dtype)
    expected = ops.guided_mean_update(*first, **more, clip=clip, quantile=0.9)
    for name, got, best in zip(("x_next", "x0", "state"), results, expected, strict=True):
        difference = (got.cpu().view(torch.int32) != best.view(torch.int32)).sum().item()
        assert difference == 0, f"{name}: {difference} of {best.numel()} values differ in a bit"


def small_calls(device):
    """One function per op, which takes and gives tensors that a graph may hold."""
    torch.manual_seed(4)
    x = torch.randn(2, 64, 16, 16, device=device).to(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 64, device=device)
    scale_shift = torch.randn(2, 128, device=device)
    qkv = torch.randn(2, 256, 3 * 64, device=device).to(torch.bfloat16).transpose(1, 2)
    first, more = update_arguments(16, device)
    return {
        "ada_group_norm": lambda: ops.ada_group_norm(x, weight, bias, scale_shift),
        "qkv_attention": lambda: ops.qkv_attention(qkv, 1),
        "guided_mean_update": lambda: torch.stack(ops.guided_mean_update(*first, **more)),
    }


@pytest.mark.parametrize("name", ["ada_group_norm", "qkv_attention", "guided_mean_update"])
def test_other_streams_and_graphs(gpu, name):
    call = small_calls(gpu)[name]
    with torch.no_grad():
        expected = call()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                result = call()
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(result, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)


def test_a_step_from_the_device_table(gpu):
    """A captured step goes on by itself: counter, NHWC copies and image against the CPU's."""
    from adm_rt.ops._library import cuda_extension

    first, more = update_arguments(16, gpu)
    steps, (x, out, row) = 4, first
    table = torch.tensor([row] * steps, dtype=torch.float32, device=gpu)
    counter, arrivals = torch.zeros(2, dtype=torch.int32, device=gpu).split(1)
    limits = torch.empty(2, device=gpu)
    x_next, x0, state = (torch.empty_like(x) for _ in range(3))
    half = torch.zeros(2, 16 * 16, 8, dtype=torch.float16, device=gpu)
    image = torch.zeros(2, 16, 16, 3, dtype=torch.uint8, device=gpu)
    gradient, uncond = (more[name] for name in ("gradient", "uncond_output"))
    addresses = [t.data_ptr() for t in (x, out, uncond, gradient, more["history"][0])]
    addresses += [0, 0, 0, more["seeds"].data_ptr()]

    def step():
        cuda_extension().guided_mean_update_step(
            list(row), (2, 3, 256, 6, 6), addresses, [t.data_ptr() for t in (x_next, x0, state)],
            (0, 0), 0, True, 1, 0.9,
            (table.data_ptr(), counter.data_ptr(), arrivals.data_ptr(), limits.data_ptr()),
            (False, False), [(half.data_ptr(), 8, 2)], image.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for position in range(steps):
        graph.replay()
        torch.cuda.synchronize()
        assert counter.item() == position + 1 and arrivals.item() == 0
        cpu_first, cpu_more = update_arguments(16, "cpu")
        cpu_more["step"] = position
        expected = ops.guided_mean_update(*cpu_first, **cpu_more)[0]
        assert torch.equal(x_next.cpu(), expected)
        pixels = expected.permute(0, 2, 3, 1)
        assert torch.equal(half.cpu()[:, :, :3], pixels.reshape(2, 256, 3).half())
        assert (half[:, :, 3:] == 0).all()
        quantised = ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        assert torch.equal(image.cpu(), quantised)


def test_a_step_does_not_synchronise(gpu):
    calls = small_calls(gpu)
    with torch.no_grad():
        for call in calls.values():
            call()
        mode = torch.cuda.get_sync_debug_mode()
        with contextlib.ExitStack() as stack:
            stack.callback(torch.cuda.set_sync_debug_mode, mode)
            torch.cuda.set_sync_debug_mode("error")
            for call in calls.values():
                call()


def test_philox_normals_by_way_of_a_step(device):
    """x_next = z alone: the noise of the GPU is that of the CPU, bit for bit."""
    row = StepCoefficients(noise=1.0)
    x = torch.zeros(3, 3, 33, 31, device=device)
    seeds = torch.from_numpy(image_seeds(9, 3)).to(device)
    z, _, _ = ops.guided_mean_update(x, x, row, seeds=seeds, step=77)
    expected = ops.philox_normal(seeds.cpu().numpy(), (3, 33, 31), step=77, purpose=1)
    np.testing.assert_array_equal(z.cpu().numpy().view(np.uint32), expected.view(np.uint32))
