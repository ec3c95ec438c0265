"""Training losses against formulas written out element by element in float64."""

import math

import numpy as np
import pytest
import torch

from adm_rt.diffusion import Diffusion, losses

SHAPE = (4, 3, 2, 2)


def cdf(x):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def nll(x, mean, std):
    """-log P of one 8-bit value."""
    upper, lower = cdf((x + 1 / 255 - mean) / std), cdf((x - 1 / 255 - mean) / std)
    if x < -0.999:
        p = upper
    elif x > 0.999:
        p = 1 - lower
    else:
        p = upper - lower
    return -math.log(max(p, 1e-12))


def kl(mean1, var1, mean2, var2):
    return 0.5 * (math.log(var2 / var1) + var1 / var2 + (mean1 - mean2) ** 2 / var2 - 1)


def by_hand(diffusion, out, x0, x_t, t, noise):
    """(mse [N], vb [N]) of a learned-range network, in plain Python."""
    abar_table = diffusion.original_alphas_cumprod[diffusion.timestep_map]
    mse, vb = [], []
    for n, i in enumerate(t.tolist()):
        abar, before = abar_table[i], abar_table[i - 1] if i else 1.0
        alpha = abar / before
        beta = 1 - alpha
        c0 = math.sqrt(before) * beta / (1 - abar)
        ct = math.sqrt(alpha) * (1 - before) / (1 - abar)
        if i:
            posterior = beta * (1 - before) / (1 - abar)
        else:
            second = abar_table[1]
            posterior = (1 - second / abar) * (1 - abar) / (1 - second)
        squares, bits = [], []
        for index in np.ndindex(*SHAPE[1:]):
            clean, x, z = (float(a[(n, *index)]) for a in (x0, x_t, noise))
            p = float(out[(n, *index)])
            v = float(out[(n, index[0] + SHAPE[1], *index[1:])])
            true_mean = c0 * clean + ct * x
            if diffusion.predict_xstart:
                target, mean = clean, c0 * p + ct * x
            elif diffusion.predict_previous:
                target, mean = true_mean, p
            else:
                target = z
                mean = c0 * (x - math.sqrt(1 - abar) * p) / math.sqrt(abar) + ct * x
            squares.append((target - p) ** 2)
            variance = math.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(posterior))
            if i:
                nats = kl(true_mean, posterior, mean, variance)
            else:
                nats = nll(clean, mean, math.sqrt(variance))
            bits.append(nats / math.log(2))
        mse.append(np.mean(squares))
        vb.append(np.mean(bits))
    return np.array(mse), np.array(vb)


def batch(diffusion, seed=0, outputs=2):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, 256, SHAPE, generator=g).double() / 127.5 - 1
    x0[0, 0, 0, 0], x0[0, 0, 0, 1] = -1.0, 1.0
    noise = torch.randn(SHAPE, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 1, 7, diffusion.num_timesteps - 1])
    x_t = losses.q_sample(diffusion, x0, t, noise)
    out = 0.1 * torch.randn((4, 3 * outputs, 2, 2), generator=g, dtype=torch.float64)
    # Close enough that at t = 0 no level's probability is floored.
    if diffusion.predict_xstart or diffusion.predict_previous:
        out[:, :3] = x0 + 0.03 * out[:, :3]
    else:
        out[:, :3] += noise
    return x0, x_t, t, noise, out.requires_grad_()


TARGETS = [{}, {"predict_xstart": True}, {"predict_previous": True}]


