"""guided_mean_update against published formulas and reference.py, both in float64."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from adm_rt import ops
from adm_rt.ops import reference
from adm_rt.ops._library import cuda_extension, extension, extension_available
from adm_rt.ops.guided_mean_update import (
    CLIPS,
    StepCoefficients,
    count_nonfinite,
    guided_mean_update,
    register,
)
from adm_rt.ops.philox import STEP_NOISE, image_seeds, philox_normal

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)

C = extension()
ISAS = C.available_cpu_isas()
FULL = StepCoefficients(
    cfg=1.5, x0_x=1.3, x0_out=-0.9, guide_x0=0.2, guide_mean=1.5, next_x=0.3, next_x0=0.6,
    next_h0=0.1, next_h1=-0.2, next_h2=0.3, state_x=0.1, state_x0=0.2, state_h0=0.5,
    state_h1=-0.4, state_h2=0.7, min_log=-5.0, max_log=-3.0, noise=0.7,
)  # fmt: skip


@pytest.fixture(params=ISAS)
def isa(request):
    previous = C.cpu_isa()
    C.set_cpu_isa(request.param)
    yield request.param
    C.set_cpu_isa(previous)


def inputs(seed, n, c, height, width, *, history=3):
    """x, model_output and all keyword inputs, float32, from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(channels):
        return torch.randn(n, channels, height, width, generator=generator)

    keywords = {
        "gradient": normal(c),
        "uncond_output": normal(2 * c),
        "history": [normal(c) for _ in range(history)],
        "noise": normal(c),
        "learned_variance": True,
    }
    return normal(c), normal(2 * c), keywords


def mapped(function, keywords):
    """keywords with function applied to every tensor."""
    return {
        name: [function(t) for t in value]
        if isinstance(value, list)
        else function(value)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in keywords.items()
    }


def exact(x, model_output, row, **keywords):
    keywords = mapped(torch.Tensor.double, keywords)
    return reference.guided_mean_update(x.double(), model_output.double(), row, **keywords)


def assert_close(got, expected, scale=1.0):
    for name, a, b in zip(("x_next", "x0", "state"), got, expected):
        if b is None:
            assert a is None, name
            continue
        error = np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
        assert error <= 3e-6 * scale, (name, error)


def assert_same(got, expected):
    for name, a, b in zip(("x_next", "x0", "state"), got, expected):
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


# ---- The samplers' updates, written out ----

BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
STEPS = [(999, 0), (700, 675), (500, 450), (40, 39), (1, 0)]


def ddpm_row(t, scale):
    before = ABAR[t - 1]
    posterior = BETAS * (1 - np.append(1, ABAR[:-1])) / (1 - ABAR)
    return StepCoefficients(
        x0_x=np.sqrt(1 / ABAR[t]),
        x0_out=-np.sqrt(1 / ABAR[t] - 1),
        guide_mean=scale,
        next_x=np.sqrt(1 - BETAS[t]) * (1 - before) / (1 - ABAR[t]),
        next_x0=BETAS[t] * np.sqrt(before) / (1 - ABAR[t]),
        min_log=np.log(posterior[max(t, 1)]),
        max_log=np.log(BETAS[t]),
        noise=1.0,
    )


@pytest.mark.parametrize("t", [999, 500, 40, 1])
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_ddpm(isa, t, scale):
    """Ho et al. 2020 equation 6-7, learned variances of Nichol & Dhariwal 2021, guided mean."""
    x, out, keywords = inputs(t, 2, 3, 8, 8)
    noise, gradient = keywords["noise"], keywords["gradient"]
    got = guided_mean_update(
        x,
        out,
        ddpm_row(t, scale),
        gradient=gradient if scale else None,
        noise=noise,
        learned_variance=True,
    )
    x64, eps, v = x.double(), out[:, :3].double(), out[:, 3:].double()
    x0 = ((x64 - np.sqrt(1 - ABAR[t]) * eps) / np.sqrt(ABAR[t])).clamp(-1, 1)
    before = ABAR[t - 1]
    mean = (BETAS[t] * np.sqrt(before) * x0 + np.sqrt(1 - BETAS[t]) * (1 - before) * x64) / (
        1 - ABAR[t]
    )
    fraction = (v + 1) / 2
    posterior = np.log(BETAS[t] * (1 - before) / (1 - ABAR[t]))
    variance = torch.exp(fraction * np.log(BETAS[t]) + (1 - fraction) * posterior)
    mean = mean + scale * variance * gradient.double()
    x_next = mean + torch.sqrt(variance) * noise.double()
    assert got[2] is None
    assert_close(got, (x_next, x0), 1 / np.sqrt(ABAR[t]))


