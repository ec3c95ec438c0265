"""DDPM and DDIM against the published step formulas, written out in NumPy, with the same noise."""

import numpy as np
import pytest

from adm_rt.samplers import SAMPLERS

SHAPE = (2, 3, 4, 4)
STEPS = 6
SCALE = 7.0
TARGETS = ["eps", "xstart", "previous_x"]
VARIANCES = ["learned_range", "fixed_large", "fixed_small"]


class Published:
    """One step of the published sampler at position ``i``, from its own tables."""

    def __init__(self, diffusion, engine, clip, scale, y):
        self.engine, self.clip, self.scale, self.y = engine, clip, scale, y
        self.target, self.variance = diffusion.model_mean_type, diffusion.model_var_type
        self.timesteps = diffusion.timestep_map
        abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[self.timesteps]
        self.abar, self.before = abar, np.append(1.0, abar[:-1])
        self.after = np.append(abar[1:], 0.0)
        self.beta = 1 - abar / self.before
        self.c0 = self.beta * np.sqrt(self.before) / (1 - abar)
        self.ct = (1 - self.before) * np.sqrt(1 - self.beta) / (1 - abar)
        self.posterior = self.beta * (1 - self.before) / (1 - abar)

    def gradient(self, x, i):
        return self.scale * self.engine.classifier_gradient(x, float(self.timesteps[i]), self.y)

    def p_mean_variance(self, x, i):
        raw = self.engine.denoise(x, float(self.timesteps[i]), self.y)
        p, v = raw[:, :3], raw[:, 3:]
        clipped = self.posterior[max(i, 1)]
        if self.variance == "learned_range":
            fraction = (v + 1) / 2
            log_variance = fraction * np.log(self.beta[i]) + (1 - fraction) * np.log(clipped)
            variance = np.exp(log_variance)
        elif self.variance == "fixed_large":
            variance = self.beta[i] if i else self.posterior[1]
            log_variance = np.log(variance)
        else:
            variance, log_variance = self.posterior[i], np.log(clipped)
        if self.target == "eps":
            x0 = np.sqrt(1 / self.abar[i]) * x - np.sqrt(1 / self.abar[i] - 1) * p
        elif self.target == "xstart":
            x0 = p
        else:
            x0 = p / self.c0[i] - self.ct[i] / self.c0[i] * x
        if self.clip:
            x0 = np.clip(x0, -1, 1)
        mean = p if self.target == "previous_x" else self.c0[i] * x0 + self.ct[i] * x
        return mean, variance, log_variance, x0

    def ddpm(self, x, i, z):
        mean, variance, log_variance, x0 = self.p_mean_variance(x, i)
        if self.scale:
            mean = mean + variance * self.gradient(x, i)
        return mean + (i != 0) * np.exp(0.5 * log_variance) * z, x0

    def ddim(self, x, i, z, eta=0.0, reverse=False):
        x0 = self.p_mean_variance(x, i)[3]
        abar, before = self.abar[i], self.before[i]
        recip, recipm1 = np.sqrt(1 / abar), np.sqrt(1 / abar - 1)
        eps = (recip * x - x0) / recipm1
        if self.scale:
            eps = eps - np.sqrt(1 - abar) * self.gradient(x, i)
            x0 = recip * x - recipm1 * eps
        eps = (recip * x - x0) / recipm1
        if reverse:
            return x0 * np.sqrt(self.after[i]) + np.sqrt(1 - self.after[i]) * eps, x0
        sigma = eta * np.sqrt((1 - before) / (1 - abar)) * np.sqrt(1 - abar / before)
        mean = x0 * np.sqrt(before) + np.sqrt(1 - before - sigma**2) * eps
        return mean + (i != 0) * sigma * z, x0


def assert_close(got, expected):
    # The guided reverse process grows without bound, and rounding errors with it.
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def compare(name, step, diffusion, engine, published, clip, **options):
    """Runs a sampler and the published steps side by side, comparing x0 and the final x."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal(SHAPE)
    noise = rng.standard_normal((STEPS, *SHAPE))
    x0s = []
    got = SAMPLERS[name](
        engine,
        x,
        diffusion,
        published.y,
        published.scale,
        noise=noise,
        callback=lambda k, total, t, x0: x0s.append((t, x0)),
        clip="static" if clip else "none",
        **options,
    )
    order = range(STEPS) if name == "ddim_reverse" else range(STEPS - 1, -1, -1)
    for k, i in enumerate(order):
        x, x0 = step(x, i, noise[k])
        assert x0s[k][0] == diffusion.timestep_map[i]
        assert_close(x0s[k][1], x0)
    assert_close(got, x)
    return x0s


@pytest.mark.parametrize("scale", [0.0, SCALE])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("target", TARGETS)
def test_ddpm(process, wavy_engine, target, variance, clip, scale):
    diffusion = process(str(STEPS), target, variance)
    engine = wavy_engine(6 if variance == "learned_range" else 3)
    published = Published(diffusion, engine, clip, scale, np.array([3, 4]))
    compare("ddpm", published.ddpm, diffusion, engine, published, clip)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("scale", [0.0, SCALE])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_ddim(process, wavy_engine, target, clip, scale, eta):
    diffusion = process(str(STEPS), target)
    engine = wavy_engine(6)
    published = Published(diffusion, engine, clip, scale, np.array([3, 4]))

    def step(x, i, z):
        return published.ddim(x, i, z, eta)

    compare("ddim", step, diffusion, engine, published, clip, eta=eta)


@pytest.mark.parametrize("scale", [0.0, SCALE])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_ddim_reverse(process, wavy_engine, target, clip, scale):
    diffusion = process(str(STEPS), target)
    engine = wavy_engine(6)
    published = Published(diffusion, engine, clip, scale, np.array([3, 4]))

    def step(x, i, z):
        return published.ddim(x, i, z, reverse=True)

    compare("ddim_reverse", step, diffusion, engine, published, clip)


def test_guidance_pushes_x0_out_of_range_in_ddim_but_not_in_ddpm(process, wavy_engine):
    diffusion = process(str(STEPS))
    engine = wavy_engine(6)
    largest = {}
    for name in ("ddpm", "ddim"):
        published = Published(diffusion, engine, True, SCALE, np.array([3, 4]))
        step = getattr(published, name)
        x0s = compare(name, step, diffusion, engine, published, True)
        largest[name] = max(np.abs(x0).max() for _, x0 in x0s)
    assert largest["ddpm"] == 1
    assert largest["ddim"] > 2


def test_rescaled_timesteps_reach_both_networks(process, wavy_engine):
    diffusion = process("5", steps=4000, rescale_timesteps=True)
    engine = wavy_engine(6)
    told = []
    SAMPLERS["ddim"](
        engine,
        np.zeros(SHAPE),
        diffusion,
        np.array([1, 1]),
        1.0,
        callback=lambda k, total, t, x0: told.append(t),
    )
    kept = diffusion.timestep_map[::-1].tolist()
    assert told == kept
    for kind in ("denoise", "gradient"):
        assert [t for _, t, _ in engine.calls(kind)] == [t / 4 for t in kept]
