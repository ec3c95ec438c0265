"""The float64 tables against closed forms."""

import math
import subprocess
import sys

import numpy as np
import pytest

from adm_rt.diffusion import Diffusion


def test_linear_betas():
    diffusion = Diffusion()
    t = np.arange(1000)
    np.testing.assert_allclose(diffusion.betas, 1e-4 + t / 999 * (0.02 - 1e-4), rtol=1e-11)
    assert diffusion.alphas_cumprod.dtype == np.float64
    assert diffusion.alphas_cumprod[999] == pytest.approx(4.0358e-5, rel=1e-4)
    assert diffusion.alphas_cumprod[960] == pytest.approx(8.7e-5, rel=5e-3)
    np.testing.assert_allclose(
        np.log(diffusion.alphas_cumprod),
        [math.fsum(math.log1p(-b) for b in diffusion.betas[: i + 1]) for i in t],
        rtol=1e-12,
    )


def test_linear_betas_scale_with_the_number_of_steps():
    betas = Diffusion(steps=4000).betas
    assert betas[0] == pytest.approx(2.5e-5, rel=1e-9)
    assert betas[-1] == pytest.approx(5e-3, rel=1e-9)


@pytest.mark.parametrize("steps", [10, 1000])
def test_cosine_schedule(steps):
    diffusion = Diffusion(steps=steps, noise_schedule="cosine")
    u = np.arange(1, steps + 1) / steps
    level = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    # All but the last step, whose beta is capped, follow the cosine exactly.
    np.testing.assert_allclose(diffusion.alphas_cumprod[:-1], level[:-1] / start, rtol=1e-9)
    assert diffusion.betas[-1] == pytest.approx(0.999, abs=1e-12)


@pytest.mark.parametrize("respacing", ["", "25", "ddim25", "90,60,60,20,20", "1", "2"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_respaced_tables(respacing, schedule):
    full = Diffusion(noise_schedule=schedule)
    diffusion = full.respaced(respacing)
    n = diffusion.num_timesteps
    abar = full.alphas_cumprod[diffusion.timestep_map]
    previous = np.concatenate([[1.0], abar[:-1]])
    alpha = abar / previous
    close = {"rtol": 1e-7, "atol": 1e-15}
    np.testing.assert_allclose(diffusion.alphas_cumprod, abar, **close)
    np.testing.assert_allclose(diffusion.alphas_cumprod_prev, previous, **close)
    np.testing.assert_allclose(diffusion.alphas_cumprod_next, [*abar[1:], 0.0], **close)
    np.testing.assert_allclose(diffusion.betas, 1 - alpha, **close)
    variance = (1 - alpha) * (1 - previous) / (1 - abar)
    np.testing.assert_allclose(diffusion.posterior_variance, variance, **close)
    clipped = diffusion.posterior_log_variance_clipped
    np.testing.assert_allclose(clipped[1:], np.log(variance[1:]), **close)
    first = variance[1] if n > 1 else 1 - alpha[0]
    assert clipped[0] == pytest.approx(math.log(first), rel=1e-7)
    large = np.log(np.concatenate([[first], 1 - alpha[1:]]))
    np.testing.assert_allclose(diffusion.fixed_large_log_variance, large, **close)
    assert all(
        np.isfinite(table).all()
        for table in vars(diffusion).values()
        if isinstance(table, np.ndarray)
    )
    assert len(diffusion.original_alphas_cumprod) == 1000


def test_posterior_is_bayes_rule():
    # The posterior of x_{t-1} is the product of N(sqrt(abar') x_0, 1 - abar') and of the likelihood
    # of x_t = sqrt(alpha) x_{t-1} + noise: precisions add, and so do precision-weighted means.
    diffusion = Diffusion(timestep_respacing="50")
    for i in range(1, 50):
        beta, previous = diffusion.betas[i], diffusion.alphas_cumprod_prev[i]
        precision = 1 / (1 - previous) + (1 - beta) / beta
        variance = 1 / precision
        assert diffusion.posterior_variance[i] == pytest.approx(variance, rel=1e-9)
        on_x0 = variance * math.sqrt(previous) / (1 - previous)
        on_xt = variance * math.sqrt(1 - beta) / beta
        assert diffusion.posterior_mean_coef1[i] == pytest.approx(on_x0, rel=1e-9)
        assert diffusion.posterior_mean_coef2[i] == pytest.approx(on_xt, rel=1e-9)


def test_network_is_told_original_timesteps():
    diffusion = Diffusion(timestep_respacing="ddim25")
    assert diffusion.model_timestep(3) == 120.0
    assert isinstance(diffusion.model_timestep(3), float)
    fast = Diffusion(steps=4000, timestep_respacing="10", rescale_timesteps=True)
    assert fast.model_timestep(9) == 3999 / 4
    assert fast.scaled_timestep(2.0) == 0.5
    t = np.array([0, 9, 4])
    expected = [fast.model_timestep(i) for i in t]
    assert fast.model_timesteps(t).tolist() == expected
    torch = pytest.importorskip("torch")
    told = fast.model_timesteps(torch.from_numpy(t))
    assert told.dtype == torch.float32 and told.tolist() == expected
    with pytest.raises(ValueError, match="0 to 24"):
        diffusion.model_timestep(25)


def test_flags_choose_types():
    assert Diffusion().model_var_type == "learned_range"
    assert Diffusion(learn_sigma=False).model_var_type == "fixed_large"
    assert Diffusion(learn_sigma=False, sigma_small=True).model_var_type == "fixed_small"
    assert Diffusion().model_mean_type == "eps"
    assert Diffusion(predict_xstart=True).model_mean_type == "xstart"
    assert Diffusion(predict_previous=True).model_mean_type == "previous_x"
    assert Diffusion().loss_type == "mse"
    assert Diffusion(rescale_learned_sigmas=True).loss_type == "rescaled_mse"
    assert Diffusion(use_kl=True, rescale_learned_sigmas=True).loss_type == "rescaled_kl"


def test_config_round_trip():
    diffusion = Diffusion(steps=500, noise_schedule="cosine", timestep_respacing="20", use_kl=True)
    again = Diffusion.from_config(diffusion.to_config())
    assert again.to_config() == diffusion.to_config()
    np.testing.assert_array_equal(again.betas, diffusion.betas)
    assert "timestep_respacing='20'" in repr(diffusion)
    # Respacing starts from the original process, not from the respaced one.
    assert diffusion.respaced("").num_timesteps == 500
    with pytest.raises(ValueError, match="noise_schedule"):
        Diffusion.from_config({"noise_shedule": "linear"})


def test_tables_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        Diffusion().betas[0] = 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"noise_schedule": "cosin"}, "'cosine'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 20}, "too few"),
        ({"predict_xstart": True, "predict_previous": True}, "one target"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        Diffusion(**arguments)


@pytest.mark.parametrize("steps", [1000.0, "1000", True])
def test_steps_must_be_an_int(steps):
    with pytest.raises(TypeError, match="steps"):
        Diffusion(steps=steps)


def test_import_does_not_need_torch():
    code = (
        "import sys; import adm_rt.diffusion.gaussian, adm_rt.diffusion.guidance, adm_rt.samplers; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
