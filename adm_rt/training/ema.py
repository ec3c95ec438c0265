"""Exponential moving averages of the weights, several decays at once."""

import torch


class Ema:
    """Averages of ``parameters`` (name -> tensor) for ``rates`` (name of the decay -> decay).

    ``averages[rate]`` is name -> tensor. With ``ramp`` the decay of update s is at most
    (1 + s) / (10 + s), so that a random start is forgotten; without, as published, it is constant.
    """

    def __init__(self, parameters, rates, ramp=True):
        self.rates = dict(rates)
        self.ramp = ramp
        self.averages = {
            rate: {name: p.detach().clone() for name, p in parameters.items()} for rate in rates
        }

    @torch.no_grad()
    def update(self, parameters, step):
        """Draw the averages towards ``parameters`` after update ``step`` (0-based)."""
        current = [p.detach() for p in parameters.values()]
        for name, rate in self.rates.items():
            decay = min(rate, (1 + step) / (10 + step)) if self.ramp else rate
            torch._foreach_lerp_(list(self.averages[name].values()), current, 1 - decay)
