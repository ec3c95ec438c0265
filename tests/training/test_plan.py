"""The memory that a plan announces."""

import pytest
import torch
from tiny_models import tiny_network
from torch import nn

from adm_rt.training import TrainConfig, plan


def test_what_autograd_keeps_is_counted(monkeypatch):
    class Network(nn.Module):
        """Keeps its input for the first weight's gradient, and the sigmoid's result, once."""

        def __init__(self):
            super().__init__()
            self.cfg = tiny_network().cfg.replace(class_cond=False)
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x, t):
            h = torch.sigmoid(self.conv(x))
            return h * h

    assert plan.saved_bytes(Network()) == 4 * 16 * 16 * (3 + 8)


@pytest.mark.parametrize("kind", ["diffusion", "classifier", "upsampler"])
def test_the_meta_device_counts_the_same(kind, monkeypatch):
    network = tiny_network(kind, dropout=0.1).train()
    state = torch.get_rng_state()
    real = plan.saved_bytes(network)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(plan, "_LARGE", 0)
    assert plan.saved_bytes(network) == pytest.approx(real, rel=0.1)
    checkpointed = tiny_network(kind, use_checkpoint=True).train()
    assert plan.saved_bytes(checkpointed) < 0.6 * real


def test_state_and_microbatches():
    network = tiny_network()
    count = sum(p.numel() for p in network.parameters())
    one = plan.saved_bytes(network)
    options = {"iterations": 1, "out": "x", "batch_size": 10, "ema_rate": "0.9,0.99"}
    assert plan.memory_bytes(network, TrainConfig(**options)) == (24 * count, 10 * one)
    config = TrainConfig(**options, microbatch=3, parallel="fsdp")
    assert plan.memory_bytes(network, config, world_size=2) == (12 * count, 3 * one)
