"""ada_group_norm_resample on the GPU against float64 and the plain torch sequence."""

import devices
import pytest
import torch
import torch.nn.functional as F

from adm_rt import ops, testing
from adm_rt.ops import reference

devices.require()

RESAMPLERS = {
    "down": lambda x: F.avg_pool2d(x, 2),
    "up": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    None: lambda x: x,
}
CASES = [  # batch, channels of x, channels of skip, height, width, resample
    (2, 192, 0, 64, 64, "down"),
    (1, 384, 0, 16, 16, "up"),
    (2, 64, 32, 8, 8, "down"),
    (1, 1024, 512, 8, 8, None),  # a group of 48 channels straddles the two
    (1, 256, 128, 96, 64, "up"),
    (2, 36, 60, 6, 10, "up"),  # no multiple of 16 bytes
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_joined_and_resampled(device, case, dtype, layout):
    torch.manual_seed(5)
    n, own, more, height, width, resample = case
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def images(channels):
        x = torch.randn(n, channels, height, width, device=device) * 2 + 1
        return x.to(dtype).contiguous(memory_format=order)

    x, skip = images(own), images(more) if more else None
    weight, bias = torch.randn(2, own + more, device=device)
    rows = torch.randn(n, 2 * (own + more), device=device).to(dtype)

    def plain(x, skip, *parameters):
        joined = x if skip is None else torch.cat([x, skip], 1)
        return tuple(
            RESAMPLERS[resample](t) for t in (reference.ada_group_norm(joined, *parameters), joined)
        )

    def ours(x, skip, *parameters):
        return ops.ada_group_norm_resample(x, *parameters, skip=skip, resample=resample)

    def outputs(function, convert):
        leaves = [
            None if t is None else convert(t).detach().clone().requires_grad_()
            for t in (x, skip, weight, bias, rows)
        ]
        results = function(*leaves)
        generator = torch.Generator(device).manual_seed(6)
        upstream = [
            torch.randn(r.shape, device=device, generator=generator).to(dtype).to(r.dtype)
            for r in results
        ]
        leaves = [leaf for leaf in leaves if leaf is not None]
        return [*results, *torch.autograd.grad(results, leaves, upstream)]

    exact = outputs(plain, lambda t: t.double())
    mine, again = outputs(ours, lambda t: t), outputs(ours, lambda t: t)
    floor = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for index, (got, second, best) in enumerate(zip(mine, again, exact, strict=True)):
        assert got.isfinite().all() and torch.equal(got, second), index
        error = testing.max_error(got, best)
        # One rounding at the end; the gradients of parameters are sums over an image.
        assert error <= floor, f"{index} of {case}: error {error:.3g} against float64"
    assert mine[0].is_contiguous(memory_format=order)


def test_in_a_graph(gpu):
    """Captured and replayed: the same bits, also where several kernels follow each other."""
    for size in (8, 96):
        x = torch.randn(2, 256, size, size, device=gpu, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, 256, device=gpu)
        expected = ops.ada_group_norm_resample(x, weight, bias, resample="down")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.ada_group_norm_resample(x, weight, bias, resample="down")
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b), size
