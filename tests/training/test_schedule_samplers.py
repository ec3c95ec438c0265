"""Which timesteps are drawn: the published rule, unbiased, and the random numbers behind it."""

import numpy as np
import pytest
import torch

from adm_rt.training import schedule_samplers
from adm_rt.training.randomness import NOISE, StepRandom, torch_seed


def warmed_up(num_timesteps, seed=0):
    """A loss-second-moment sampler and the losses [T, 13] it was told, in this order."""
    losses = np.random.default_rng(seed).gamma(2.0, size=(num_timesteps, 13))
    losses = (losses * 2.0 ** np.arange(num_timesteps)[:, None]).astype(np.float32)
    sampler = schedule_samplers.create("loss-second-moment", num_timesteps)
    for column in losses.T:
        sampler.update(torch.arange(num_timesteps), torch.from_numpy(column.copy()))
    return sampler, losses


def test_probabilities_follow_the_second_moment_of_the_last_ten_losses():
    sampler, losses = warmed_up(7)
    weights = np.sqrt(np.mean(losses[:, -10:].astype(np.float64) ** 2, axis=-1))
    expected = weights / weights.sum() * (1 - 0.001) + 0.001 / 7
    np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=1e-12)


def test_draws_are_uniform_until_every_timestep_has_ten_losses():
    sampler = schedule_samplers.create("loss-second-moment", 3)
    for count in range(10):
        assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3), count
        sampler.update(torch.tensor([0, 1]), torch.tensor([5.0, 1.0]))
        if count < 9:
            sampler.update(torch.tensor([2]), torch.tensor([1.0]))
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    sampler.update(torch.tensor([2]), torch.tensor([1.0]))
    assert sampler.probabilities()[0] > 0.7


@pytest.mark.parametrize("name", list(schedule_samplers.SCHEDULE_SAMPLERS))
def test_weighted_draws_have_the_expectation_of_uniform_ones(name):
    count, values = 40000, torch.tensor([1.0, -2.0, 4.0, 0.5, 3.0])
    sampler = warmed_up(5)[0] if name != "uniform" else schedule_samplers.create(name, 5)
    t, weights = sampler.sample(StepRandom(3, 0, 0, count), count)
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    frequencies = torch.bincount(t, minlength=5) / count
    if name != "uniform":
        torch.testing.assert_close(frequencies.double(), sampler.probabilities(), atol=0.01, rtol=0)
    assert float((values[t] * weights).mean()) == pytest.approx(float(values.mean()), abs=0.1)


def test_the_history_comes_back_from_the_state():
    sampler, _ = warmed_up(4)
    other = schedule_samplers.create("loss-second-moment", 4)
    for name, tensor in other.state_dict().items():
        tensor.copy_(sampler.state_dict()[name])
    assert torch.equal(other.probabilities(), sampler.probabilities())


def test_an_unknown_sampler_is_named():
    with pytest.raises(ValueError, match="schedule_sampler='loss-aware'.*uniform"):
        schedule_samplers.create("loss-aware", 10)


def test_random_numbers_belong_to_the_image_not_to_its_batch():
    whole = StepRandom(5, 9, 100, 6)
    for part in (whole[2:5], StepRandom(5, 9, 102, 3)):
        assert torch.equal(part.timesteps(1000), whole.timesteps(1000)[2:5])
        assert torch.equal(part.normal((3, 4, 4)), whole.normal((3, 4, 4))[2:5])
        assert torch.equal(part.uniform(NOISE), whole.uniform(NOISE)[2:5])
    for other in (StepRandom(6, 9, 100, 6), StepRandom(5, 10, 100, 6), StepRandom(5, 9, 106, 6)):
        assert not torch.equal(other.normal((3, 4, 4)), whole.normal((3, 4, 4)))


def test_uniform_numbers_are_uniform():
    draws = StepRandom(0, 0, 0, 20000).uniform(NOISE).sort().values
    expected = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    assert 0 < draws[0] and draws[-1] < 1
    assert float((draws - expected).abs().max()) < 0.012  # Kolmogorov-Smirnov at 1 %


def test_dropout_seeds_differ_by_each_of_their_four_numbers():
    seeds = {torch_seed(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)}
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)
