"""The three ops on CUDA against the torch sequences they replace, at the shapes of the networks.

Kernel time: each contender's calls are captured in one CUDA graph and replayed, contenders in
turns, between CUDA events; the median of the rounds is reported. Results are compared with the
float64 reference before anything is timed. Nothing here has been measured yet where no GPU was.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from adm_rt import benchmarking, ops, testing
from adm_rt.benchmarking import baselines, machine
from adm_rt.diffusion import Diffusion
from adm_rt.ops import _ada_group_norm_torch as norm_side
from adm_rt.ops import reference
from adm_rt.ops._library import cuda_extension, cuda_stream
from adm_rt.samplers.ddim import coefficients as ddim_coefficients
from adm_rt.samplers.ddpm import coefficients as ddpm_coefficients
from adm_rt.testing import AdaGroupNormCase, AttentionCase, UpdateCase

# The levels of 256x256_diffusion and 64x64_diffusion, large batches and one image.
NORMS = (
    AdaGroupNormCase(8, 256, 256, 256),
    AdaGroupNormCase(8, 256, 128, 128),
    AdaGroupNormCase(8, 512, 64, 64),
    AdaGroupNormCase(32, 384, 32, 32),
    AdaGroupNormCase(32, 1024, 8, 8),
    AdaGroupNormCase(1, 256, 256, 256),
    AdaGroupNormCase(1, 1024, 16, 16),
)
ATTENTIONS = (
    AttentionCase(8, 8, 64, 1024, "new"),
    AttentionCase(8, 16, 64, 256, "new"),
    AttentionCase(32, 12, 64, 64, "new"),
    AttentionCase(8, 4, 128, 1024, "new"),
    AttentionCase(1, 16, 64, 256, "new"),
)
UPDATES = (
    UpdateCase(8, 256, "ddpm", guided=True),
    UpdateCase(8, 256, "ddim", guided=True),
    UpdateCase(1, 64, "ddim", guided=True),
)
SMALL = {
    "ada_group_norm": (AdaGroupNormCase(1, 64, 8, 8),),
    "qkv_attention": (AttentionCase(1, 1, 64, 64, "new"),),
    "guided_mean_update": (UpdateCase(1, 8, "ddim", True), UpdateCase(1, 8, "ddpm", True)),
}
# Ours may be off from float64 by this much more than the baseline is (16-bit types; float32).
FACTOR, FLOOR = 2.0, 2e-3


class Contest(NamedTuple):
    """Functions without arguments; work: (amount, unit) that one call moves or computes."""

    name: str
    sizes: str
    ours: Any
    baselines: dict
    exact: Any
    work: tuple


def with_moments(x, weight, bias, scale_shift):
    """A function without arguments: ``ada_group_norm`` where who made x [N, C, H, W], on CUDA and
    channels_last, has found its channels' moments on the way. One kernel."""
    kernels, (n, channels) = cuda_extension(), x.shape[:2]
    shape, options = norm_side._cuda_call(x, scale_shift, 2 * channels, 32, 1e-5, True, True)
    moments = torch.empty(n, 2, channels, device=x.device)
    y = torch.empty_like(x)
    size = kernels.ada_group_norm_workspace(shape, options)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    with cuda_stream(x) as stream:
        addresses = (tensor.data_ptr() for tensor in (x, moments, workspace))
        kernels.channel_moments(shape, options, *addresses, stream)

    def call():
        inputs = [tensor.data_ptr() for tensor in (x, weight, bias, scale_shift, moments)]
        inputs = (inputs[0], 0, *inputs[1:], 0)  # no skip
        with cuda_stream(x) as stream:
            kernels.ada_group_norm(shape, options, inputs, (y.data_ptr(), 0, 0, 0), 0, stream)
        return y

    return call


def folded(x, weight, bias, scale_shift):
    """The same with torch's operations in x's dtype: statistics, weights and modulation are a
    factor and an offset of every channel of an image."""
    groups = x.double().unflatten(1, (32, -1))
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
    rstd = torch.rsqrt(variance + 1e-5).repeat_interleave(groups.shape[2], dim=1)
    mean = mean.repeat_interleave(groups.shape[2], dim=1)
    scale, shift = scale_shift.double().chunk(2, dim=1)
    factor = weight * rstd * (1 + scale)
    offset = (bias - weight * rstd * mean) * (1 + scale) + shift
    factor, offset = (rows.to(x.dtype)[:, :, None, None] for rows in (factor, offset))
    return lambda: F.silu(x * factor + offset)


