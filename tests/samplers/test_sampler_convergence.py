"""Every sampler on Gaussian data, where the network and the result are known in closed form."""

import math

import numpy as np
import pytest

from adm_rt.samplers import SAMPLERS
from adm_rt.samplers.ode_grid import ode_grid

ODE_SAMPLERS = [name for name, sampler in SAMPLERS.items() if sampler.ode_order]
# Errors of different signs can cancel for one width of the data; not for all of them.
WIDTHS = np.array([0.15, 0.3, 0.6, 0.9, 1.3, 2.0]).reshape(1, 1, 1, 6)
START = np.linspace(-2, 2, 36).reshape(2, 3, 1, 6)


def smooth_process(process, respacing, target="eps"):
    """A process with a log signal-to-noise ratio linear in t, so that orders show early."""
    diffusion = process(respacing, target, "fixed_large", steps=4000)
    diffusion.original_alphas_cumprod = 1 / (1 + np.exp(-2 * np.linspace(2.5, -2.5, 4000)))
    diffusion._make_tables()
    return diffusion


def exact(sampler, diffusion, engine, exact_flow, mu, std):
    """What a deterministic run tends to with ever more steps.

    On kept timesteps it is the flow between the first and the last kept level; the step before or
    after (from the image or to it, or to pure noise) is one exact formula and stays.
    """
    abar = diffusion.alphas_cumprod
    if sampler.uses_ode_grid:
        alpha = ode_grid(diffusion).alpha
        return exact_flow(START, mu, std, alpha[0] ** 2, alpha[-1] ** 2)
    if sampler.encodes:
        x = exact_flow(START, mu, std, abar[0], abar[-1])
        return (
            np.sqrt(1 - abar[-1])
            * (x - math.sqrt(abar[-1]) * mu)
            / (abar[-1] * std**2 + 1 - abar[-1])
        )
    x = exact_flow(START, mu, std, abar[-1], abar[0])
    gain = math.sqrt(abar[0]) * std**2 / (abar[0] * std**2 + 1 - abar[0])
    return mu + gain * (x - math.sqrt(abar[0]) * mu)


def error(sampler, diffusion, engine, exact_flow, scale=0.0):
    y = np.zeros(2, dtype=np.int64) if scale else None
    got = sampler(engine, START, diffusion, y, scale, clip="none")
    mu, std = engine.posterior if scale else (engine.mu, engine.std)
    return np.abs(got - exact(sampler, diffusion, engine, exact_flow, mu, std)).max()


# On kept steps the published rule takes a predicted previous x for that of the respaced process,
# which no network trained on the original one gives; see test_sampler_steps.py for those.
ORDER_CASES = [
    (name, target)
    for name in ODE_SAMPLERS
    for target in ("eps", "xstart", "previous_x")
    if target != "previous_x" or SAMPLERS[name].uses_ode_grid
]


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize(("name", "target"), ORDER_CASES)
def test_order(process, gaussian_engine, exact_flow, name, target, scale):
    sampler = SAMPLERS[name]
    errors = []
    for steps in (16, 32, 64, 128):
        diffusion = smooth_process(process, str(steps), target)
        engine = gaussian_engine(diffusion, std=WIDTHS)
        errors.append(error(sampler, diffusion, engine, exact_flow, scale))
    slopes = -np.diff(np.log2(errors))
    assert np.all(slopes > sampler.ode_order - 0.2), (errors, slopes)
    assert slopes[-1] < sampler.ode_order + 0.7, (errors, slopes)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", ODE_SAMPLERS)
def test_error_falls_on_the_real_schedules(
    process, gaussian_engine, exact_flow, name, schedule, scale
):
    sampler = SAMPLERS[name]
    errors = []
    for steps in (20, 80, 320):
        diffusion = process(str(steps), noise_schedule=schedule)
        engine = gaussian_engine(diffusion, std=WIDTHS)
        errors.append(error(sampler, diffusion, engine, exact_flow, scale))
    factor = 4 ** (sampler.ode_order - 0.3)
    assert errors[0] > errors[1] > errors[2], errors
    assert errors[2] * factor**2 < errors[0] * 1.5, errors


def test_multistep_beats_ddim_at_25_steps(process, gaussian_engine, exact_flow):
    diffusion = process("25")
    engine = gaussian_engine(diffusion, std=WIDTHS)
    errors = {n: error(SAMPLERS[n], diffusion, engine, exact_flow) for n in ODE_SAMPLERS}
    assert errors["dpmpp_2m"] < errors["ddim"] / 2
    assert errors["unipc"] < errors["ddim"] / 2


