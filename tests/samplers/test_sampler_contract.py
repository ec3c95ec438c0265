"""What every entry of SAMPLERS must do; a new sampler is tested by being registered."""

import numpy as np
import pytest
import torch

from adm_rt import ops
from adm_rt.diffusion import guidance
from adm_rt.samplers import SAMPLERS

SHAPE = (4, 3, 4, 4)
LABELS = np.array([1, 1, 1, 1])
STEPS = 7


@pytest.fixture(params=sorted(SAMPLERS))
def sampler(request):
    return SAMPLERS[request.param]


def start(dtype=np.float64):
    return np.random.default_rng(5).standard_normal(SHAPE).astype(dtype)


SEEDS = np.array([3, 1 << 33, 5, (7 << 32) | 2], dtype=np.int64)


def options(sampler):
    """Arguments with which the sampler draws noise if it ever does."""
    return {"noise": SEEDS, **({"eta": 0.7} if sampler.uses_eta else {})}


def test_registry_facts(sampler):
    assert SAMPLERS[sampler.name] is sampler
    assert sampler.summary and sampler.ode_order in (0, 1, 2, 3)
    assert sampler.needs_noise == (sampler.ode_order == 0)


def test_unknown_sampler_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'dpmpp_2m'"):
        SAMPLERS["dpmpp2m"]
    assert "dpmpp2m" not in SAMPLERS


def test_one_evaluation_per_step_and_no_classifier_when_unguided(process, wavy_engine, sampler):
    engine = wavy_engine(6)
    got = sampler(engine, start(), process(str(STEPS)), **options(sampler))
    assert got.shape == SHAPE and got.dtype == np.float64 and np.isfinite(got).all()
    assert len(engine.calls("denoise")) == STEPS and not engine.calls("gradient")


@pytest.mark.parametrize("steps", ["1", "2", "3"])
def test_few_steps(process, wavy_engine, sampler, steps):
    engine = wavy_engine(6)
    got = sampler(engine, start(), process(steps), LABELS, 2.0, **options(sampler))
    assert np.isfinite(got).all() and len(engine.calls("gradient")) == int(steps)


def test_the_input_is_left_alone(process, wavy_engine, sampler):
    x = start()
    sampler(wavy_engine(6), x, process("3"), LABELS, 2.0, **options(sampler))
    np.testing.assert_array_equal(x, start())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("clip", "target"),
    [("static", "eps"), ("dynamic", "eps"), ("none", "xstart"), ("static", "previous_x")],
)
def test_torch_equals_numpy(process, wavy_engine, sampler, clip, target, dtype):
    diffusion = process(str(STEPS), target)
    more = {**options(sampler), "clip": clip, "quantile": 0.9}
    ours = sampler(wavy_engine(6), start(dtype), diffusion, LABELS, 2.0, **more)
    theirs = sampler(
        wavy_engine(6), torch.from_numpy(start(dtype)), diffusion, torch.tensor(LABELS), 2.0, **more
    )
    assert isinstance(theirs, torch.Tensor) and theirs.numpy().dtype == ours.dtype == dtype
    tolerance = 1e-3 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=tolerance, atol=tolerance)


def test_float32_is_close_to_float64(process, wavy_engine, sampler):
    diffusion = process(str(STEPS))
    results = [
        sampler(wavy_engine(6, gain=0.5), start(dtype), diffusion, LABELS, 0.5, **options(sampler))
        for dtype in (np.float32, np.float64)
    ]
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-3)


