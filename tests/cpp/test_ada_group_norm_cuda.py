"""The CUDA kernels of ada_group_norm: under the emulator, in any order of threads, against float64
and the plain torch sequence; then what nvcc makes of them."""

import emulated_norm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated_dtypes import BFLOAT16, FLOAT16, FLOAT32
from emulated_norm import (
    NONE,
    POOL,
    UP,
    NormCase,
    NormRun,
    assert_same_bits,
    emulated_cuda,
)

from adm_rt import testing
from adm_rt.ops import reference

TORCH_DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}
DTYPES = list(TORCH_DTYPES)
DTYPE_IDS = ["float32", "bfloat16", "float16"]
# Every number of channels that an ADM network normalises (the CPU test derives the list from the
# presets): groups of 1 to 64 channels.
CHANNELS = [32, 64, 96, 128, 192, 256, 384, 512, 576, 768, 960, 1024, 1152, 1280, 1344, 1536, 1792]
CHANNELS += [2048]


@pytest.fixture(scope="module")
def cuda(compile_emulated):
    return emulated_cuda(compile_emulated)


RESAMPLERS = {
    NONE: lambda x: x * 1,
    POOL: lambda x: F.avg_pool2d(x, 2),
    UP: lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
}


def plain_torch(run, dtype):
    """What reference.py and torch's resampling make of the case in that dtype, gradients too."""
    c = run.case
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(array, dtype):
        return torch.from_numpy(np.array(array)).to(dtype).requires_grad_()

    inputs = [leaf(run.values(run.x), dtype)]
    if run.skip is not None:
        inputs.append(leaf(run.values(run.skip), dtype))
    weight, bias = leaf(run.weight, wide), leaf(run.bias, wide)
    rows = run.modulation_rows()
    rows = None if rows is None else leaf(rows, wide)
    joined = torch.cat(inputs, 1)
    h = reference.ada_group_norm(joined, weight, bias, rows, c.groups, 1e-5, c.silu)
    y, x_out = RESAMPLERS[c.resample](h), RESAMPLERS[c.resample](joined)
    leaves = [*inputs, weight, bias, *([] if rows is None else [rows])]
    grads = [
        torch.from_numpy(np.array(run.values(g))).to(dtype) for g in (run.grad, run.grad_x_out)
    ]
    names = ["dx", "dskip"][: len(inputs)] + ["dweight", "dbias", "dscale_shift"]
    found = dict(zip(names, torch.autograd.grad((y, x_out), leaves, grads), strict=False))
    return {"y": y.detach(), "x_out": x_out.detach(), **found}


def check(cuda, case, given=False):
    """All outputs of a case against float64; returns them and the NormRun."""
    run = NormRun(case)
    exact = plain_torch(run, torch.float64)
    plain = plain_torch(run, TORCH_DTYPES[case.dtype])
    moments = run.moments(cuda) if given else (None, None)
    got = run.forward(cuda, moments)
    wanted = (True, True, True, case.modulated)
    got |= run.backward(cuda, got["mean"], got["rstd"], wanted)
    for name, result in got.items():
        if name in exact:
            values = run.values(result) if result.ndim == 4 else result
            values = torch.from_numpy(np.array(values))
            # Of sums over a batch plain torch happens to be lucky in some.
            floor = 3e-6 if name.startswith("d") else 1e-6
            testing.assert_as_good_as(
                values, plain[name], exact[name], floor=floor, what=f"{name} of {case}"
            )
    return got, run


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_every_channel_count(cuda, dtype):
    """On chip, and as three kernels; their results agree with each other, too."""
    for index, channels in enumerate(CHANNELS):
        # Each in one 16-bit type, every third in float32.
        if index % 3 if dtype == FLOAT32 else index % 2 != dtype - BFLOAT16:
            continue
        case = NormCase(1, channels, 3, 5, dtype, modulated=index % 4 != 3, silu=index % 5 != 4)
        assert cuda.is_on_chip(*NormRun(case).arguments())
        check(cuda, case)
        check(cuda, case, given=True)