def test_reverse_then_forward_returns_the_image(process, gaussian_engine):
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2, 2))
    errors = []
    for steps in (25, 50, 100, 200):
        diffusion = process(str(steps))
        engine = gaussian_engine(diffusion, mu=0.1, std=0.8)
        latent = SAMPLERS["ddim_reverse"](engine, image, diffusion, clip="none")
        again = SAMPLERS["ddim"](engine, latent, diffusion, clip="none")
        errors.append(np.abs(again - image).max())
    assert np.all(np.diff(errors) < 0) and errors[-1] < 0.03, errors


def images(engine, diffusion, count=32):
    """A batch drawn exactly from the marginal of the first step, and seeds."""
    rng = np.random.default_rng(11)
    abar = diffusion.alphas_cumprod[-1]
    spread = math.sqrt(abar * engine.std**2 + 1 - abar)
    x = math.sqrt(abar) * engine.mu + spread * rng.standard_normal((count, 3, 32, 32))
    return x, rng.integers(0, 2**62, count)


def assert_moments(x, mean, std):
    """Within four standard errors of the sample mean and the sample standard deviation."""
    assert x.mean() == pytest.approx(mean, abs=4 * std / math.sqrt(x.size))
    assert x.std() == pytest.approx(std, abs=4 * std / math.sqrt(2 * x.size))


@pytest.mark.parametrize("target", ["eps", "xstart"])
@pytest.mark.parametrize("steps", ["4", "20"])
def test_ddpm_moments(process, gaussian_engine, steps, target):
    # With the true reverse variance every step is exact in distribution; the last returns the mean.
    diffusion = process(steps, target)
    engine = gaussian_engine(diffusion)
    x, seeds = images(engine, diffusion)
    got = SAMPLERS["ddpm"](engine, x, diffusion, noise=seeds, clip="none")
    abar = diffusion.alphas_cumprod[0]
    shrink = math.sqrt(abar) * engine.std / math.sqrt(abar * engine.std**2 + 1 - abar)
    assert_moments(got, engine.mu, engine.std * shrink)


def test_guided_ddpm_approaches_the_class_distribution(process, gaussian_engine):
    # The mean shift is exact in the limit of small steps only.
    diffusion = process("200")
    engine = gaussian_engine(diffusion)
    x, seeds = images(engine, diffusion, count=8)
    y = np.zeros(8, dtype=np.int64)
    got = SAMPLERS["ddpm"](engine, x, diffusion, y, 1.0, noise=seeds, clip="none")
    mu, std = engine.posterior
    assert got.mean() == pytest.approx(mu, abs=0.01)
    assert got.std() == pytest.approx(std, rel=0.02)


def test_ddim_moments_with_noise(process, gaussian_engine):
    # Each step is affine plus noise, so mean and variance follow a scalar recursion.
    diffusion = process("20")
    engine = gaussian_engine(diffusion)
    x, seeds = images(engine, diffusion)
    got = SAMPLERS["ddim"](engine, x, diffusion, noise=seeds, eta=1.0, clip="none")
    abar = diffusion.alphas_cumprod
    mean = math.sqrt(abar[-1]) * engine.mu
    variance = abar[-1] * engine.std**2 + 1 - abar[-1]
    for i in range(19, -1, -1):
        a, b = abar[i], abar[i - 1] if i else 1.0
        sigma2 = (1 - b) / (1 - a) * (1 - a / b)
        gain = math.sqrt(a) * engine.std**2 / (a * engine.std**2 + 1 - a)  # of x0 in x
        direction = math.sqrt((1 - b - sigma2) / (1 - a))
        slope = math.sqrt(b) * gain + direction * (1 - math.sqrt(a) * gain)
        mean = math.sqrt(b) * engine.mu + slope * (mean - math.sqrt(a) * engine.mu)
        variance = slope**2 * variance + sigma2
    assert_moments(got, mean, math.sqrt(variance))


def test_ddim_with_noise_approaches_the_data(process, gaussian_engine):
    diffusion = process("250")
    engine = gaussian_engine(diffusion)
    x, seeds = images(engine, diffusion, count=8)
    got = SAMPLERS["ddim"](engine, x, diffusion, noise=seeds, eta=1.0, clip="none")
    assert got.mean() == pytest.approx(engine.mu, abs=0.01)
    assert got.std() == pytest.approx(engine.std, rel=0.05)