def norm_contests(case, dtype, device):
    """Forward; on CUDA its last kernel alone, with the moments at hand; then forward and all
    gradients. channels_last. In 16 bits 6 bytes an element, two reads and a write; the last kernel
    alone 4."""
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.height, case.width, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, case.channels, device=device)
    scale_shift = torch.randn(case.batch, 2 * case.channels, device=device).to(dtype)
    tensors = (x, weight, bias, scale_shift)
    upstream = torch.randn_like(x)
    sizes = f"{case.batch}x{case.channels}x{case.height}x{case.width} {str(dtype)[6:]}"
    traffic = x.numel() * x.element_size() * 3

    def with_gradients(function, wide=False):
        kind = torch.float64 if wide else None

        def call():
            leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in tensors]
            y = function(*leaves)
            return torch.autograd.grad(y, leaves, upstream.to(y.dtype))[0]

        return call

    def exact():
        return reference.ada_group_norm(*(t.double() for t in tensors))

    yield Contest(
        "ada_group_norm",
        sizes,
        lambda: ops.ada_group_norm(*tensors),
        {"eager": lambda: baselines.ada_group_norm(*tensors)},
        exact,
        (traffic / 1e12, "TB/s"),
    )
    if device.type == "cuda":
        yield Contest(
            "ada_group_norm_apply",
            sizes,
            with_moments(*tensors),
            {"eager": folded(*tensors)},
            exact,
            (traffic * 2 / 3 / 1e12, "TB/s"),
        )
    yield Contest(
        "ada_group_norm_gradients",
        sizes,
        with_gradients(ops.ada_group_norm),
        {"eager": with_gradients(baselines.ada_group_norm)},
        with_gradients(reference.ada_group_norm, wide=True),
        ((traffic + x.numel() * x.element_size() * 5) / 1e12, "TB/s"),
    )


def attention_contests(case, dtype, device):
    """Forward, then forward and gradient, against the published sequence and torch's SDPA."""
    torch.manual_seed(0)
    heads, d, length = case.num_heads, case.head_dim, case.length
    # As a channels_last convolution lays it down.
    qkv = torch.randn(case.batch, length, 3 * heads * d, device=device).to(dtype).transpose(1, 2)
    upstream = torch.randn(case.batch, heads * d, length, device=device).to(dtype)
    sizes = f"N={case.batch} T={length} heads={heads} d={d} {str(dtype)[6:]}"
    flops = 4 * case.batch * heads * length**2 * d / 1e12

    def sdpa(t):
        q, k, v = t.unflatten(1, (3, heads, d)).transpose(-1, -2).unbind(1)
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)

    def ours(t):
        return ops.qkv_attention(t, heads, case.order)

    def eager(t):
        return baselines.qkv_attention(t, heads, case.order)

    def exact(t):
        return reference.qkv_attention(t, heads, case.order)

    def with_gradient(function, kind=dtype):
        def call():
            leaf = qkv.detach().to(kind).requires_grad_()
            return torch.autograd.grad(function(leaf), leaf, upstream.to(kind))[0]

        return call

    yield Contest(
        "qkv_attention",
        sizes,
        lambda: ours(qkv),
        {"sdpa": lambda: sdpa(qkv), "eager": lambda: eager(qkv)},
        lambda: exact(qkv.double()),
        (flops, "TFLOP/s"),
    )
    yield Contest(
        "qkv_attention_gradients",
        sizes,
        with_gradient(ours),
        {"sdpa": with_gradient(sdpa), "eager": with_gradient(eager)},
        with_gradient(exact, torch.float64),
        (3.5 * flops, "TFLOP/s"),
    )