def test_images_do_not_depend_on_the_batch(process, wavy_engine, sampler):
    diffusion = process(str(STEPS))
    x = start(np.float32)

    def run(rows):
        more = {**options(sampler), "noise": SEEDS[rows]}
        return sampler(wavy_engine(6), x[rows], diffusion, LABELS[rows], 2.0, **more)

    whole = run(slice(0, 4))
    parts = [run(slice(0, 1)), run(slice(1, 4))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_seeds_are_the_op_s_philox_noise(process, wavy_engine, sampler):
    diffusion = process(str(STEPS))
    noise = np.stack([ops.philox_normal(SEEDS, SHAPE[1:], step=k, purpose=1) for k in range(STEPS)])
    by_seed, by_array = (
        sampler(wavy_engine(6), start(), diffusion, **{**options(sampler), "noise": n})
        for n in (SEEDS, noise.astype(np.float64))
    )
    np.testing.assert_allclose(by_seed, by_array, rtol=1e-6, atol=1e-6)
    other = sampler(wavy_engine(6), start(), diffusion, **{**options(sampler), "noise": SEEDS + 1})
    draws = sampler.needs_noise or sampler.uses_eta
    assert np.array_equal(other, by_seed) != draws


def test_fresh_noise_differs_between_runs(process, wavy_engine, sampler):
    more = {**options(sampler), "noise": None}
    first, second = (sampler(wavy_engine(6), start(), process("3"), **more) for _ in range(2))
    assert np.array_equal(first, second) != (sampler.needs_noise or sampler.uses_eta)


def test_callback_sees_every_step_and_can_stop(process, wavy_engine, sampler):
    diffusion = process(str(STEPS))
    seen = []

    def callback(step, total, t, x0):
        seen.append((step, total, t, x0))
        return None if step < 2 else False

    engine = wavy_engine(6)
    got = sampler(engine, start(), diffusion, callback=callback, **options(sampler))
    assert [s[:2] for s in seen] == [(0, STEPS), (1, STEPS), (2, STEPS)]
    assert len(engine.calls("denoise")) == 3
    assert got is seen[-1][3] and got.shape == SHAPE
    times = [s[2] for s in seen]
    assert all(isinstance(t, float) for t in times)
    assert times == sorted(times, reverse=not sampler.encodes)
    assert times[0] == (0.0 if sampler.encodes else 999.0)


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_guidance_interval_and_every(process, wavy_engine, sampler, every):
    diffusion = process("11")
    engine = wavy_engine(6)
    interval = (200, 700)
    sampler(
        engine,
        start(),
        diffusion,
        LABELS,
        1.0,
        guidance_interval=interval,
        guidance_every=every,
        **options(sampler),
    )
    times = [t for _, t, _ in engine.calls("denoise")]
    guided = [t for t in times if 200 <= t <= 700]
    assert 0 < len(guided) < len(times) == 11
    assert [t for _, t, _ in engine.calls("gradient")] == guided[::every]


def test_interval_around_everything_changes_nothing(process, wavy_engine, sampler):
    diffusion = process(str(STEPS))

    def run(scale=2.0, **more):
        more = {**options(sampler), **more}
        return sampler(wavy_engine(6), start(), diffusion, LABELS, scale, **more)

    np.testing.assert_array_equal(run(), run(guidance_interval=(0, 999)))
    np.testing.assert_array_equal(run(scale=0.0), run(guidance_interval=(1000, 2000)))
    assert not np.array_equal(run(), run(scale=0.0))
    assert not np.array_equal(run(), run(guidance_every=2))


def test_gradient_plan():
    skip, fresh, reuse = guidance.SKIP, guidance.FRESH, guidance.REUSE
    plan = guidance.gradient_plan([9, 8, 7, 6, 5, 4], (5, 8), every=2)
    assert plan == [skip, fresh, reuse, fresh, reuse, skip]
    assert guidance.gradient_plan([2, 1], None) == [fresh, fresh]


@pytest.mark.parametrize("target", ["eps", "xstart", "previous_x"])
def test_classifier_free_guidance(process, wavy_engine, sampler, target):
    diffusion = process(str(STEPS), target, "fixed_large")
    plain, blended = wavy_engine(3), wavy_engine(3)
    got = sampler(
        plain, start(), diffusion, LABELS, cfg_scale=2.5, null_label=9, **options(sampler)
    )
    assert [int(y[0]) for _, _, y in plain.log] == [1, 9] * STEPS
    assert all(y.shape == (4,) and y.dtype == LABELS.dtype for _, _, y in plain.log)
    assert LABELS.tolist() == [1] * 4

    class Blend:
        def denoise(self, x, t, y=None, low_res=None):
            null = blended.denoise(x, t, np.full(4, 9))
            return null + 2.5 * (blended.denoise(x, t, y) - null)

    expected = sampler(Blend(), start(), diffusion, LABELS, **options(sampler))
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-7)


def test_classifier_free_guidance_off_costs_nothing(process, wavy_engine, sampler):
    for more in ({}, {"cfg_scale": 1.0, "null_label": 9}):
        engine = wavy_engine(6)
        sampler(engine, start(), process("3"), LABELS, **more, **options(sampler))
        assert len(engine.log) == 3
    engine = wavy_engine(6)
    more = {"cfg_scale": 3.0, "null_label": 9, "guidance_interval": (1, 998)}
    sampler(engine, start(), process("5"), LABELS, **more, **options(sampler))
    evaluated = [t for _, t, y in engine.log if y[0] == 1]
    assert [t for _, t, y in engine.log if y[0] == 9] == [t for t in evaluated if 1 <= t <= 998]
    assert 5 < len(engine.log) < 10


def test_dynamic_threshold_bounds_the_guided_x0(process, wavy_engine, sampler):
    """Percentile of |x0| becomes 1: of the guided x0, wherever guidance acts on x0."""
    diffusion = process(str(STEPS))
    seen = []
    sampler(
        wavy_engine(6),
        start(),
        diffusion,
        LABELS,
        9.0,
        clip="dynamic",
        quantile=0.8,
        callback=lambda step, total, t, x0: seen.append(np.abs(x0).max()),
        **options(sampler),
    )
    assert max(seen) <= 1 + 1e-12