@pytest.mark.parametrize("respacing", ["", "ddim25"])
@pytest.mark.parametrize("target", TARGETS, ids=["eps", "xstart", "previous_x"])
def test_hybrid_loss(target, respacing):
    diffusion = Diffusion(timestep_respacing=respacing, **target)
    x0, x_t, t, noise, out = batch(diffusion)
    got = losses.training_losses(diffusion, out, x0, x_t, t, noise)
    mse, vb = by_hand(diffusion, out.detach(), x0, x_t, t, noise)
    np.testing.assert_allclose(got["mse"].detach(), mse, rtol=1e-7)
    np.testing.assert_allclose(got["vb"].detach(), vb, rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(got["loss"].detach(), mse + vb, rtol=1e-6)
    assert all(value.shape == (4,) for value in got.values())

    # The bound trains the variances only.
    (mean_gradient,) = torch.autograd.grad(got["mse"].sum(), out, retain_graph=True)
    (gradient,) = torch.autograd.grad(got["loss"].sum(), out)
    torch.testing.assert_close(gradient[:, :3], mean_gradient[:, :3])
    assert (mean_gradient[:, 3:] == 0).all() and (gradient[:, 3:] != 0).any(dim=1).all()


# name: (flags or loss_type, the published combination of mse and vb for a process of 50 steps)
OBJECTIVES = {
    "rescaled_mse": ({"rescale_learned_sigmas": True}, lambda mse, vb: mse + vb * 50 / 1000),
    "rescaled_kl": ({"use_kl": True}, lambda mse, vb: vb * 50),
    "kl": ({}, lambda mse, vb: vb),
}


@pytest.mark.parametrize("target", TARGETS, ids=["eps", "xstart", "previous_x"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_objectives(name, target):
    more, formula = OBJECTIVES[name]
    diffusion = Diffusion(timestep_respacing="50", **target, **more)
    x0, x_t, t, noise, out = batch(diffusion)
    loss_type = "kl" if name == "kl" else None  # no flag of the published code chooses it
    assert name == "kl" or diffusion.loss_type == name
    got = losses.training_losses(diffusion, out, x0, x_t, t, noise, loss_type)
    mse, vb = by_hand(diffusion, out.detach(), x0, x_t, t, noise)
    np.testing.assert_allclose(got["loss"].detach(), formula(mse, vb), rtol=1e-6)
    (gradient,) = torch.autograd.grad(got["loss"].sum(), out)
    if name == "rescaled_mse":  # the bound trains the variances only
        expected = 2 * (out[:, :3] - target_of(diffusion, x0, x_t, t, noise)) / 12
        torch.testing.assert_close(gradient[:, :3], expected)
    else:  # the bound alone trains the mean, too
        assert (gradient[:, :3] != 0).any(dim=1).all()


def target_of(diffusion, x0, x_t, t, noise):
    """What the first three channels should be."""
    if diffusion.predict_xstart:
        return x0
    if not diffusion.predict_previous:
        return noise
    rows = [getattr(diffusion, f"posterior_mean_coef{k}")[t].reshape(-1, 1, 1, 1) for k in (1, 2)]
    return torch.from_numpy(rows[0]) * x0 + torch.from_numpy(rows[1]) * x_t


def test_unknown_objective_is_named():
    diffusion = Diffusion()
    x0, x_t, t, noise, out = batch(diffusion)
    with pytest.raises(ValueError, match="loss_type='mes'"):
        losses.training_losses(diffusion, out, x0, x_t, t, noise, "mes")


@pytest.mark.parametrize("clip", [True, False])
def test_evaluation_terms(clip):
    diffusion = Diffusion(timestep_respacing="100")
    x0, x_t, t, noise, out = batch(diffusion)
    out = out.detach()
    out[1, :3] *= 30  # a prediction far outside [-1, 1]
    got = losses.evaluation_terms(diffusion, out, x0, x_t, t, noise, clip)
    abar = torch.from_numpy(diffusion.alphas_cumprod.copy())[t].reshape(-1, 1, 1, 1)
    clean = (x_t - (1 - abar).sqrt() * out[:, :3]) / abar.sqrt()
    assert clean[1].abs().max() > 1.2
    if clip:
        clean = clean.clamp(-1, 1)
    eps = (x_t - abar.sqrt() * clean) / (1 - abar).sqrt()
    torch.testing.assert_close(
        got["xstart_mse"], ((clean - x0) ** 2).mean((1, 2, 3)), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(got["mse"], ((eps - noise) ** 2).mean((1, 2, 3)), rtol=1e-7, atol=0)
    as_network = torch.cat([eps, out[:, 3:]], dim=1)  # the network that would predict this x0
    _, vb = by_hand(diffusion, as_network, x0, x_t, t, noise)
    np.testing.assert_allclose(got["vb"], vb, rtol=1e-6)


def test_training_losses_in_a_loop_of_ones_own():
    """No trainer, no task: any network, any optimiser, a process of one's own."""
    torch.manual_seed(0)
    diffusion = Diffusion(noise_schedule="cosine", timestep_respacing="100")
    network = torch.nn.Conv2d(3, 6, 3, padding=1)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    x0 = torch.rand(8, 3, 4, 4) * 2 - 1
    first, last = [], []
    for step in range(40):
        t = torch.randint(diffusion.num_timesteps, (8,))
        noise = torch.randn_like(x0)
        x_t = losses.q_sample(diffusion, x0, t, noise)
        terms = losses.training_losses(diffusion, network(x_t), x0, x_t, t, noise)
        optimiser.zero_grad()
        terms["loss"].mean().backward()
        optimiser.step()
        (first if step < 10 else last).append(terms["mse"].mean().item())
    assert np.mean(last[-10:]) < 0.7 * np.mean(first)


@pytest.mark.parametrize("sigma_small", [False, True])
def test_fixed_variance_trains_the_mean_only(sigma_small):
    diffusion = Diffusion(learn_sigma=False, sigma_small=sigma_small)
    x0, x_t, t, noise, out = batch(diffusion, outputs=1)
    got = losses.training_losses(diffusion, out, x0, x_t, t, noise)
    expected = ((out.detach() - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(got["loss"].detach(), expected)
    assert not got["vb"].requires_grad and (got["vb"] > 0).all()


def test_low_precision_output_is_judged_in_float32():
    diffusion = Diffusion()
    x0, x_t, t, noise, out = batch(diffusion)
    low = out.detach().bfloat16()
    arguments = [a.float() for a in (x0, x_t)] + [t, noise.float()]
    got = losses.training_losses(diffusion, low, *arguments)
    expected = losses.training_losses(diffusion, low.double(), x0, x_t, t, noise)
    for name in got:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), expected[name], rtol=2e-3, atol=1e-5)


def test_discretised_gaussian_is_a_distribution():
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(1, 256)
    for mean in (-1.3, -1.0, -0.2, 0.5, 0.999, 1.2):
        for log_scale in (-6.0, -4.0, -2.0, 0.0):
            scale = torch.full_like(levels, log_scale)
            log_p = losses.discretized_gaussian_log_likelihood(
                levels, torch.full_like(levels, mean), scale
            )
            # 1e-12 is the floor of a single level's probability.
            assert log_p.exp().sum().item() == pytest.approx(1, abs=256 * 1e-12 + 1e-12)
            assert log_p.min() >= math.log(1e-12) - 1e-9


def test_kl_against_torch_distributions():
    g = torch.Generator().manual_seed(3)
    m1, l1, m2, l2 = torch.randn((4, 50), generator=g, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(m1, (l1 / 2).exp()),
        torch.distributions.Normal(m2, (l2 / 2).exp()),
    )
    torch.testing.assert_close(losses.normal_kl(m1, l1, m2, l2), expected)


def test_perfect_network_has_no_kl():
    diffusion = Diffusion(timestep_respacing="100")
    x0, x_t, t, noise, _ = batch(diffusion)
    t = t.clamp(min=1)
    x_t = losses.q_sample(diffusion, x0, t, noise)
    out = torch.cat([noise, -torch.ones_like(noise)], dim=1)  # v = -1: the posterior's variance
    bits = losses.vb_terms_bpd(diffusion, out, x0, x_t, t)
    assert bits.abs().max() < 1e-9


def test_prior_term():
    diffusion = Diffusion()
    x0 = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64)
    abar = diffusion.alphas_cumprod[-1]
    expected = kl(0.5 * math.sqrt(abar), 1 - abar, 0.0, 1.0) / math.log(2)
    assert losses.prior_bpd(diffusion, x0).tolist() == pytest.approx([expected] * 2, rel=1e-9)