@pytest.mark.parametrize(("t", "s"), STEPS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_guided_ddim(isa, t, s, eta):
    """Song et al. 2021 equation 12; guidance in the noise prediction, x0 not clipped again."""
    x, out, keywords = inputs(t, 2, 3, 8, 8)
    a, b, scale = ABAR[t], ABAR[s], 3.0
    sigma = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
    direction = np.sqrt(1 - b - sigma**2)
    row = StepCoefficients(
        x0_x=np.sqrt(1 / a),
        x0_out=-np.sqrt(1 / a - 1),
        guide_x0=scale * (1 - a) / np.sqrt(a),
        next_x=direction / np.sqrt(1 - a),
        next_x0=np.sqrt(b) - direction * np.sqrt(a / (1 - a)),
        noise=sigma,
    )
    gradient = 0.1 * keywords["gradient"] * np.sqrt(a)
    noise = keywords["noise"]
    got = guided_mean_update(x, out, row, gradient=gradient, noise=noise)
    x64 = x.double()
    x0 = ((x64 - np.sqrt(1 - a) * out[:, :3].double()) / np.sqrt(a)).clamp(-1, 1)
    eps = (x64 - np.sqrt(a) * x0) / np.sqrt(1 - a) - scale * np.sqrt(1 - a) * gradient.double()
    x0 = (x64 - np.sqrt(1 - a) * eps) / np.sqrt(a)
    x_next = np.sqrt(b) * x0 + direction * eps + sigma * noise.double()
    # x0 cancels x / sqrt(abar); next to t = 0, eps is x minus sqrt(abar) x0, divided by 0.01.
    assert_close(got, (x_next, x0), 1 / np.sqrt(a) + 1 / np.sqrt(1 - a))
    if t == 700:
        assert got[1].abs().max() > 1  # guidance leaves [-1, 1]


@pytest.mark.parametrize(("t", "s"), STEPS[1:3])
def test_dpmpp_2m(isa, t, s):
    """Lu et al. 2022, DPM-Solver++(2M), equation for x0 prediction."""
    x, out, keywords = inputs(t, 2, 3, 8, 8, history=1)
    r = 525 if t == 500 else 725

    def level(i):
        return np.sqrt(ABAR[i]), np.sqrt(1 - ABAR[i]), 0.5 * np.log(ABAR[i] / (1 - ABAR[i]))

    (alpha_t, sigma_t, lambda_t), (alpha_s, sigma_s, lambda_s) = level(t), level(s)
    h, ratio = lambda_s - lambda_t, (lambda_t - level(r)[2]) / (lambda_s - lambda_t)
    weight = -alpha_s * np.expm1(-h)
    row = StepCoefficients(
        x0_x=1 / alpha_t,
        x0_out=-sigma_t / alpha_t,
        next_x=sigma_s / sigma_t,
        next_x0=weight * (1 + 0.5 / ratio),
        next_h0=-weight * 0.5 / ratio,
    )
    previous = keywords["history"][0]
    got = guided_mean_update(x, out, row, history=[previous])
    x0 = ((x.double() - sigma_t * out[:, :3].double()) / alpha_t).clamp(-1, 1)
    d = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * previous.double()
    x_next = sigma_s / sigma_t * x.double() - alpha_s * (np.exp(-h) - 1) * d
    assert_close(got, (x_next, x0), 1 / alpha_t)


def test_state_and_history_as_in_unipc(isa):
    """A corrector and a predictor in one call: two forms of x, x0 and two history tensors."""
    x, out, keywords = inputs(3, 1, 3, 8, 8, history=2)
    row = StepCoefficients(
        x0_out=1.0, next_x=0.9, next_x0=0.3, next_h0=-0.15, next_h1=0.05,
        state_x=0.95, state_x0=0.2, state_h0=-0.1, state_h1=0.02,
    )  # fmt: skip
    got = guided_mean_update(x, out, row, history=keywords["history"], clip="none")
    x64, x0 = x.double(), out[:, :3].double()
    h0, h1 = (h.double() for h in keywords["history"])
    x_next = 0.9 * x64 + 0.3 * x0 - 0.15 * h0 + 0.05 * h1
    state = 0.95 * x64 + 0.2 * x0 - 0.1 * h0 + 0.02 * h1
    assert_close(got, (x_next, x0, state))


# ---- Against the reference ----


@pytest.mark.parametrize(
    ("n", "c", "height", "width"),
    [(1, 1, 1, 1), (2, 3, 1, 5), (1, 3, 7, 9), (3, 3, 16, 16), (2, 4, 33, 31), (5, 1, 64, 65)],
)
@pytest.mark.parametrize("clip", CLIPS)
def test_every_input_at_odd_sizes(isa, n, c, height, width, clip):
    x, out, keywords = inputs(11, n, c, height, width)
    got = guided_mean_update(x, out, FULL, clip=clip, quantile=0.8, **keywords)
    assert_close(got, exact(x, out, FULL, clip=clip, quantile=0.8, **keywords), 4)
    assert all(t.shape == x.shape and t.dtype == x.dtype and t.is_contiguous() for t in got)


def test_optional_inputs_one_by_one(isa):
    x, out, keywords = inputs(12, 2, 3, 8, 8)
    for left_out in ("gradient", "uncond_output", "noise", "learned_variance", "history"):
        kept = {name: value for name, value in keywords.items() if name != left_out}
        row = FULL._replace(noise=0.0) if left_out == "noise" else FULL
        assert_close(guided_mean_update(x, out, row, **kept), exact(x, out, row, **kept), 4)
    for count in range(3):
        kept = {**keywords, "history": keywords["history"][:count]}
        assert_close(guided_mean_update(x, out, FULL, **kept), exact(x, out, FULL, **kept), 4)
    narrow = {**keywords, "uncond_output": keywords["uncond_output"][:, :3]}
    assert_same(
        guided_mean_update(x, out, FULL, **narrow), guided_mean_update(x, out, FULL, **keywords)
    )


def test_classifier_free_guidance_keeps_the_conditional_variances(isa):
    x, out, keywords = inputs(13, 1, 3, 4, 4)
    row = StepCoefficients(cfg=4.0, x0_out=1.0, next_x0=1.0, min_log=-4.0, noise=1.0)
    uncond = keywords["uncond_output"]
    got = guided_mean_update(
        x, out, row, uncond_output=uncond, noise=keywords["noise"], learned_variance=True,
        clip="none",
    )  # fmt: skip
    x0 = uncond[:, :3] + 4 * (out[:, :3] - uncond[:, :3])
    deviation = torch.exp(0.5 * -4.0 * (1 - (out[:, 3:] + 1) / 2))
    assert_close(got, (x0 + deviation * keywords["noise"], x0), 10)


@pytest.mark.parametrize("quantile", [0.001, 0.25, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 100, 3 * 17 * 19, 12288])
def test_dynamic_threshold_is_torch_quantile(isa, quantile, size):
    """Per image; spread so that the quantile lies below, at and above 1."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(4, 1, 1, size, generator=generator)
    x *= torch.tensor([0.1, 0.9, 1.5, 40.0]).reshape(4, 1, 1, 1)
    row = StepCoefficients(x0_x=1.0, next_x0=1.0)
    got = guided_mean_update(x, x, row, clip="dynamic", quantile=quantile)[1]
    limit = torch.quantile(x.double().abs().flatten(1), quantile, dim=1).clamp(min=1)
    limit = limit.reshape(4, 1, 1, 1)
    expected = x.double().clamp(-limit, limit) / limit
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=3e-7, atol=1e-7)


def test_dynamic_threshold_between_a_value_below_one_and_one_above():
    x = torch.tensor([0.5, 3.0, -0.25, 0.75]).reshape(1, 1, 2, 2)
    row = StepCoefficients(x0_x=1.0, next_x0=1.0)
    x0 = guided_mean_update(x, x, row, clip="dynamic", quantile=0.8)[1]  # 0.75 + 0.4 * 2.25
    np.testing.assert_allclose(x0.flatten(), np.array([0.5, 1.65, -0.25, 0.75]) / 1.65, rtol=1e-6)


# ---- Noise ----


def test_seeds_give_the_noise_of_philox_normal(isa):
    for size in ((8, 8), (5, 7), (40, 41)):
        x, out, keywords = inputs(14, 3, 3, *size)
        seeds = image_seeds(4, 3)
        keywords["noise"] = torch.from_numpy(philox_normal(seeds, (3, *size), 6, STEP_NOISE))
        expected = guided_mean_update(x, out, FULL, **keywords)
        del keywords["noise"]
        for given in (seeds, torch.from_numpy(seeds), list(map(int, seeds))):
            assert_same(guided_mean_update(x, out, FULL, seeds=given, step=6, **keywords), expected)
        with ops.use_reference():
            slow = guided_mean_update(x, out, FULL, seeds=seeds, step=6, **keywords)
        assert_close(expected, slow, 4)


# ---- Independence ----


@pytest.mark.parametrize("clip", CLIPS)
def test_bits_do_not_depend_on_instruction_set_threads_batch_or_array_type(clip):
    x, out, keywords = inputs(15, 4, 3, 64, 61)
    keywords.update(noise=None, seeds=image_seeds(1, 4), step=3, clip=clip)
    expected = guided_mean_update(x, out, FULL, **keywords)
    threads, previous = C.num_threads(), C.cpu_isa()
    try:
        for name in ISAS:
            C.set_cpu_isa(name)
            for count in (1, 2, 3):
                C.set_num_threads(count)
                assert_same(guided_mean_update(x, out, FULL, **keywords), expected)
    finally:
        C.set_num_threads(threads)
        C.set_cpu_isa(previous)
    for i in range(4):
        one = mapped(lambda t, i=i: t[i : i + 1], keywords) | {
            "seeds": keywords["seeds"][i : i + 1]
        }
        got = guided_mean_update(x[i : i + 1], out[i : i + 1], FULL, **one)
        assert_same(got, [t[i : i + 1] for t in expected])
    arrays = mapped(torch.Tensor.numpy, keywords)
    got = guided_mean_update(x.numpy(), out.numpy(), FULL, **arrays)
    assert all(isinstance(array, np.ndarray) for array in got)
    assert_same(got, expected)


def test_layouts_and_types():
    x, out, keywords = inputs(16, 2, 3, 8, 8)
    expected = guided_mean_update(x, out, FULL, **keywords)
    last = torch.channels_last
    strided = mapped(lambda t: t.to(memory_format=last), keywords)
    got = guided_mean_update(x.to(memory_format=last), out.to(memory_format=last), FULL, **strided)
    assert_same(got, expected)
    wide = torch.randn(2, 9, 8, 8)
    wide[:, 2:8] = out
    assert_same(guided_mean_update(x, wide[:, 2:8], FULL, **keywords), expected)
    arrays = mapped(lambda t: np.asfortranarray(t.numpy()), keywords)
    got = guided_mean_update(np.asfortranarray(x.numpy()), out.numpy(), FULL, **arrays)
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_outputs_are_widened_exactly(isa, dtype):
    for size in ((8, 8), (3, 5)):
        x, out, keywords = inputs(17, 2, 3, *size)
        names = ("gradient", "uncond_output")
        half = {**keywords, **{name: keywords[name].to(dtype) for name in names}}
        widened = mapped(torch.Tensor.float, half)
        expected = guided_mean_update(x, out.to(dtype).float(), FULL, **widened)
        assert_same(guided_mean_update(x, out.to(dtype), FULL, **half), expected)
        half["uncond_output"] = widened["uncond_output"]  # mixed types
        assert_same(guided_mean_update(x, out.to(dtype), FULL, **half), expected)


def test_inputs_are_not_written():
    x, out, keywords = inputs(18, 1, 3, 8, 8)
    before = [t.clone() for t in (x, out, keywords["gradient"], keywords["noise"])]
    guided_mean_update(x, out, FULL, clip="dynamic", **keywords)
    for a, b in zip((x, out, keywords["gradient"], keywords["noise"]), before):
        assert torch.equal(a, b)


# ---- Not finite ----


@pytest.mark.parametrize("clip", CLIPS)
def test_nan_comes_through(isa, clip):
    for place in ("x", "out", "v", "gradient", "noise", "history"):
        x, out, keywords = inputs(19, 3, 3, 8, 8)
        target = {"x": x, "out": out, "v": out[:, 3:], "history": keywords["history"][1]}
        target = target.get(place, keywords.get(place))
        target[1, 2, 3, 4] = float("nan")
        x_next = guided_mean_update(x, out, FULL, clip=clip, **keywords)[0]
        counts = count_nonfinite(x_next)
        assert counts[1] >= 1 and counts[0] == counts[2] == 0, (place, counts)


def test_infinite_prediction_with_dynamic_threshold_is_not_hidden():
    x, out, keywords = inputs(20, 2, 3, 8, 8)
    out[0, :3] = float("inf")
    x_next = guided_mean_update(x, out, FULL, clip="dynamic", **keywords)[0]
    assert list(count_nonfinite(x_next) > 0) == [True, False]


def test_count_nonfinite(isa):
    x = np.zeros((3, 3, 37, 5), np.float32)
    x[0, 0, 0, 0], x[2, 1], x[1, 2, 36, 4] = np.nan, np.inf, -np.inf
    expected = [1, 1, 37 * 5]
    for given in (x, torch.from_numpy(x), x.astype(np.float64), torch.from_numpy(x).double()):
        counts = count_nonfinite(given)
        assert counts.dtype == np.int64 and list(counts) == expected
    assert list(count_nonfinite(np.asfortranarray(x)[:, :, ::2])) == [1, 1, 19 * 5]
    assert list(count_nonfinite(x[:0])) == []


# ---- The reference path, torch's registration ----


def test_float64_use_reference_and_grad_take_the_reference():
    x, out, keywords = inputs(21, 1, 3, 4, 4)
    expected = exact(x, out, FULL, **keywords)
    got = guided_mean_update(
        x.double(), out.double(), FULL, **mapped(torch.Tensor.double, keywords)
    )
    assert_same(got, expected)
    arrays = mapped(torch.Tensor.numpy, keywords)
    assert_same(guided_mean_update(x.numpy().astype(float), out.numpy(), FULL, **arrays), expected)
    with ops.use_reference():
        plain = reference.guided_mean_update(x, out, FULL, **keywords)
        assert_same(guided_mean_update(x, out, FULL, **keywords), plain)
    x.requires_grad_()
    x_next = guided_mean_update(x, out, FULL, clip="none", **keywords)[0]
    x_next.sum().backward()
    np.testing.assert_allclose(x.grad, FULL.next_x + FULL.next_x0 * FULL.x0_x, rtol=1e-5)
    with torch.no_grad():
        assert not guided_mean_update(x, out, FULL, **keywords)[0].requires_grad


def test_opcheck():
    op = register()
    x, out, keywords = inputs(22, 2, 3, 4, 4)
    for row, uncond, history in (
        (FULL, keywords["uncond_output"], keywords["history"]),
        (StepCoefficients(x0_out=1.0, next_x0=1.0), None, []),
    ):
        arguments = (x, out, list(row), keywords["gradient"], uncond, history, None)
        arguments += (torch.tensor([1, 2]), 3, True, "static", 0.9)
        torch.library.opcheck(op, arguments)
    assert torch.ops.adm_rt.guided_mean_update.default is op
    meta = [t.to("meta") for t in (x, out)]
    x_next, x0, state = guided_mean_update(*meta, StepCoefficients(next_x0=1.0))
    assert x_next.shape == x0.shape == x.shape and x_next.is_meta and state is None


def test_numpy_arrays_need_no_torch():
    program = (
        "import sys, numpy as np\n"
        "from adm_rt.ops.guided_mean_update import StepCoefficients, guided_mean_update\n"
        "x = np.zeros((1, 3, 4, 4), np.float32)\n"
        "row = StepCoefficients(x0_out=1.0, next_x0=1.0, noise=1.0)\n"
        "print(guided_mean_update(x, x, row, seeds=[1])[0].std() > 0.5, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


# ---- Bad input ----

X = torch.zeros(2, 3, 4, 4)
OUT = torch.zeros(2, 6, 4, 4)
ROW = StepCoefficients(x0_out=1.0, next_x0=1.0)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((X[0], OUT, ROW), {}, r"x must be \[N, C, H, W\]; it is of shape \[3, 4, 4\]"),
        (("x", OUT, ROW), {}, "x must be .* it is str"),
        ((X.half(), OUT, ROW), {}, "x is torch.float16; allowed: float32"),
        ((X.int(), OUT, ROW), {}, "x is torch.int32"),
        ((X, OUT[:, :4], ROW), {}, r"model_output is \[2, 4, 4, 4\].* 3 or 6 channels"),
        ((X, OUT[:1], ROW), {}, "model_output is"),
        ((X, OUT.long(), ROW), {}, "model_output is torch.int64"),
        ((X, OUT.numpy(), ROW), {}, "model_output is a ndarray and x a Tensor"),
        ((X.numpy(), OUT, ROW), {}, "model_output is a Tensor and x a ndarray"),
        ((X, OUT.to("meta"), ROW), {}, "model_output is on meta and x on cpu"),
        ((X, OUT, ROW), {"gradient": OUT}, r"gradient is \[2, 6, 4, 4\].* 3 channels"),
        ((X, OUT, ROW), {"noise": X[..., :3]}, "noise is"),
        ((X, OUT, ROW), {"history": [X, X[:1]]}, r"history\[1\] is \[1, 3"),
        ((X, OUT, ROW), {"history": [X] * 4}, "more than three"),
        ((X, OUT[:, :3], ROW), {"learned_variance": True}, "needs model_output with 6 channels"),
        ((X, OUT, ROW), {"clip": "soft"}, "clip is 'soft'; allowed: 'none', 'static', 'dynamic'"),
        ((X, OUT, ROW), {"quantile": 0.0}, "quantile is 0.0; allowed"),
        ((X, OUT, ROW), {"quantile": float("nan")}, "quantile is nan"),
        ((X, OUT, list(ROW)), {}, "coefficients is a list; make a StepCoefficients"),
        ((X, OUT, ROW._replace(next_x=float("nan"))), {}, "coefficients.next_x is nan"),
        ((X, OUT, ROW._replace(cfg=float("-inf"))), {}, "coefficients.cfg is -inf"),
        ((X, OUT, ROW._replace(noise=1.0)), {}, "neither noise nor seeds"),
        ((X, OUT, ROW), {"noise": X, "seeds": [1, 2]}, "both given"),
        ((X, OUT, ROW), {"seeds": [1]}, "seeds has 1 entries for a batch of 2"),
        ((X, OUT, ROW), {"seeds": [0.5, 1]}, "one-dimensional array of integers"),
        ((X, OUT, ROW), {"step": -1}, "step is -1; allowed"),
    ],
)
def test_bad_input(arguments, keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        guided_mean_update(*arguments, **keywords)


def test_coefficients():
    assert list(FULL.row()) == list(FULL) and FULL.row().dtype == np.float64
    assert len(FULL) == 18 and FULL.has_state
    assert not ROW.has_state and StepCoefficients(state_h2=1e-9).has_state


def test_cuda_without_its_module_says_why(monkeypatch):
    """The message, not the device: there is no CUDA tensor to be had here."""
    monkeypatch.setitem(sys.modules, "adm_rt._cuda", None)
    cuda_extension.cache_clear()
    try:
        with pytest.raises(ImportError, match="ADM_RT_CUDA=on pip install"):
            cuda_extension()
    finally:
        cuda_extension.cache_clear()
