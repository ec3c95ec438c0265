"""The three ops against the torch sequences they replace, at the shapes of ``64x64_diffusion``.

Then the ops of the native engine's plan of one model, which replace whole layers (plan_ops.py).
"""

from __future__ import annotations

import functools

import torch

from adm_rt import ops, testing
from adm_rt.benchmarking import baselines, plan_ops
from adm_rt.benchmarking.pair import heading, timed_row, torch_threads
from adm_rt.diffusion import Diffusion
from adm_rt.samplers.ddim import coefficients as ddim_coefficients
from adm_rt.samplers.ddpm import coefficients as ddpm_coefficients

# Two float32 computations of the same thing, relative to the largest value.
MAX_ERROR = 1e-4

GROUPS = (
    ("ada_group_norm", testing.ADA_GROUP_NORM_64),
    ("ada_group_norm_backward", testing.ADA_GROUP_NORM_64),
    ("qkv_attention", testing.ATTENTION_64),
    ("qkv_attention_backward", testing.ATTENTION_64),
    ("guided_mean_update", testing.UPDATE_64),
)


def rows(args):
    """Time every case, printing as it goes."""
    result = []
    with torch_threads(args.threads):
        print(heading(args))
        for name, cases in GROUPS:
            if args.only not in name:
                continue
            maker = globals()[f"_{name}"]
            for case in (c._replace(batch=n) for n in args.batches for c in cases):
                row = _row(name, case, maker(case), args)
                result.append(row)
                print(_line(row), flush=True)
        result += plan_ops.rows(args)
    return result


def _row(name, case, functions, args):
    """functions: (ours, baseline, and the same two made comparable: same noise, one result)."""
    ours, baseline, compare_ours, compare_baseline = functions
    error = testing.max_error(compare_ours(), compare_baseline())
    if not error <= MAX_ERROR:
        raise ValueError(f"{name} {_sizes(case)}: ours differs from the baseline by {error:.3g}")
    ours(), baseline()
    return timed_row(name, _sizes(case), {"ours": ours, "baseline": baseline}, error, args)


def _line(row):
    return (
        f"{row['name']:24s} {row['sizes']:38s} ours {row['ours_ms']:9.3f} ms  "
        f"baseline {row['baseline_ms']:9.3f} ms  {row['ratio']:5.2f}x  error {row['max_error']:.1e}"
    )


def _sizes(case):
    if isinstance(case, testing.AdaGroupNormCase):
        extra = ["scale_shift"] * case.scale_shift + ["silu"] * case.silu
        return " ".join([f"{case.batch}x{case.channels}x{case.height}x{case.width}", *extra])
    if isinstance(case, testing.AttentionCase):
        text = (
            f"N={case.batch} T={case.length} heads={case.num_heads} d={case.head_dim} {case.order}"
        )
        return text + (f" queries={case.num_queries}" if case.num_queries else "")
    guided = " guided" if case.guided else ""
    return f"{case.batch}x3x{case.size}x{case.size} {case.sampler}{guided}"


def _ada_group_norm_inputs(case):
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.height, case.width)
    tensors = [x, torch.randn(case.channels), torch.randn(case.channels)]
    return [*tensors, torch.randn(case.batch, 2 * case.channels) if case.scale_shift else None]


def _ada_group_norm(case):
    inputs = _ada_group_norm_inputs(case)
    ours = torch.no_grad()(functools.partial(ops.ada_group_norm, *inputs, silu=case.silu))
    plain = torch.no_grad()(functools.partial(baselines.ada_group_norm, *inputs, silu=case.silu))
    return ours, plain, ours, plain


def _ada_group_norm_backward(case):
    """The backward pass alone, gradients of everything, on a graph that is kept."""
    inputs = [t.requires_grad_() for t in _ada_group_norm_inputs(case) if t is not None]
    return _backward_pair(
        functools.partial(ops.ada_group_norm, silu=case.silu),
        functools.partial(baselines.ada_group_norm, silu=case.silu),
        inputs,
    )


def _qkv(case):
    torch.manual_seed(0)
    return torch.randn(case.batch, 3 * case.num_heads * case.head_dim, case.length)


def _attention_pair(case):
    def plain(qkv):
        out = baselines.qkv_attention(qkv, case.num_heads, case.order)
        return out[:, :, : case.num_queries] if case.num_queries else out

    ours = functools.partial(
        ops.qkv_attention,
        num_heads=case.num_heads,
        order=case.order,
        num_queries=case.num_queries,
    )
    return ours, plain


def _qkv_attention(case):
    qkv = _qkv(case)
    ours, plain = (torch.no_grad()(functools.partial(f, qkv)) for f in _attention_pair(case))
    return ours, plain, ours, plain


def _qkv_attention_backward(case):
    return _backward_pair(*_attention_pair(case), [_qkv(case).requires_grad_()])


def _backward_pair(ours, plain, inputs):
    grad = None

    def backward_of(function):
        nonlocal grad
        y = function(*inputs)
        grad = torch.randn_like(y) if grad is None else grad
        return functools.partial(torch.autograd.grad, y, inputs, grad, retain_graph=True)

    ours, plain = backward_of(ours), backward_of(plain)

    def flat(backward):
        # One vector for the comparison, every gradient on its own scale.
        return lambda: torch.cat([g.flatten() / scale for g, scale in zip(backward(), scales)])

    scales = [g.abs().max().clamp(min=1e-30) for g in plain()]
    return ours, plain, flat(ours), flat(plain)


def _guided_mean_update(case):
    """Ours draws its Philox noise inside, the baseline calls randn; compared with equal noise."""
    torch.manual_seed(0)
    shape = (case.batch, 3, case.size, case.size)
    x, gradient, noise = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    output = torch.randn(case.batch, 6, case.size, case.size)
    diffusion = Diffusion(noise_schedule="cosine", timestep_respacing="250")
    step, scale = diffusion.num_timesteps // 2, 1.0
    t = torch.full((case.batch,), step, dtype=torch.int64)
    tables = baselines.tables(diffusion)
    seeds = torch.arange(case.batch, dtype=torch.int64)
    row_of, plain = {
        "ddpm": (ddpm_coefficients, baselines.ddpm_update),
        "ddim": (ddim_coefficients, baselines.ddim_update),
    }[case.sampler]
    learned = case.sampler == "ddpm"
    coefficients = row_of(diffusion, step, scale if case.guided else 0.0)
    guide = gradient if case.guided else None

    def ours(**noise):
        return ops.guided_mean_update(
            x, output, coefficients, gradient=guide, learned_variance=learned, **noise
        )[0]

    def baseline(noise=None):
        scaled = gradient * scale if case.guided else None
        return plain(tables, x, output, t, scaled, noise)

    ours, baseline = torch.no_grad()(ours), torch.no_grad()(baseline)
    return (
        functools.partial(ours, seeds=seeds, step=3),
        baseline,
        functools.partial(ours, noise=noise),
        functools.partial(baseline, noise),
    )