def update_contests(case, dtype, device):
    """One guided step on float32 images and what channels_last networks of that dtype return. The
    baseline is the torch sequence with its coefficients at hand, which the published code's are
    not: it copies each from the host."""
    torch.manual_seed(0)
    diffusion = Diffusion(noise_schedule="linear", timestep_respacing="25")
    row_of = {"ddpm": ddpm_coefficients, "ddim": ddim_coefficients}[case.sampler]
    row = row_of(diffusion, diffusion.num_timesteps // 2, 1.0 if case.guided else 0.0)
    shape = (case.batch, 3, case.size, case.size)

    def networks(channels):
        values = torch.randn(case.batch, channels, case.size, case.size, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    x, out = torch.randn(shape, device=device), networks(6)
    gradient = networks(3) if case.guided else None
    seeds = torch.arange(case.batch, device=device)
    learned = case.sampler == "ddpm"
    # x, the prediction, variances and gradient in; x_next and x0 out.
    traffic = x.numel() * (12 + out.element_size() * (1 + learned + case.guided))

    def ours():
        options = {"gradient": gradient, "learned_variance": learned}
        return ops.guided_mean_update(x, out, row, seeds=seeds, step=3, **options)[0]

    def plain(kind=torch.float32):
        tensors = [t if t is None else t.to(kind) for t in (x, out, gradient)]
        noise = torch.randn_like(tensors[0]) if row.noise else None
        return reference.guided_mean_update(
            *tensors[:2], row, gradient=tensors[2], noise=noise, learned_variance=learned
        )[0]

    yield Contest(
        "guided_mean_update",
        f"{'x'.join(map(str, shape))} {case.sampler}{' guided' * case.guided} {str(dtype)[6:]}",
        ours,
        {"eager": plain},
        None if row.noise else lambda: plain(torch.float64),  # the noises differ
        (traffic / 1e12, "TB/s"),
    )


GROUPS = {
    "ada_group_norm": (norm_contests, NORMS),
    "qkv_attention": (attention_contests, ATTENTIONS),
    "guided_mean_update": (update_contests, UPDATES),
}


def captured(function, calls):
    """A replay of `calls` calls of function as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def milliseconds(run, device):
    """Of one run()."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def timings(functions, rounds, device):
    """name -> median milliseconds of one call; contenders take turns."""
    runs = {}
    for name, function in functions.items():
        function()
        once = milliseconds(function, device)
        calls = max(1, min(20, int(2 / max(once, 1e-3))))
        replay = captured(function, calls) if device.type == "cuda" else None
        runs[name] = (replay or function, calls if replay else 1)
    samples = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            run, calls = runs[name]
            samples[name].append(milliseconds(run, device) / calls)
    return {name: sorted(times)[len(times) // 2] for name, times in samples.items()}


def rows_of(contest, args, device):
    """A row per baseline. Raises ValueError when ours is worse than the tolerance allows."""
    error = None
    if contest.exact is not None:
        exact = contest.exact()
        error = testing.max_error(contest.ours(), exact)
        plain = testing.max_error(contest.baselines["eager"](), exact)
        if not error <= FACTOR * plain + FLOOR:
            raise ValueError(
                f"{contest.name} {contest.sizes}: error {error:.3g}, the baseline's {plain:.3g}"
            )
        del exact
    times = timings({"ours": contest.ours, **contest.baselines}, args.rounds, device)
    amount, unit = contest.work
    for name in contest.baselines:
        yield {
            "name": contest.name,
            "sizes": contest.sizes,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "baseline": name,
            "ours_ms": times["ours"],
            "baseline_ms": times[name],
            "ratio": times[name] / times["ours"],
            "max_error": error,
            "rate": amount / times["ours"] * 1e3,
            "rate_unit": unit,
            "rounds": args.rounds,
            "versions": machine.versions(),
            "commit": machine.commit(),
        }


def rows(args):
    """Compare and time every case, printing as it goes; ``args.failures`` collects messages."""
    device = torch.device(args.device)
    result, args.failures = [], []
    for name, (contests, cases) in GROUPS.items():
        if args.only not in name:
            continue
        for case in SMALL[name] if args.small else cases:
            for contest in contests(case, getattr(torch, args.dtype), device):
                try:
                    found = list(rows_of(contest, args, device))
                except (ValueError, RuntimeError) as error:
                    args.failures.append(f"{contest.name} {contest.sizes}: {error}")
                    print(f"failed: {args.failures[-1]}", flush=True)
                    continue
                for row in found:
                    print(line(row), flush=True)
                result += found
                if args.json:  # what is measured is kept, whatever comes
                    benchmarking.write(args.json, result)
    return result


def line(row):
    return (
        f"{row['name']:26s} {row['sizes']:36s} ours {row['ours_ms']:9.4f} ms  {row['baseline']:6s}"
        f"{row['baseline_ms']:9.4f} ms  {row['ratio']:6.2f}x  {row['rate']:8.3f} {row['rate_unit']}"
    )


def main(argv=None):
    """``python benchmarks/bench_cuda_ops.py``"""
    parser = argparse.ArgumentParser(prog="bench_cuda_ops", allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--only", default="", metavar="TEXT", help="ops whose name contains TEXT")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=15, help="samples of each (default: 15)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu only tries the program"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_cuda_ops: torch sees no CUDA device; nothing was measured", file=sys.stderr)
        return 3
    result = rows(args)
    if args.json:
        benchmarking.write(args.json, result)
        print(f"{len(result)} rows -> {args.json}")
    return 0 if result and not args.failures else 1