def test_upsampler_input_reaches_the_engine(process, wavy_engine, sampler):
    low = np.ones((4, 3, 2, 2))

    class Upsampler:
        def denoise(self, x, t, y=None, low_res=None):
            assert low_res is low
            return np.concatenate([x, x], axis=1)

    sampler(Upsampler(), start(), process("3"), low_res=low, **options(sampler))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_scale": 1.0, "y": None}, "needs labels"),
        ({"y": np.array([1, 2])}, "y has shape"),
        ({"guidance_interval": (-1, 5)}, "guidance_interval"),
        ({"guidance_interval": (5, 1)}, "guidance_interval"),
        ({"guidance_interval": (0, float("nan"))}, "guidance_interval"),
        ({"guidance_interval": 5}, "guidance_interval=5"),
        ({"guidance_every": 0}, "guidance_every=0"),
        ({"guidance_every": -2}, "guidance_every=-2"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"eta": -0.1}, "eta=-0.1"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"clip": "dynamik"}, "'dynamic'"),
        ({"clip": None}, "clip=None"),
        ({"quantile": 1.5}, "quantile=1.5"),
        ({"quantile": float("nan")}, "quantile=nan"),
        ({"quantile": 0.0}, "quantile=0.0"),
        ({"cfg_scale": 2.0}, "null_label"),
        ({"cfg_scale": 2.0, "null_label": 9, "y": None}, "cfg_scale=2 needs labels"),
        ({"cfg_scale": float("nan"), "null_label": 9}, "cfg_scale=nan"),
        ({"low_res": np.ones((2, 3, 2, 2))}, "low_res has 2 images"),
        ({"x": np.zeros((3, 4, 4))}, "N, C, H, W"),
    ],
)
def test_bad_values_are_refused_before_any_work(process, wavy_engine, sampler, arguments, says):
    engine = wavy_engine(6)
    given = {"x": start(), "diffusion": process("3"), "y": LABELS, "noise": SEEDS, **arguments}
    with pytest.raises(ValueError, match=says):
        sampler(engine, **given)
    assert not engine.log


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": "2"},
        {"guidance_scale": True},
        {"guidance_every": 1.5},
        {"callback": 3},
        {"y": [1, 1, 1, 1]},
        {"x": np.zeros(SHAPE, dtype=np.int64)},
        {"x": np.zeros(SHAPE, dtype=np.float16)},
        {"guidance_sale": 2.0},
    ],
)
def test_bad_types_are_refused_before_any_work(process, wavy_engine, sampler, arguments):
    engine = wavy_engine(6)
    given = {"x": start(), "diffusion": process("3"), "y": LABELS, "noise": SEEDS, **arguments}
    with pytest.raises(TypeError, match=next(iter(arguments))):
        sampler(engine, **given)
    assert not engine.log


@pytest.mark.parametrize(
    "noise",
    [
        SEEDS[:2],
        np.zeros(4),
        np.zeros((2, *SHAPE)),
        np.zeros((3, *SHAPE), dtype=np.int64),
        torch.zeros((3, *SHAPE)),
        7,
    ],
    ids=["count", "float_seeds", "steps", "int_noise", "other_kind", "number"],
)
def test_bad_noise(process, wavy_engine, sampler, noise):
    engine = wavy_engine(6)
    arguments = {**options(sampler), "noise": noise}
    if not (sampler.needs_noise or sampler.uses_eta):  # then the argument is ignored
        assert np.isfinite(sampler(engine, start(), process("3"), **arguments)).all()
        return
    with pytest.raises(ValueError, match="noise is a"):
        sampler(engine, start(), process("3"), **arguments)
    assert not engine.log


def test_wrong_learn_sigma_is_named_where_it_matters(process, wavy_engine, sampler):
    """Samplers that draw no learned noise run on networks with and without variances."""
    diffusion = process("3")
    if sampler.needs_noise:
        with pytest.raises(ValueError, match="learn_sigma=True needs 6"):
            sampler(wavy_engine(3), start(), diffusion, **options(sampler))
        return
    with_variances, without = (
        sampler(wavy_engine(channels), start(), diffusion, **options(sampler))
        for channels in (6, 3)
    )
    np.testing.assert_array_equal(with_variances, without)
    with pytest.raises(ValueError, match="output has 4 channels.*needs 3 or 6"):
        sampler(wavy_engine(4), start(), diffusion, **options(sampler))


def test_an_engine_without_low_res_is_enough(process, sampler):
    """``denoise(x, t, y[, low_res])``: only an upsampler's engine is handed the small images."""

    class Plain:
        def denoise(self, x, t, y):
            return np.concatenate([np.sin(x), np.cos(x)], axis=1)

        def classifier_gradient(self, x, t, y):
            return 0.1 * x

    got = sampler(Plain(), start(), process("3"), LABELS, 1.0, **options(sampler))
    assert np.isfinite(got).all()


def test_noise_may_be_a_list_of_tensors(process, wavy_engine, sampler):
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((3, *SHAPE)))
    x, y = torch.from_numpy(start()), torch.tensor(LABELS)
    whole, parts = (
        sampler(wavy_engine(6), x, process("3"), y, **{**options(sampler), "noise": n})
        for n in (noise, list(noise))
    )
    assert torch.equal(whole, parts)


def test_numpys_false_stops_too(process, wavy_engine, sampler):
    engine = wavy_engine(6)
    more = {**options(sampler), "callback": lambda *args: np.bool_(False)}
    sampler(engine, start(), process("3"), **more)
    assert len(engine.calls("denoise")) == 1
