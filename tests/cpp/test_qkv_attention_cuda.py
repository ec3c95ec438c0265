"""The CUDA source of qkv_attention where there is no GPU: its kernels under the emulator against
exact arithmetic, with and without sanitizers, and nvcc's report on registers and spills."""

import numpy as np
import pytest
import torch
from emulated_attention import (
    CASES,
    CHANNEL_MAJOR,
    MANY,
    NEW,
    SCHEDULES,
    SOURCE,
    TOKEN_MAJOR,
    Case,
    Run,
    emulated_cuda,
    exact,
)
from emulated_dtypes import BFLOAT16, FLOAT16, FLOAT32

from adm_rt import testing
from adm_rt.ops import reference

DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}


@pytest.fixture(scope="module")
def cuda(compile_emulated):
    return emulated_cuda(compile_emulated)


def plain_torch(case, qkv, grad):
    """reference.py in the case's dtype: what the kernels may be wrong by is twice its error."""
    order = "new" if case.order == NEW else "legacy"
    qkv = torch.from_numpy(qkv).to(DTYPES[case.dtype]).requires_grad_()
    out = reference.qkv_attention(qkv, case.heads, order, case.queries)
    grad = torch.from_numpy(grad).to(out.dtype)
    (dqkv,) = torch.autograd.grad(out, qkv, grad)
    return out.detach(), dqkv


