"""Which timesteps a training step draws (Improved DDPM, arXiv 2102.09672, section 3.3, eq. 18).

A sampler draws t with probability p_t and gives each draw the weight 1 / (T p_t), so that the
weighted loss has the expectation of uniform sampling.
"""

import torch

from adm_rt.models.config import nearest
from adm_rt.training.randomness import TIMESTEP


class UniformSampler:
    """Every timestep alike, weight 1."""

    def __init__(self, num_timesteps):
        self.num_timesteps = num_timesteps

    def sample(self, random, count):
        """t int64 [count], weights float32 [count], from the ``StepRandom`` of ``count`` images."""
        return random.timesteps(self.num_timesteps), torch.ones(count)

    def update(self, t, losses):
        """Take note of the unweighted ``losses`` [n] seen at ``t`` [n]: nothing to do."""

    def state_dict(self):
        """The state's tensors by name; filling them goes back to a checkpoint."""
        return {}


class LossSecondMomentSampler:
    """p_t proportional to sqrt(E[L_t^2]) over the last ``history`` losses of each t.

    Uniform until every t has its ``history`` losses; afterwards mixed with ``uniform_prob`` of the
    uniform distribution, so that no t is forgotten.
    """

    def __init__(self, num_timesteps, history=10, uniform_prob=0.001):
        self.num_timesteps = num_timesteps
        self.uniform_prob = uniform_prob
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)  # oldest first
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self):
        """p_t, float64 [num_timesteps]."""
        if int(self.counts.min()) < self.losses.shape[1]:
            return torch.full((self.num_timesteps,), 1.0 / self.num_timesteps, dtype=torch.float64)
        p = self.losses.square().mean(1).sqrt()
        p = p / p.sum()
        return p * (1.0 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def sample(self, random, count):
        """t int64 [count], weights float32 [count], from the ``StepRandom`` of ``count`` images."""
        p = self.probabilities()
        limits = p.cumsum(0)
        t = torch.searchsorted(limits / limits[-1], random.uniform(TIMESTEP), right=True)
        t = t.clamp(max=self.num_timesteps - 1)
        return t, (1.0 / (self.num_timesteps * p[t])).float()

    def update(self, t, losses):
        """Take note of the unweighted ``losses`` [n] seen at ``t`` [n], in this order.

        Every process must be given the same, those of all processes, or their draws drift apart.
        """
        for position, loss in zip(t.tolist(), losses.double().tolist()):
            seen = int(self.counts[position])
            if seen == self.losses.shape[1]:
                self.losses[position] = self.losses[position].roll(-1)
                self.losses[position, -1] = loss
            else:
                self.losses[position, seen] = loss
                self.counts[position] += 1

    def state_dict(self):
        """The state's tensors by name; filling them goes back to a checkpoint."""
        return {"losses": self.losses, "counts": self.counts}


SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentSampler}


def create(name, num_timesteps):
    """The schedule sampler ``name`` for ``num_timesteps`` steps; ValueError when unknown."""
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(
            f"schedule_sampler={name!r} is not one of {', '.join(map(repr, SCHEDULE_SAMPLERS))}."
            + nearest(name, SCHEDULE_SAMPLERS)
        )
    return SCHEDULE_SAMPLERS[name](num_timesteps)
