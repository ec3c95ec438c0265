"""Cases, tolerances and timing that the tests and the benchmarks share.

A case is the shape of one call of an op in a real ADM network. ``network_cases()`` derives them
from the presets; the hand-written lists are the shapes of ``64x64_diffusion`` that every speed
claim refers to. Importing this module does not import torch.
"""

import contextlib
import time
from typing import NamedTuple


class AdaGroupNormCase(NamedTuple):
    """x [batch, channels, height, width]; 32 groups."""

    batch: int
    channels: int
    height: int
    width: int
    scale_shift: bool = True
    silu: bool = True


class AttentionCase(NamedTuple):
    """qkv [batch, 3 * num_heads * head_dim, length]; num_queries None: all positions."""

    batch: int
    num_heads: int
    head_dim: int
    length: int
    order: str = "legacy"
    num_queries: int | None = None


class UpdateCase(NamedTuple):
    """x [batch, 3, size, size]; sampler "ddpm" (learned variances) or "ddim"."""

    batch: int
    size: int
    sampler: str = "ddpm"
    guided: bool = False


# 64x64_diffusion (its classifier's pooling head, too): normalisations with an embedding at every
# resolution, and the widest concatenated input of each, which has none.
ADA_GROUP_NORM_64 = [
    AdaGroupNormCase(1, 192, 64, 64),
    AdaGroupNormCase(1, 384, 32, 32),
    AdaGroupNormCase(1, 576, 16, 16),
    AdaGroupNormCase(1, 768, 8, 8),
    AdaGroupNormCase(1, 576, 64, 64, scale_shift=False),
    AdaGroupNormCase(1, 960, 32, 32, scale_shift=False),
    AdaGroupNormCase(1, 1344, 16, 16, scale_shift=False),
    AdaGroupNormCase(1, 1536, 8, 8, scale_shift=False),
]
ATTENTION_64 = [
    AttentionCase(1, 6, 64, 1024, "new"),
    AttentionCase(1, 9, 64, 256, "new"),
    AttentionCase(1, 12, 64, 64, "new"),
    AttentionCase(1, 8, 64, 65, "new", num_queries=1),
]
UPDATE_64 = [
    UpdateCase(1, 64, "ddpm"),
    UpdateCase(1, 64, "ddpm", guided=True),
    UpdateCase(1, 64, "ddim"),
    UpdateCase(1, 64, "ddim", guided=True),
]


def network_cases(name):
    """Every (AdaGroupNormCase, AttentionCase) set of one preset, batch 1, found by a dry run.

    name: a preset. Runs the network on torch's meta device with recording ops, so it costs time
    (a second or so) but no memory. Returns two sorted lists without duplicates.
    """
    import torch

    from adm_rt import models, ops

    norms, attentions = set(), set()

    def norm(x, weight, bias, scale_shift=None, groups=32, eps=1e-5, silu=True):
        height, width = (*x.shape[2:], 1, 1)[:2]
        case = AdaGroupNormCase(1, x.shape[1], height, width, scale_shift is not None, bool(silu))
        norms.add(case)
        return torch.empty_like(x)

    def attention(qkv, num_heads, order="legacy", num_queries=None):
        width, length = qkv.shape[1] // 3, qkv.shape[2]
        attentions.add(AttentionCase(1, num_heads, width // num_heads, length, order, num_queries))
        return qkv.new_empty(1, width, num_queries or length)

    cfg = models.preset(name)
    with torch.device("meta"), torch.no_grad():
        network = models.build(cfg).eval()
        x, t = torch.empty(1, 3, cfg.image_size, cfg.image_size), torch.empty(1)
        extra = {}
        if cfg.class_cond:
            extra["y"] = torch.empty(1, dtype=torch.int64)
        if cfg.kind == "upsampler":
            extra["low_res"] = torch.empty(1, 3, cfg.small_size, cfg.small_size)
        saved = ops.ada_group_norm, ops.qkv_attention
        ops.ada_group_norm, ops.qkv_attention = norm, attention
        try:
            network(x, t, **extra)
        finally:
            ops.ada_group_norm, ops.qkv_attention = saved
    return sorted(norms), sorted(attentions, key=repr)


def max_error(result, exact):
    """Largest absolute difference, relative to max(1, the largest absolute value of exact)."""
    result, exact = result.detach().double(), exact.detach().double()
    if exact.numel() == 0:
        return 0.0
    return float((result - exact).abs().max() / exact.abs().max().clamp(min=1))


def assert_as_good_as(result, plain, exact, *, factor=2.0, floor=1e-6, what="result"):
    """The project's tolerance: error at most ``factor`` times that of plain torch, plus ``floor``.

    result: of the kernel; plain: of the plain torch sequence on the same low-precision inputs;
    exact: of reference.py in float64. Errors as in ``max_error``.
    """
    error, allowed = max_error(result, exact), factor * max_error(plain, exact) + floor
    assert error <= allowed, f"{what}: error {error:.3g} against float64, allowed {allowed:.3g}"


@contextlib.contextmanager
def cpu_settings(isa=None, threads=None):
    """Within this context the kernels use that instruction set and that many threads."""
    from adm_rt.ops._library import extension

    kernels = extension()
    before = kernels.cpu_isa(), kernels.num_threads()
    try:
        if isa is not None:
            kernels.set_cpu_isa(isa)
        if threads is not None:
            kernels.set_num_threads(threads)
        yield kernels
    finally:
        kernels.set_cpu_isa(before[0])
        kernels.set_num_threads(before[1])


class Timing(NamedTuple):
    """Milliseconds per call."""

    median: float
    minimum: float


def interleaved_timings(functions, rounds=15, sample_ms=2.0, clock=time.perf_counter):
    """Time several functions against each other on a machine whose speed drifts.

    functions: name -> callable without arguments. Each round takes one sample of each, in an order
    that alternates; a sample repeats a short call until it lasts about sample_ms. clock: seconds as
    a float; time.thread_time leaves out what other programs take from this thread (one thread
    only). Returns name -> Timing. Call every function once before, if its first call does more
    than the others.
    """
    repeats = {}
    for name, function in functions.items():
        begin = clock()
        function()
        once = (clock() - begin) * 1e3
        repeats[name] = max(1, min(1000, round(sample_ms / max(once, 1e-6))))
    samples = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions) if turn % 2 == 0 else reversed(list(functions)):
            function, count = functions[name], repeats[name]
            begin = clock()
            for _ in range(count):
                function()
            samples[name].append((clock() - begin) * 1e3 / count)
    return {
        name: Timing(sorted(times)[len(times) // 2], min(times)) for name, times in samples.items()
    }