def check(run, case, qkv, grad, floor=1e-6):
    results = {"out": run.out, "dqkv": run.dqkv}
    plain, truth = plain_torch(case, qkv, grad), exact(case, qkv, grad)
    for (name, got), other, expected in zip(results.items(), plain, truth, strict=True):
        testing.assert_as_good_as(
            torch.from_numpy(np.ascontiguousarray(got)),
            other,
            torch.from_numpy(expected),
            floor=floor,
            what=f"{name} of {case}",
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradient(cuda, case):
    qkv, grad = case.inputs()
    run = Run(cuda, case)
    check(run, case, qkv, grad)
    if case.queries < case.length:  # q of positions that did not ask
        split = (case.batch, case.heads, 3) if case.order != NEW else (case.batch, 3, case.heads)
        parts = run.dqkv.reshape(*split, case.head_dim, case.length)
        dq = parts[:, 0] if case.order == NEW else parts[:, :, 0]
        assert not dq[..., case.queries :].any()


@pytest.mark.parametrize("shared", testing.ATTENTION_64, ids=str)
def test_shared_cases(cuda, shared):
    """The shapes that speed claims refer to, with one head."""
    queries = shared.num_queries or 0
    case = Case(1, 1, shared.head_dim, shared.length, queries, multiprocessors=MANY)
    qkv, grad = case.inputs()
    check(Run(cuda, case), case, qkv, grad)


def same_bits(first, second):
    assert np.array_equal(first.out, second.out)
    assert np.array_equal(first.stats, second.stats)
    assert np.array_equal(first.dqkv, second.dqkv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same_bits(cuda, dtype):
    """In every order of threads, alone or in a batch, in blocks of 64 queries or of 128."""
    case = Case(2, 2, 64, 130, dtype=dtype)
    first = Run(cuda, case)
    for schedule in SCHEDULES[1:]:
        same_bits(first, Run(cuda, case._replace(schedule=schedule, multiprocessors=1000)))
    qkv, grad = case.inputs()
    alone = Run(cuda, case._replace(batch=1), qkv[1:], grad[1:])
    for name in ("out", "stats", "dqkv"):
        assert np.array_equal(getattr(alone, name)[0], getattr(first, name)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_unaligned_addresses(cuda, dtype):
    """Narrow accesses give the same output; the gradient's delta adds up in another order."""
    case = Case(1, 2, 64, 70, 66, dtype=dtype)
    wide = Run(cuda, case)
    qkv, grad = case.inputs()
    for narrow in (
        Run(cuda, case, offset=1),
        Run(cuda, case._replace(layout=CHANNEL_MAJOR)),
        Run(cuda, case._replace(layout=CHANNEL_MAJOR), offset=1),
    ):
        assert np.array_equal(narrow.out, wide.out)
        check(narrow, case, qkv, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(cuda, dtype):
    """Logits in the thousands, with a maximum that comes late, neither overflow nor vanish."""
    case = Case(1, 1, 64, 100, dtype=dtype)
    qkv, grad = case.inputs()
    qkv *= 16
    qkv[..., 90:] *= 2
    run = Run(cuda, case, qkv, grad)
    assert np.isfinite(run.out).all() and np.isfinite(run.dqkv).all()
    check(run, case, qkv, grad, floor=1e-4)
    qkv[:] = 1
    qkv[:, 64:128] = -500  # all logits are -4000: the softmax is uniform
    run = Run(cuda, case, qkv, grad)
    assert np.array_equal(run.out, np.ones_like(run.out))
    assert np.isfinite(run.dqkv).all()


def test_stats(cuda):
    """The maximum in units of ln 2 and the sum, as the CPU kernels save them."""
    case = Case(1, 2, 64, 100, 33, dtype=FLOAT32)
    qkv, _grad = case.inputs()
    q, k, _v = qkv.reshape(3, 2, 64, 100).astype(np.float64)
    logits = np.einsum("hdq,hdk->hqk", q[..., :33], k) / 8
    stats = Run(cuda, case).stats[0]
    np.testing.assert_allclose(stats[:, 0] * np.log(2), logits.max(-1), rtol=1e-5, atol=1e-5)
    total = np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    np.testing.assert_allclose(stats[:, 1], total, rtol=1e-5)


def test_bad_arguments(cuda):
    case = Case(1, 1, 8, 8)
    for wrong, message in (
        ({"head_dim": 257}, "head_dim=257; CUDA takes 1 to 256"),
        ({"num_queries": 9}, r"num_queries=9 is not in \[1, length=8\]"),
        ({"batch": 65536}, "batch=65536; CUDA takes 0 to 65535"),
        ({"order": 2}, "order=2 is not 0"),
        ({"dtype": 3}, "dtype code 3"),
        ({"length": 1 << 27, "num_queries": 1}, "fewer than 2\\^31 elements"),
    ):
        sizes = case._replace(**wrong).sizes()
        with pytest.raises(RuntimeError, match=message):
            cuda.qkv_attention(0, 0, 0, *sizes, TOKEN_MAJOR, 0)
    with pytest.raises(RuntimeError, match="layout=2 is not 0"):
        cuda.qkv_attention(0, 0, 0, *case.sizes(), 2, 0)
    with pytest.raises(RuntimeError, match="null pointer"):
        cuda.qkv_attention(16, 0, 0, *case.sizes(), TOKEN_MAJOR, 0)
    with pytest.raises(RuntimeError, match="needs stats and a workspace of 32 bytes"):
        cuda.qkv_attention_backward(16, 16, 16, 0, 16, 0, *case.sizes(), TOKEN_MAJOR, 0)
    cuda.qkv_attention(0, 0, 0, *case._replace(batch=0).sizes(), TOKEN_MAJOR, 0)  # nothing to do


def test_under_sanitizers(compile_emulated, run_sanitized):
    """Every case in three orders of threads; then too little memory, which must be seen."""
    library = compile_emulated(SOURCE, sanitized=True)
    code = (
        "import sys\n"
        "import emulated_attention as cases\n"
        "from emulated_dtypes import BFLOAT16\n"
        "cuda = cases.EmulatedCuda(sys.argv[1])\n"
        "for schedule in cases.SCHEDULES:\n"
        "    for case in cases.CASES:\n"
        "        cases.check_roughly(cuda, case._replace(schedule=schedule))\n"
        "print('all cases passed', flush=True)\n"
        "short = cases.unset((1, 60, 192), BFLOAT16)\n"
        "out = cases.unset((1, 64, 64), BFLOAT16)\n"
        "case = cases.Case(1, 1, 64, 64)\n"
        "cuda.qkv_attention(short.ctypes.data, out.ctypes.data, 0, *case.sizes(), 1, 0)\n"
    )
    status, text = run_sanitized(code, library)
    assert "all cases passed" in text, text[-3000:]
    assert status != 0 and "heap-buffer-overflow" in text, text[-3000:]


# Kernels of a source, by the name of their template and the kinds of it.
@pytest.mark.parametrize(
    "source, kernels",
    [("qkv_attention_cuda.cu", 2 * 5 + 3), ("qkv_attention_backward_cuda.cu", 2 * 4 + 3 + 3)],
)
def test_nvcc_report(nvcc_report, source, kernels):
    """No stack and no spills anywhere, and room for what the tuned kernels are to have on an SM."""
    reports = nvcc_report(source, {80: (80, 86, 89), 90: (90, 100, 120)})
    assert len(reports) == 6 * kernels, reports
    for report in reports:
        assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0), report
        # head_dim 64: three blocks of 128 threads of the small forward kernel, two of the others.
        blocks = 3 if "Li64ELi1E" in report.name else 2
        assert report.registers * 128 * blocks <= 65536, report
