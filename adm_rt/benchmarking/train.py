"""A training step against the same network on plain torch operations, on the same weights.

One step is: forward, the hybrid loss, backward, AdamW. Both networks hold the very same parameters
(and so gradients and optimiser state), so the optimiser's part is one and the same, and their
gradients are compared, without dropout, before anything is timed.
"""

from __future__ import annotations

import torch

from adm_rt import models
from adm_rt.benchmarking import published
from adm_rt.benchmarking.pair import heading, network_line, timed_row, torch_threads
from adm_rt.diffusion import Diffusion, losses

# Sums over a whole network in float32, relative to the largest gradient of a parameter.
MAX_ERROR = 1e-3

# The second is what guided-diffusion runs: its attention blocks are always computed twice.
BASELINES = {"plain torch": False, "as published": True}


def rows(args):
    """Time every baseline, printing as it goes."""
    cfg = models.preset(args.model)
    result = []
    with torch_threads(args.threads):
        print(heading(args))
        for name, checkpoint in BASELINES.items():
            if args.only in name:
                result.append(_row(name, checkpoint, cfg, args))
                print(network_line(result[-1]), flush=True)
    return result


def _row(name, checkpoint, cfg, args):
    torch.manual_seed(0)
    ours = _filled(models.build(cfg))
    plain = _sharing_weights(published.build(cfg, checkpoint=checkpoint), ours)
    step = {n: _Step(net, cfg, args.batch) for n, net in (("ours", ours), ("baseline", plain))}
    error = _gradient_error(step, ours)
    if not error <= MAX_ERROR:
        raise ValueError(f"{name}: gradients differ by {error:.3g} of the largest of a parameter")
    optimiser = torch.optim.AdamW(ours.parameters(), lr=1e-8, fused=True)
    for one in step.values():
        one.network.train()
        one.optimiser = optimiser
        one()
    sizes = f"{args.model} batch {args.batch} {cfg.image_size}x{cfg.image_size}"
    return timed_row("training_step", sizes, step, error, args, baseline=name)


class _Step:
    """One training step on a fixed batch; without an optimiser it ends with the gradients."""

    def __init__(self, network, cfg, batch):
        self.network = network
        self.optimiser = None
        self.diffusion = Diffusion.from_config(cfg.diffusion_config())
        generator = torch.Generator().manual_seed(1)
        shape = (batch, cfg.in_channels, cfg.image_size, cfg.image_size)
        self.x0 = torch.rand(shape, generator=generator) * 2 - 1
        self.noise = torch.randn(shape, generator=generator)
        self.t = torch.randint(self.diffusion.num_timesteps, (batch,), generator=generator)
        self.x_t = losses.q_sample(self.diffusion, self.x0, self.t, self.noise)
        self.y = torch.arange(batch) % cfg.num_classes if cfg.class_cond else None

    def __call__(self):
        output = self.network(self.x_t, self.diffusion.model_timesteps(self.t), self.y)
        terms = losses.training_losses(
            self.diffusion, output, self.x0, self.x_t, self.t, self.noise
        )
        for parameter in self.network.parameters():
            parameter.grad = None
        terms["loss"].mean().backward()
        if self.optimiser is not None:
            self.optimiser.step()


def _gradient_error(step, network):
    """The largest difference of a parameter's gradient, over the largest element of that gradient.

    Gradients far below all others are rounding, and are held to a thousandth of the largest.
    """
    gradients = {}
    for name, one in step.items():
        one.network.eval()
        one()
        gradients[name] = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()
        ]
    sizes = [float(g.abs().max()) for g in gradients["baseline"]]
    floor = 1e-3 * max(sizes)
    pairs = zip(gradients["ours"], gradients["baseline"], sizes)
    return max(float((a - b).abs().max()) / max(size, floor) for a, b, size in pairs)


def _filled(network):
    """Layers that start at zero would leave most gradients zero."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network


def _sharing_weights(network, source):
    for name, parameter in list(network.named_parameters()):
        path, _, leaf = name.rpartition(".")
        shared = source.get_parameter(name)
        if shared.shape != parameter.shape:
            raise ValueError(f"{name}: {list(parameter.shape)} against {list(shared.shape)}")
        setattr(network.get_submodule(path), leaf, shared)
    return network
