"""Engines whose networks are known in closed form, in float64."""

import math

import numpy as np
import pytest

from adm_rt.diffusion import Diffusion


class CountingEngine:
    """Counts calls; ``log`` has ("denoise", t, y) and ("gradient", t, y) in order."""

    def __init__(self):
        self.log = []

    def calls(self, kind):
        return [entry for entry in self.log if entry[0] == kind]


class GaussianEngine(CountingEngine):
    """The exact network for data of independent N(mu, std^2) pixels, for any target.

    ``std`` is a number, or an array that broadcasts against the images.

    The classifier is that of a label seen through N(x_0, noise_std^2) at the value ``label``, so
    that p(x_0 | label) is Gaussian again; ``posterior`` is its (mu, std). The learned variance is
    the true one of the reverse step, which makes ancestral sampling exact for any step count.
    """

    def __init__(self, diffusion, mu=0.3, std=0.4, label=1.0, noise_std=0.5):
        super().__init__()
        self.diffusion, self.mu, self.std = diffusion, mu, std
        self.label, self.noise_std = label, noise_std
        precision = 1 / std**2 + 1 / noise_std**2
        self.posterior = ((mu / std**2 + label / noise_std**2) / precision, precision**-0.5)

    def abar(self, t):
        """At a fractional timestep of the original process; log alpha is linear in between."""
        table = np.concatenate([[1.0], self.diffusion.original_alphas_cumprod])
        return math.exp(np.interp(t, np.arange(-1, len(table) - 1), np.log(table)))

    def moments(self, x, t):
        """Mean and variance of p(x_0 | x_t)."""
        a = self.abar(t)
        gain = math.sqrt(a) * self.std**2 / (a * self.std**2 + 1 - a)
        variance = self.std**2 * (1 - a) / (a * self.std**2 + 1 - a)
        return self.mu + gain * (x - math.sqrt(a) * self.mu), variance

    def denoise(self, x, t, y=None, low_res=None):
        self.log.append(("denoise", t, y))
        d = self.diffusion
        if d.rescale_timesteps:
            t = t * d.steps / 1000
        mean, variance = self.moments(x, t)
        a = self.abar(t)
        if d.predict_xstart:
            out = mean
        elif d.predict_previous:
            before = self.abar(t - 1)
            step = a / before
            c0 = math.sqrt(before) * (1 - step) / (1 - a)
            ct = math.sqrt(step) * (1 - before) / (1 - a)
            out = c0 * mean + ct * x
        else:
            out = (x - math.sqrt(a) * mean) / math.sqrt(1 - a)
        if not d.learn_sigma:
            return out
        i = int(np.argmin(np.abs(d.timestep_map - t)))
        reverse = d.posterior_variance[i] + d.posterior_mean_coef1[i] ** 2 * variance
        low, high = d.posterior_log_variance_clipped[i], d.log_betas[i]
        v = 2 * (np.log(reverse) - low) / (high - low) - 1 if high > low else 0.0
        return concatenate([out, 0 * out + v])

    def classifier_gradient(self, x, t, y):
        self.log.append(("gradient", t, y))
        if self.diffusion.rescale_timesteps:
            t = t * self.diffusion.steps / 1000
        mean, variance = self.moments(x, t)
        a = self.abar(t)
        gain = math.sqrt(a) * self.std**2 / (a * self.std**2 + 1 - a)
        return gain * (self.label - mean) / (variance + self.noise_std**2)


class WavyEngine(CountingEngine):
    """Smooth, nonlinear, image- and label-dependent outputs; large enough that x0 is clipped."""

    def __init__(self, channels, gain=1.3):
        super().__init__()
        self.channels, self.gain = channels, gain

    def denoise(self, x, t, y=None, low_res=None):
        self.log.append(("denoise", t, y))
        shift = 0.0 if y is None else 0.1 * float(y[0])
        out = sine(self.gain * x + 0.003 * t + shift) + 0.4 * x
        if self.channels == x.shape[1]:
            return out
        more = sine(2.1 * x - 0.002 * t)
        return concatenate([out, more[:, : self.channels - x.shape[1]]])

    def classifier_gradient(self, x, t, y):
        self.log.append(("gradient", t, y))
        return sine(0.7 * x + 0.001 * t) + 0.2 * float(y[0])


def sine(x):
    return np.sin(x) if isinstance(x, np.ndarray) else x.sin()


def concatenate(arrays):
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays, axis=1)
    import torch

    return torch.cat(arrays, dim=1)


def flow(x, mu, std, abar, abar_end):
    """The exact probability-flow solution for N(mu, std^2) data from one noise level to another."""

    def spread(a):
        return np.sqrt(a * std**2 + 1 - a)

    centred = (x - math.sqrt(abar) * mu) / spread(abar)
    return math.sqrt(abar_end) * mu + spread(abar_end) * centred


def make_diffusion(respacing="25", target="eps", variance="learned_range", **flags):
    return Diffusion(
        timestep_respacing=respacing,
        learn_sigma=variance == "learned_range",
        sigma_small=variance == "fixed_small",
        predict_xstart=target == "xstart",
        predict_previous=target == "previous_x",
        **flags,
    )


@pytest.fixture
def gaussian_engine():
    return GaussianEngine


@pytest.fixture
def wavy_engine():
    return WavyEngine


@pytest.fixture
def exact_flow():
    return flow


@pytest.fixture
def process():
    return make_diffusion
