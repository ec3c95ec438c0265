"""ada_group_norm forward: every kernel against reference.py in float64, and its guarantees."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from adm_rt import ops, testing
from adm_rt.models.parameter_shapes import parameter_shapes
from adm_rt.models.presets import PRESETS
from adm_rt.ops import reference
from adm_rt.ops._library import extension

module = importlib.import_module("adm_rt.ops.ada_group_norm")
torch_side = importlib.import_module("adm_rt.ops._ada_group_norm_torch")

ISAS = extension().available_cpu_isas()
# Every number of channels that an ADM network normalises: groups of 1 to 64 channels.
CHANNELS = [32, 64, 96, 128, 192, 256, 384, 512, 576, 768, 960, 1024, 1152, 1280, 1344, 1536, 1792]
CHANNELS += [2048]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LAYOUT_IDS = ["nchw", "nhwc"]


def inputs(shape, layout=torch.contiguous_format, dtype=torch.float32, seed=0, offset=1.0):
    """x, weight, bias, scale_shift of that shape; channels differ in mean and spread."""
    g = torch.Generator().manual_seed(seed)
    n, channels = shape[:2]
    spread = torch.rand(channels, generator=g).reshape(1, -1, *[1] * (len(shape) - 2)) + 0.5
    x = (torch.randn(shape, generator=g) * spread + offset * spread).to(dtype)
    if layout == torch.channels_last:
        x = x.to(memory_format=layout)
    weight = 1 + 0.2 * torch.randn(channels, generator=g)
    bias = 0.3 * torch.randn(channels, generator=g)
    return x, weight, bias, 0.3 * torch.randn(n, 2 * channels, generator=g)


def check(x, weight, bias, scale_shift, what="", **options):
    """Kernel against float64, with the plain torch sequence as the measure; returns y."""
    doubles = [None if t is None else t.double() for t in (x, weight, bias, scale_shift)]
    exact = reference.ada_group_norm(*doubles, **options)
    plain = reference.ada_group_norm(x, weight, bias, scale_shift, **options)
    y = ops.ada_group_norm(x, weight, bias, scale_shift, **options)
    assert y.dtype == x.dtype and y.shape == x.shape
    testing.assert_as_good_as(y, plain, exact, what=what)
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_channel_count(channels, layout, isa):
    x, weight, bias, scale_shift = inputs((2, channels, 5, 7), layout, seed=channels)
    with testing.cpu_settings(isa):
        for modulation in (None, scale_shift):
            for silu in (True, False):
                y = check(
                    x, weight, bias, modulation, f"{modulation is not None=} {silu=}", silu=silu
                )
                assert y.is_contiguous(memory_format=layout)


def test_channel_list_covers_the_released_networks():
    found = set()
    for cfg in PRESETS.values():  # in these networks the one-dimensional weights are the norms'
        shapes = parameter_shapes(cfg)
        found |= {s[0] for name, s in shapes.items() if name.endswith(".weight") and len(s) == 1}
    assert len(found) > 10 and found <= set(CHANNELS)


def test_benchmark_shapes_are_those_of_the_network():
    norms, attentions = testing.network_cases("64x64_diffusion")
    assert set(testing.ADA_GROUP_NORM_64) <= set(norms)
    assert set(testing.ATTENTION_64[:3]) == set(attentions)


SHAPES = [(2, 64), (2, 64, 1), (1, 96, 65), (3, 64, 4, 4), (1, 64, 1, 33), (2, 64, 3, 5, 2)]
# More than one block of the statistics per plane, and per image in rows.
SHAPES += [(1, 32, 67, 129), (1, 192, 64, 64)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, isa):
    with testing.cpu_settings(isa):
        check(*inputs(shape))
        if len(shape) == 4:
            check(*inputs(shape, torch.channels_last))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_bfloat16(layout, isa):
    with testing.cpu_settings(isa):
        for shape in ((2, 96, 5, 7), (1, 64, 16, 16)):
            for silu in (True, False):
                args = inputs(shape, layout, torch.bfloat16)
                y = check(*args, silu=silu)
                assert y.is_contiguous(memory_format=layout)
                # One rounding at the end: half a unit of the last of 8 bits, and no more.
                exact = reference.ada_group_norm(*(t.double() for t in args), silu=silu)
                assert bool(((y.double() - exact).abs() <= 0.00391 * exact.abs() + 1e-6).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_statistics_survive_a_large_mean(layout, isa):
    """Variances of a sum-of-squares formula would be lost here; so would those of float32 sums."""
    with testing.cpu_settings(isa):
        for offset in (1e2, 1e4):
            check(*inputs((1, 64, 48, 48), layout, offset=offset), what=f"{offset=}")
        x, weight, bias, _ = inputs((1, 64, 48, 48), layout)
        x[:, :, :20] = 0.0  # the first blocks say nothing about the rest
        x[:, :, 20:] += 1e3
        check(x, weight, bias, None, what="step")
        constant = torch.full_like(x, 1234.567)
        y = ops.ada_group_norm(constant, weight, bias, silu=False)
        torch.testing.assert_close(y, bias.reshape(1, -1, 1, 1).expand_as(y), atol=1e-3, rtol=0)


def test_nan_stays_in_its_group():
    x, weight, bias, scale_shift = inputs((2, 64, 8, 8))
    x[0, 5, 3, 3] = float("nan")
    y = ops.ada_group_norm(x, weight, bias, scale_shift)
    bad = torch.isnan(y).flatten(2).any(2)
    assert bad[0, 4:6].all() and int(bad.sum()) == 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_threads_and_batch(dtype, layout, isa):
    x, weight, bias, scale_shift = inputs((3, 96, 33, 31), layout, dtype)
    grad = inputs((3, 96, 33, 31), layout, dtype, seed=1)[0]

    def run(x, scale_shift, grad):
        x = x.detach().requires_grad_()
        scale_shift = scale_shift.detach().requires_grad_()
        y = ops.ada_group_norm(x, weight, bias, scale_shift)
        return (y.detach(), *torch.autograd.grad(y, (x, scale_shift), grad))

    with testing.cpu_settings(isa, threads=1) as kernels:
        expected = run(x, scale_shift, grad)
        for threads in (2, 3):
            kernels.set_num_threads(threads)
            for a, b in zip(run(x, scale_shift, grad), expected, strict=True):
                assert torch.equal(a, b), f"{threads=}"
        for i in range(3):
            alone = run(x[i : i + 1], scale_shift[i : i + 1], grad[i : i + 1])
            for a, b in zip(alone, expected, strict=True):
                assert torch.equal(a[0], b[i]), f"image {i} alone"


def test_strides():
    """Slices, permuted and expanded inputs give what their dense copies give."""
    x, weight, bias, scale_shift = inputs((2, 64, 6, 10))
    expected = ops.ada_group_norm(x, weight, bias, scale_shift)
    wide = torch.zeros(2, 64, 6, 20)
    wide[..., ::2] = x
    joined = torch.cat([torch.ones(2, 7), scale_shift, torch.ones(2, 3)], dim=1)
    transposed = scale_shift.t().contiguous().t()
    params = torch.stack([weight, bias], dim=1)
    for got in (
        ops.ada_group_norm(wide[..., ::2], weight, bias, scale_shift),
        ops.ada_group_norm(x, weight, bias, joined[:, 7:-3]),
        ops.ada_group_norm(x, weight, bias, transposed),
        ops.ada_group_norm(x, params[:, 0], params[:, 1], scale_shift),
        ops.ada_group_norm(
            x.transpose(2, 3).contiguous().transpose(2, 3), weight, bias, scale_shift
        ),
    ):
        assert torch.equal(got, expected)
    row = scale_shift[:1].expand(2, -1)
    assert torch.equal(
        ops.ada_group_norm(x, weight, bias, row), ops.ada_group_norm(x, weight, bias, row.clone())
    )


def test_other_dtypes_take_the_reference_path():
    x, weight, bias, scale_shift = inputs((2, 64, 4, 4))
    y = ops.ada_group_norm(*(t.double() for t in (x, weight, bias, scale_shift)))
    assert y.dtype == torch.float64
    half = ops.ada_group_norm(x.half(), weight, bias, scale_shift)
    assert half.dtype == torch.float16 and testing.max_error(half, y) < 2e-3
    low = ops.ada_group_norm(*(t.bfloat16() for t in (x, weight, bias, scale_shift)))
    assert low.dtype == torch.bfloat16 and testing.max_error(low, y) < 2e-2


def test_no_images():
    x, weight, bias, scale_shift = inputs((2, 64, 4, 4))
    weight.requires_grad_()
    y = ops.ada_group_norm(x[:0], weight, bias, scale_shift[:0])
    assert y.shape == (0, 64, 4, 4)
    (dweight,) = torch.autograd.grad(y, weight, torch.empty_like(y))
    assert torch.equal(dweight, torch.zeros(64))
    assert ops.ada_group_norm(x[:0].double(), weight, bias, scale_shift[:0]).shape == y.shape
    assert ops.ada_group_norm(x[:0].numpy(), bias.numpy(), bias.numpy()).shape == y.shape
    with pytest.raises(ValueError, match="number of pixels is 0"):
        ops.ada_group_norm(x[..., :0], weight, bias, scale_shift)


def test_use_reference_does_not_call_the_kernels(monkeypatch):
    x, weight, bias, scale_shift = inputs((1, 64, 4, 4))
    for place in (module, torch_side):
        monkeypatch.setattr(place, "extension", lambda: pytest.fail("the kernels were called"))
    with ops.use_reference():
        expected = reference.ada_group_norm(x, weight, bias, scale_shift)
        assert torch.equal(ops.ada_group_norm(x, weight, bias, scale_shift), expected)
        arrays = [t.numpy() for t in (x, weight, bias, scale_shift)]
        assert np.array_equal(ops.ada_group_norm(*arrays), expected.numpy())


def test_numpy_gives_the_bits_of_torch():
    for layout in LAYOUTS:
        tensors = inputs((2, 96, 5, 7), layout)
        expected = ops.ada_group_norm(*tensors)
        y = ops.ada_group_norm(*(t.numpy() for t in tensors))
        assert isinstance(y, np.ndarray) and np.array_equal(y, expected.numpy())
        assert y.strides == tensors[0].numpy().strides
    x, weight, bias, _ = (t.numpy() for t in inputs((2, 64, 9)))
    assert np.array_equal(
        ops.ada_group_norm(x[:, :, ::2], weight, bias, silu=False),
        ops.ada_group_norm(x[:, :, ::2].copy(), weight, bias, silu=False),
    )
    assert ops.ada_group_norm(x[:0], weight, bias).shape == (0, 64, 9)


def test_numpy_needs_no_torch():
    code = (
        "import numpy as np, sys\n"
        "from adm_rt import ops\n"
        "one = np.ones(32, np.float32)\n"
        "y = ops.ada_group_norm(np.ones((1, 32, 4, 4), np.float32), one, one, silu=False)\n"
        "assert y.shape == (1, 32, 4, 4) and np.allclose(y, 1), y\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_library():
    x, weight, bias, scale_shift = inputs((2, 64, 3, 5))
    module.register()
    op = torch.ops.adm_rt.ada_group_norm.default
    with_moments = torch.ops.adm_rt.ada_group_norm_with_moments.default
    for args in (
        (x, weight, bias, scale_shift, 32, 1e-5, True),
        (x.to(memory_format=torch.channels_last), weight, bias, None, 32, 1e-5, False),
        (x.transpose(2, 3), weight, bias, scale_shift, 16, 1e-5, True),
        (x.bfloat16(), weight, bias, scale_shift, 32, 1e-5, True),
    ):
        torch.library.opcheck(op, args)
        torch.library.opcheck(with_moments, args)
        assert torch.equal(op(*args), with_moments(*args)[0])
    y = ops.ada_group_norm(*(t.to("meta") for t in (x, weight, bias, scale_shift)))
    assert y.shape == x.shape and y.is_meta


def test_export_keeps_the_op():
    class Norm(torch.nn.Module):
        def forward(self, x, weight, bias, scale_shift):
            return ops.ada_group_norm(x, weight, bias, scale_shift)

    args = inputs((2, 64, 3, 5))
    with torch.no_grad():
        program = torch.export.export(Norm(), args, strict=False)
        assert "adm_rt.ada_group_norm" in str(program.graph)
        assert torch.equal(program.module()(*args), ops.ada_group_norm(*args))


def test_bad_inputs():
    x, weight, bias, scale_shift = inputs((2, 64, 3, 5))
    numpy_args = [t.numpy() for t in (x, weight, bias, scale_shift)]
    cases = [
        (ValueError, "groups=33", dict(groups=33)),
        (ValueError, "groups=0", dict(groups=0)),
        (ValueError, "eps=-1", dict(eps=-1.0)),
        (ValueError, "eps=nan", dict(eps=float("nan"))),
    ]
    for error, text, options in cases:
        for args in ((x, weight, bias, scale_shift), numpy_args):
            with pytest.raises(error, match=text):
                ops.ada_group_norm(*args, **options)
    for index, value, text in (
        (0, torch.ones(64), r"x has shape \(64,\)"),
        (1, weight[:32], r"weight has shape \(32,\)"),
        (2, bias[None], r"bias has shape \(1, 64\)"),
        (3, scale_shift[:, :64], r"scale_shift has shape \(2, 64\)"),
        (3, scale_shift[:1], r"needs \(2, 128\)"),
    ):
        args = [x, weight, bias, scale_shift]
        args[index] = value
        with pytest.raises(ValueError, match=text):
            ops.ada_group_norm(*args)
        with pytest.raises(ValueError, match=text):
            ops.ada_group_norm(*(t.numpy() for t in args))
    with pytest.raises(TypeError, match="x is list"):
        ops.ada_group_norm([1.0], weight, bias)
    with pytest.raises(TypeError, match="x is float64"):
        ops.ada_group_norm(numpy_args[0].astype(np.float64), *numpy_args[1:])
    with pytest.raises(TypeError, match="weight is Tensor"):
        ops.ada_group_norm(numpy_args[0], weight, *numpy_args[2:])
    with pytest.raises(TypeError, match="weight is ndarray"):
        ops.ada_group_norm(x, numpy_args[1], bias)
    with pytest.raises(TypeError, match="bias is list"):
        ops.ada_group_norm(x, weight, [0.0] * 64)
    with pytest.raises(TypeError, match="x is torch.int64"):
        ops.ada_group_norm(x.long(), weight, bias)


def test_a_missing_extension_names_the_build_command(monkeypatch):
    from adm_rt.ops import _library

    x, weight, bias, _ = inputs((1, 32, 2, 2))
    monkeypatch.setitem(sys.modules, "adm_rt._C", None)  # makes the import fail
    _library.extension.cache_clear()
    try:
        with pytest.raises(ImportError, match="pip install"):
            ops.ada_group_norm(x, weight, bias)
        with pytest.raises(ImportError, match="pip install"):
            ops.ada_group_norm(*(t.numpy() for t in (x, weight, bias)))
    finally:
        monkeypatch.undo()
        _library.extension.cache_clear()


def test_register_torch_ops_defines_all_three():
    code = (
        "from adm_rt.ops._library import register_torch_ops\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "register_torch_ops(); register_torch_ops()\n"
        "import torch\n"
        "for name in ('ada_group_norm', 'qkv_attention', 'guided_mean_update'):\n"
        "    assert hasattr(torch.ops.adm_rt, name), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
