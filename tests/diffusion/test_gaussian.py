"""The pure functions: identities, and NumPy against torch."""

import numpy as np
import pytest
import torch

from adm_rt.diffusion import Diffusion, gaussian

SHAPE = (5, 3, 4, 4)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, SHAPE), rng.standard_normal(SHAPE), np.array([0, 1, 2, 23, 24])


def test_predictions_invert_each_other(images):
    x0, noise, t = images
    diffusion = Diffusion(timestep_respacing="25")
    x_t = gaussian.q_sample(diffusion, x0, t, noise)
    np.testing.assert_allclose(
        gaussian.predict_xstart_from_eps(diffusion, x_t, t, noise), x0, atol=1e-9
    )
    np.testing.assert_allclose(
        gaussian.predict_eps_from_xstart(diffusion, x_t, t, x0), noise, atol=1e-9
    )
    mean, _ = gaussian.q_posterior(diffusion, x0, x_t, t)
    np.testing.assert_allclose(
        gaussian.predict_xstart_from_previous(diffusion, x_t, t, mean), x0, atol=1e-9
    )


def test_marginals_compose(images):
    # The mean of q(x_{t-1} | x_t, x_0) at the mean of x_t is the mean of x_{t-1}.
    x0, _, _ = images
    diffusion = Diffusion(timestep_respacing="25")
    for i in range(1, 25):
        x_t = gaussian.q_sample(diffusion, x0, i, 0 * x0)
        mean, log_variance = gaussian.q_posterior(diffusion, x0, x_t, i)
        np.testing.assert_allclose(
            mean, gaussian.q_sample(diffusion, x0, i - 1, 0 * x0), atol=1e-12
        )
        # Variances: Var[x_{t-1}] = E Var + Var E.
        total = np.exp(log_variance) + diffusion.posterior_mean_coef2[i] ** 2 * (
            1 - diffusion.alphas_cumprod[i]
        )
        np.testing.assert_allclose(total, 1 - diffusion.alphas_cumprod[i - 1], rtol=1e-9)


@pytest.mark.parametrize("target", ["eps", "xstart", "previous_x"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large", "fixed_small"])
def test_p_mean_variance(images, target, variance):
    x0, noise, t = images
    diffusion = Diffusion(
        timestep_respacing="25",
        learn_sigma=variance == "learned_range",
        sigma_small=variance == "fixed_small",
        predict_xstart=target == "xstart",
        predict_previous=target == "previous_x",
    )
    x_t = gaussian.q_sample(diffusion, x0, t, noise)
    posterior, posterior_log_variance = gaussian.q_posterior(diffusion, x0, x_t, t)
    output = {"eps": noise, "xstart": x0, "previous_x": posterior}[target]
    v = np.random.default_rng(1).uniform(-1.5, 1.5, SHAPE)
    if diffusion.learn_sigma:
        output = np.concatenate([output, v], axis=1)
    # A perfect prediction gives back the posterior.
    mean, log_variance, predicted = gaussian.p_mean_variance(diffusion, output, x_t, t)
    np.testing.assert_allclose(mean, posterior, atol=1e-9)
    np.testing.assert_allclose(predicted, x0, atol=1e-9)
    betas = diffusion.betas[t].reshape(-1, 1, 1, 1)
    if variance == "learned_range":
        expected = (v + 1) / 2 * np.log(betas) + (1 - v) / 2 * posterior_log_variance
    elif variance == "fixed_large":
        expected = np.log(betas)
        expected[0] = posterior_log_variance[0]
    else:
        expected = posterior_log_variance
    np.testing.assert_allclose(log_variance, expected, rtol=1e-9)


def test_clip_moves_the_mean_but_not_a_predicted_previous(images):
    x0, noise, t = images
    wide = 3 * x0
    eps = Diffusion(learn_sigma=False, timestep_respacing="25")
    x_t = gaussian.q_sample(eps, wide, t, noise)
    mean, _, predicted = gaussian.p_mean_variance(eps, noise, x_t, t)
    assert np.abs(predicted).max() == 1
    np.testing.assert_allclose(
        mean, gaussian.q_posterior(eps, np.clip(wide, -1, 1), x_t, t)[0], atol=1e-9
    )
    previous = Diffusion(learn_sigma=False, timestep_respacing="25", predict_previous=True)
    mean, _, predicted = gaussian.p_mean_variance(previous, noise, x_t, t)
    assert np.abs(predicted).max() == 1
    np.testing.assert_array_equal(mean, noise)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_torch_equals_numpy(images, dtype):
    x0, noise, t = images
    x0, noise = x0.astype(dtype), noise.astype(dtype)
    diffusion = Diffusion(timestep_respacing="25")
    output = np.concatenate([noise, x0], axis=1)
    ours = gaussian.p_mean_variance(diffusion, output, gaussian.q_sample(diffusion, x0, t, x0), t)
    tensors = [torch.from_numpy(a) for a in (x0, output, t)]
    x_t = gaussian.q_sample(diffusion, tensors[0], tensors[2], tensors[0])
    theirs = gaussian.p_mean_variance(diffusion, tensors[1], x_t, tensors[2])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and b.numpy().dtype == dtype
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-6 if dtype == np.float32 else 1e-12)


def test_wrong_channels(images):
    x0, noise, t = images
    with pytest.raises(ValueError, match="learn_sigma=True need 6"):
        gaussian.p_mean_variance(Diffusion(), noise, x0, t)
