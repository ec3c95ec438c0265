"""The multistep solvers against their algorithms as the papers write them, step by step."""

import math

import numpy as np
import pytest

from adm_rt.samplers import SAMPLERS

SHAPE = (2, 3, 3, 3)
SCALE = 3.0


class Problem:
    """Grid and guided x0 prediction of a run, worked out apart from the solvers."""

    def __init__(self, diffusion, engine, clip, scale, y):
        count = diffusion.num_timesteps
        self.engine, self.clip, self.scale, self.y = engine, clip, scale, y
        self.t = np.linspace(999, 0, count + 1)
        table = 0.5 * np.log(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
        log_alpha = np.interp(self.t, np.arange(1000), table)
        self.alpha = np.exp(log_alpha)
        self.sigma = np.sqrt(1 - self.alpha**2)
        self.lam = np.log(self.alpha / self.sigma)

    def x0(self, x, k):
        eps = self.engine.denoise(x, self.t[k], self.y)[:, :3]
        x0 = (x - self.sigma[k] * eps) / self.alpha[k]
        if self.clip:
            x0 = np.clip(x0, -1, 1)
        if self.scale:
            gradient = self.engine.classifier_gradient(x, self.t[k], self.y)
            eps = (x - self.alpha[k] * x0) / self.sigma[k]
            eps = eps - self.scale * self.sigma[k] * gradient
            x0 = (x - self.sigma[k] * eps) / self.alpha[k]
        return x0


def textbook_dpmpp_2m(problem, x, count):
    buffer = []
    for i in range(1, count + 1):
        buffer.append(problem.x0(x, i - 1))
        h = problem.lam[i] - problem.lam[i - 1]
        if i in (1, count):
            d = buffer[-1]
        else:
            r = (problem.lam[i - 1] - problem.lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * buffer[-1] - 1 / (2 * r) * buffer[-2]
        ratio = problem.sigma[i] / problem.sigma[i - 1]
        x = ratio * x - problem.alpha[i] * (math.exp(-h) - 1) * d
    return x


def textbook_unipc(problem, x, count):
    """UniPC-2 with B_2(h), data prediction: predictor UniP-p, then corrector UniC-p."""
    points, values = [0], [problem.x0(x, 0)]
    for i in range(1, count + 1):
        order = min(2, i, count + 1 - i)
        t0 = points[-1]
        h = problem.lam[i] - problem.lam[t0]
        m0 = values[-1]
        rs = [(problem.lam[points[-1 - j]] - problem.lam[t0]) / h for j in range(1, order)]
        differences = [(values[-1 - j] - m0) / r for j, r in enumerate(rs, start=1)]
        hh = -h
        big_b = math.expm1(hh)
        # g_n = hh^n-normalised phi functions: phi_{n+1} = (phi_n - 1/n!) / hh, times n!.
        phi, factorial, b = math.expm1(hh) / hh - 1, 1, []
        for n in range(1, order + 1):
            b.append(phi * factorial / big_b)
            factorial *= n + 1
            phi = phi / hh - 1 / factorial
        base = problem.sigma[i] / problem.sigma[t0] * x - problem.alpha[i] * big_b * m0
        predicted = base
        if order == 2:
            predicted = base - problem.alpha[i] * big_b * 0.5 * differences[0]
        if i == count:
            return predicted
        m = problem.x0(predicted, i)
        all_rs = np.array([*rs, 1.0])
        matrix = np.stack([all_rs**n for n in range(order)])
        weights = [0.5] if order == 1 else np.linalg.solve(matrix, b)
        change = sum(w * d for w, d in zip(weights[:-1], differences, strict=True))
        x = base - problem.alpha[i] * big_b * (change + weights[-1] * (m - m0))
        points.append(i)
        values.append(m)


TEXTBOOK = {"dpmpp_2m": textbook_dpmpp_2m, "unipc": textbook_unipc}


@pytest.mark.parametrize("scale", [0.0, SCALE])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("name", sorted(TEXTBOOK))
def test_equals_textbook(process, wavy_engine, name, count, clip, scale):
    diffusion = process(str(count))
    engine = wavy_engine(6)
    y = np.array([2, 5])
    x = np.random.default_rng(count).standard_normal(SHAPE)
    expected = TEXTBOOK[name](Problem(diffusion, engine, clip, scale, y), x, count)
    calls = len(engine.calls("denoise"))
    assert calls == count
    got = SAMPLERS[name](engine, x, diffusion, y, scale, clip="static" if clip else "none")
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    half = len(engine.log) // 2
    for theirs, ours in zip(engine.log[:half], engine.log[half:], strict=True):
        assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=1e-9)
