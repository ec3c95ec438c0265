"""ada_group_norm backward: against float64 autograd of reference.py, and what is not computed."""

import importlib

import pytest
import torch

from adm_rt import ops, testing
from adm_rt.ops import reference
from adm_rt.ops._library import extension

module = importlib.import_module("adm_rt.ops._ada_group_norm_torch")

ISAS = extension().available_cpu_isas()
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LAYOUT_IDS = ["nchw", "nhwc"]
NAMES = ("dx", "dweight", "dbias", "dscale_shift")


def inputs(shape, layout=torch.contiguous_format, dtype=torch.float32, modulated=True, seed=0):
    """([x, weight, bias(, scale_shift)], grad)."""
    g = torch.Generator().manual_seed(seed)
    n, channels = shape[:2]
    x = (torch.randn(shape, generator=g) * 1.5 + 0.7).to(dtype)
    grad = torch.randn(shape, generator=g).to(dtype)
    if layout == torch.channels_last:
        x, grad = x.to(memory_format=layout), grad.to(memory_format=layout)
    tensors = [x, 1 + 0.2 * torch.randn(channels, generator=g), torch.randn(channels, generator=g)]
    if modulated:
        tensors.append(0.3 * torch.randn(n, 2 * channels, generator=g))
    return tensors, grad


def gradients(function, tensors, grad, **options):
    tensors = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors, **options), tensors, grad)


def check(tensors, grad, **options):
    exact = gradients(
        reference.ada_group_norm, [t.double() for t in tensors], grad.double(), **options
    )
    plain = gradients(reference.ada_group_norm, tensors, grad, **options)
    found = gradients(ops.ada_group_norm, tensors, grad, **options)
    for name, f, p, e, t in zip(NAMES, found, plain, exact, tensors, strict=False):
        assert f.dtype == t.dtype and f.shape == t.shape
        # Sums over a batch of images: plain torch happens to be lucky in some of them.
        testing.assert_as_good_as(f, p, e, floor=3e-6, what=f"{name} {options}")
    assert found[0].stride() == tensors[0].stride()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(
    "shape", [(2, 96, 5, 7), (1, 2048, 3, 3), (3, 64, 16, 16), (1, 32, 67, 65)]
)
def test_against_float64(shape, layout, isa):
    with testing.cpu_settings(isa):
        for modulated in (True, False):
            for silu in (True, False):
                check(*inputs(shape, layout, modulated=modulated), silu=silu)


@pytest.mark.parametrize("isa", ISAS)
def test_other_ranks(isa):
    with testing.cpu_settings(isa):
        for shape in ((2, 128), (2, 96, 1), (2, 96, 65), (1, 64, 3, 5, 2)):
            check(*inputs(shape))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_bfloat16(layout, isa):
    with testing.cpu_settings(isa):
        for silu in (True, False):
            check(*inputs((2, 96, 5, 7), layout, torch.bfloat16), silu=silu)


def test_gradient_layout_may_differ_from_the_input():
    tensors, grad = inputs((2, 64, 6, 5))
    expected = gradients(ops.ada_group_norm, tensors, grad)
    for other in (grad.to(memory_format=torch.channels_last), grad.mT.contiguous().mT):
        for a, b in zip(gradients(ops.ada_group_norm, tensors, other), expected, strict=True):
            assert torch.equal(a, b)
    by_pixel = [tensors[0].to(memory_format=torch.channels_last), *tensors[1:]]
    for a, b in zip(gradients(ops.ada_group_norm, by_pixel, grad), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    one = torch.ones(()).expand_as(tensors[0])  # what y.sum() sends back
    for a, b in zip(
        gradients(ops.ada_group_norm, tensors, one),
        gradients(ops.ada_group_norm, tensors, one.contiguous()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_only_wanted_gradients_are_computed(monkeypatch):
    """The classifier's input gradient makes no parameter gradients, for one."""
    calls = []
    kernels = extension()

    class Spy:
        ada_group_norm = staticmethod(kernels.ada_group_norm)

        @staticmethod
        def ada_group_norm_backward(*args):
            calls.append([pointer != 0 for pointer in args[8:12]])
            kernels.ada_group_norm_backward(*args)

    monkeypatch.setattr(module, "extension", lambda: Spy)
    tensors, grad = inputs((2, 64, 4, 4))
    everything = gradients(ops.ada_group_norm, tensors, grad)
    for layout in LAYOUTS:
        for index in range(4):
            asked = [t.detach() for t in tensors]
            asked[0] = asked[0].to(memory_format=layout)
            asked[index].requires_grad_()
            y = ops.ada_group_norm(*asked)
            (found,) = torch.autograd.grad(y, asked[index], grad)
            assert calls[-1] == [i == index for i in range(4)]
            torch.testing.assert_close(found, everything[index], atol=1e-5, rtol=1e-5)
            if layout == torch.contiguous_format:
                assert torch.equal(found, everything[index])


def test_nothing_is_recorded_when_no_gradient_is_needed():
    (x, weight, bias, scale_shift), _ = inputs((1, 64, 4, 4))
    assert ops.ada_group_norm(x, weight, bias, scale_shift).grad_fn is None
    weight.requires_grad_()
    with torch.no_grad():
        assert ops.ada_group_norm(x, weight, bias, scale_shift).grad_fn is None
    assert ops.ada_group_norm(x, weight, bias, scale_shift).requires_grad


def test_low_precision_parameters_get_their_gradients_back():
    tensors, grad = inputs((2, 64, 4, 4))
    tensors = [t.bfloat16() for t in tensors]
    found = gradients(ops.ada_group_norm, tensors, grad.bfloat16())
    exact = gradients(reference.ada_group_norm, [t.double() for t in tensors], grad.double())
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == torch.bfloat16 and testing.max_error(f, e) < 1e-2


def test_second_derivatives_take_the_reference_path():
    tensors, grad = inputs((1, 64, 3, 3))

    def penalty(function, tensors, grad):
        tensors = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*tensors), tensors, grad, create_graph=True)
        return first, torch.autograd.grad(sum((g**2).sum() for g in first), tensors)

    first, second = penalty(ops.ada_group_norm, tensors, grad)
    exact = penalty(reference.ada_group_norm, [t.double() for t in tensors], grad.double())
    for found, expected in zip((*first, *second), (*exact[0], *exact[1]), strict=True):
        assert testing.max_error(found, expected) < 1e-4


def test_reference_path_gradcheck():
    tensors, _ = inputs((2, 8, 2, 3))
    tensors = [t.double().requires_grad_() for t in tensors]

    def function(*args):
        return ops.ada_group_norm(*args, groups=4)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_torch_library():
    (x, weight, bias, scale_shift), grad = inputs((2, 64, 3, 5))
    forward = torch.ops.adm_rt.ada_group_norm_with_moments.default
    _, mean, rstd = forward(x, weight, bias, scale_shift, 32, 1e-5, True)
    backward = torch.ops.adm_rt.ada_group_norm_backward.default
    common = (mean, rstd, weight, bias)
    for args in (
        (grad, x, *common, scale_shift, 32, True, [True] * 4),
        (grad, x.to(memory_format=torch.channels_last), *common, scale_shift, 32, True, [True] * 4),
        (grad, x, *common, None, 32, False, [True, False, False, True]),
    ):
        torch.library.opcheck(backward, args)