LARGE = NormCase(1, 64, 64, 65)  # does not fit on a chip: chunks, merged


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_images_in_chunks(cuda, dtype):
    case = LARGE._replace(dtype=dtype)
    arguments = NormRun(case).arguments()
    assert not cuda.is_on_chip(*arguments) and cuda.chunk_count(*arguments) > 20
    check(cuda, case)


VARIANTS = [
    NormCase(2, 96, 6, 4, resample=POOL, skip_channels=32),
    NormCase(2, 96, 3, 5, resample=UP, skip_channels=64),
    NormCase(1, 1536, 2, 2, skip_channels=512),  # a group of 48 straddles the two
    NormCase(1, 64, 66, 64, resample=POOL, silu=False),
    NormCase(1, 64, 64, 65, skip_channels=24, resample=UP),
    NormCase(1, 160, 1, 1, groups=5, modulated=False),
    # Channels that do not fill 16 bytes, odd groups, channels first: one element at a time.
    NormCase(2, 36, 6, 8, groups=12, resample=POOL, skip_channels=7),
    NormCase(2, 30, 3, 5, groups=10, resample=UP),
    NormCase(2, 36, 6, 8, groups=12, resample=UP, skip_channels=8, channels_last=False),
    NormCase(2, 12, 4, 6, groups=3, resample=POOL, channels_last=False),
    NormCase(1, 6, 67, 129, groups=2, channels_last=False),  # more than one chunk of a plane
    NormCase(1, 9, 5, 7, groups=1, channels_last=False, modulated=False),
    NormCase(1, 64, 5, 7, misaligned=1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", VARIANTS, ids=lambda c: f"{c.channels}x{c.height}x{c.width}")
def test_variants(cuda, case, dtype):
    other = {FLOAT32: BFLOAT16, BFLOAT16: FLOAT32, FLOAT16: FLOAT16}[dtype]
    check(cuda, case._replace(dtype=dtype, modulation_dtype=other))


def test_moments_of_one_input_from_its_producer(cuda):
    for case in (NormCase(2, 96, 6, 4, skip_channels=32), LARGE._replace(skip_channels=24)):
        run = NormRun(case)
        x, skip = run.moments(cuda)
        expected = run.forward(cuda)
        for given in ((x, skip), (x, None), (None, skip)):
            got = run.forward(cuda, given)
            values = torch.from_numpy(np.array(run.values(got["y"])))
            torch.testing.assert_close(
                values, torch.from_numpy(np.array(run.values(expected["y"]))), atol=1e-5, rtol=1e-5
            )
        tensor = torch.from_numpy(np.array(run.values(run.x))).double().flatten(2)
        exact = torch.stack([tensor.mean(2), tensor.var(2, correction=0)], 1)
        assert testing.max_error(torch.from_numpy(x), exact) < 3e-7
        # They are what is used: other moments, another result.
        x += 1
        assert not np.array_equal(run.forward(cuda, (x, skip))["y"], expected["y"])


ORDERS = [(1, 1), (2, 1), (2, 7)]  # reverse, and shuffled twice


def test_same_bits_in_any_order_of_threads(cuda):
    cases = [
        NormCase(2, 96, 6, 4, BFLOAT16, resample=POOL, skip_channels=32),
        NormCase(1, 384, 3, 5, FLOAT16),
        NormCase(1, 32, 64, 65, FLOAT16),
        NormCase(1, 36, 3, 5, groups=12, resample=UP, channels_last=False),
    ]
    for case in cases:
        run = NormRun(case)

        def outputs(run=run):
            made = run.forward(cuda)
            moments = run.moments(cuda)
            made |= run.backward(cuda, made["mean"], made["rstd"])
            named = {"moments of x": moments[0], "y of moments": run.forward(cuda, moments)["y"]}
            return made | named

        cuda.schedule(0)
        expected = outputs()
        for schedule, seed in ORDERS:
            cuda.schedule(schedule, seed)
            try:
                assert_same_bits(outputs(), expected, f"{case} {schedule=} {seed=}")
            finally:
                cuda.schedule(0)


def test_an_image_does_not_depend_on_its_batch(cuda):
    for case in (NormCase(3, 96, 5, 7, BFLOAT16), NormCase(2, 64, 64, 65)):
        together = NormRun(case)
        expected = together.forward(cuda)
        expected |= together.backward(cuda, expected["mean"], expected["rstd"])
        for image in range(case.batch):
            alone = NormRun(case)
            alone.case = case._replace(batch=1)
            for name in ("x", "grad", "grad_x_out", "modulation"):
                whole = getattr(alone, name)
                one = emulated_norm.aligned((1, *whole.shape[1:]), case.dtype)
                one = one if name != "modulation" else whole[image : image + 1].copy()
                one[...] = whole[image : image + 1]
                setattr(alone, name, one)
            got = alone.forward(cuda)
            got |= alone.backward(cuda, got["mean"], got["rstd"])
            for name in ("dweight", "dbias"):  # sums over the batch
                del got[name]
            one = {
                name: array[image : image + 1]
                for name, array in expected.items()
                if array is not None
            }
            assert_same_bits(got, one, f"image {image} of {case}")


def test_only_what_is_asked_for(cuda):
    """Outputs that are not wanted change nothing about the others."""
    for case in (NormCase(2, 96, 6, 4, skip_channels=32), LARGE):
        run = NormRun(case)
        everything = run.forward(cuda)
        assert_same_bits(run.forward(cuda, wants_x=False), everything, "without x_out")
        mean, rstd = everything["mean"], everything["rstd"]
        full = run.backward(cuda, mean, rstd)
        only = run.backward(cuda, mean, rstd, (True, False, False, False))
        assert_same_bits(only, full, "input gradient only")
        for index in (1, 2, 3):
            wanted = tuple(i == index for i in range(4))
            got = run.backward(cuda, mean, rstd, wanted)
            if case is LARGE:  # else dx decides between one kernel and three
                assert_same_bits(got, full, f"{wanted=}")
        plain = run.backward(cuda, mean, rstd, residual=False)
        more = torch.from_numpy(np.array(plain["dx"]))
        more += torch.from_numpy(np.array(run.grad_x_out))[
            ..., : case.channels - case.skip_channels
        ]
        np.testing.assert_allclose(more, full["dx"], atol=1e-6)


def test_statistics_survive_a_large_mean(cuda):
    for shape in ((1, 64, 5, 7), (1, 64, 64, 65)):
        for offset in (1e2, 1e4):
            check(cuda, NormCase(*shape, offset=offset))
    for shape in ((1, 64, 12, 16), (1, 64, 64, 65)):
        run = NormRun(NormCase(*shape, modulated=False, silu=False))
        run.x[...] = 1234.567  # no variance at all
        y = run.values(run.forward(cuda)["y"])
        expected = np.broadcast_to(run.bias[:, None, None], y.shape[1:])
        np.testing.assert_allclose(y[0], expected, atol=1e-3)
        run.x[:, :2] = 0.0  # the first pixels say nothing about the rest
        x = torch.from_numpy(np.array(run.values(run.x)))
        parameters = torch.from_numpy(run.weight), torch.from_numpy(run.bias)
        exact = reference.ada_group_norm(x.double(), *(p.double() for p in parameters), silu=False)
        plain = reference.ada_group_norm(x, *parameters, silu=False)
        y = torch.from_numpy(np.array(run.values(run.forward(cuda)["y"])))
        testing.assert_as_good_as(y, plain, exact, what=f"step {shape}")


def test_nan_stays_in_its_group(cuda):
    for case in (NormCase(2, 64, 5, 7), NormCase(1, 64, 64, 65), NormCase(1, 6, 5, 7, groups=3)):
        run = NormRun(case)
        run.x[0, 3, 3, 4] = np.nan
        bad = np.isnan(run.values(run.forward(cuda)["y"])).any((2, 3))
        assert bad[0, 4:6].all() and bad.sum() == 2, case


def test_errors(cuda):
    def refuses(text, case, **changes):
        with pytest.raises(RuntimeError, match=text):
            NormRun(case)._replace(**changes) if changes else NormRun(case).forward(cuda)

    refuses("groups=33 does not divide the 64 channels", NormCase(1, 64, 3, 5, groups=33))
    refuses("even height and width, not 3 x 5", NormCase(1, 64, 3, 5)._replace(resample=POOL))
    run = NormRun(NormCase(2, 96, 6, 4, skip_channels=32))
    run.skip = None
    with pytest.raises(RuntimeError, match="skip_channels is 32"):
        run.forward(cuda)
    with pytest.raises(RuntimeError, match="skip comes with"):
        run.backward(cuda, run.weight, run.weight)
    run = NormRun(NormCase(1, 64, 64, 65))
    shape, options = run.arguments()
    with pytest.raises(RuntimeError, match="workspace is null"):
        cuda.ada_group_norm(
            shape,
            options,
            [run.x.ctypes.data, 0, run.weight.ctypes.data, run.bias.ctypes.data] + [0, 0, 0],
            [run.grad.ctypes.data, 0, 0, 0],
            0,
            0,
        )
    with pytest.raises(RuntimeError, match="a batch of 70000 images"):
        cuda.ada_group_norm_workspace((70000, *shape[1:]), options)
    with pytest.raises(RuntimeError, match="x, weight, bias and y are required"):
        cuda.ada_group_norm(shape, options, [0] * 7, [0] * 4, 0, 0)


def test_no_images(cuda):
    run = NormRun(NormCase(0, 64, 3, 5))
    made = run.forward(cuda)
    assert made["y"].shape == (0, 3, 5, 64)
    gradients = run.backward(cuda, made["mean"], made["rstd"])
    assert not gradients["dweight"].any() and not gradients["dbias"].any()


def test_under_sanitizers(compile_emulated, run_sanitized):
    """AddressSanitizer and UBSan see nothing, and the bits are those of the plain build."""
    paths = [
        compile_emulated("ada_group_norm_emulated.cpp", sanitized=True),
        emulated_cuda(compile_emulated).library._name,
    ]
    code = (
        "import sys\n"
        "from emulated_dtypes import *\n"
        "from emulated_norm import *\n"
        "checked, plain = map(EmulatedCuda, sys.argv[1:3])\n"
        "def outputs(cuda, run):\n"
        "    made = run.forward(cuda)\n"
        "    made |= run.backward(cuda, made['mean'], made['rstd'])\n"
        "    moments = run.moments(cuda)\n"
        "    return made | {'y of moments': run.forward(cuda, moments)['y']}\n"
        "cases = [\n"
        "    NormCase(2, 96, 6, 4, BFLOAT16, resample=POOL, skip_channels=32),\n"
        "    NormCase(1, 96, 3, 5, FLOAT16, resample=UP, skip_channels=64),\n"
        "    NormCase(1, 1344, 3, 3, FLOAT16),\n"
        "    NormCase(1, 2048, 2, 3, FLOAT32),\n"
        "    NormCase(1, 32, 66, 64, BFLOAT16, resample=POOL),\n"
        "    NormCase(1, 32, 63, 65, FLOAT32, modulated=False),\n"
        "    NormCase(1, 36, 4, 6, FLOAT16, groups=12, resample=POOL, skip_channels=7),\n"
        "    NormCase(1, 6, 3, 5, BFLOAT16, groups=2, resample=UP, channels_last=False),\n"
        "]\n"
        "for case in cases:\n"
        "    run = NormRun(case)\n"
        "    expected = outputs(plain, run)\n"
        "    for schedule in (0, 1, 2):\n"
        "        checked.schedule(schedule, 3)\n"
        "        assert_same_bits(outputs(checked, run), expected, f'{case} {schedule=}')\n"
        "print('no complaint')\n"
    )
    status, text = run_sanitized(code, *paths)
    assert status == 0 and "no complaint" in text, text[-3000:]


@pytest.mark.parametrize(
    "source, kernels", [("ada_group_norm_cuda.cu", 12), ("ada_group_norm_backward_cuda.cu", 13)]
)
def test_nvcc_report(nvcc_report, source, kernels):
    """No stack and no spills anywhere, and enough blocks of 256 threads on an SM."""
    reports = nvcc_report(source, {80: (80, 86, 89), 90: (90, 100, 120)})
    assert len(reports) == 6 * kernels, reports
    for report in reports:
        assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0), report
        streams = "norm_moments" in report.name or "norm_apply" in report.name
        assert report.registers * 256 * (3 if streams else 2) <= 65536, report
