"""The classifier's gradient as a network of its own, against autograd, on the same weights.

Ours is ``models.classifier_gradient``. The baselines are autograd through the very same classifier
with our ops, no weight wanting a gradient, and the published network taken as the published script
takes it (which also makes the gradients of the weights of its checkpointed blocks).
"""

from __future__ import annotations

import torch

from adm_rt.benchmarking import published
from adm_rt.benchmarking.pair import heading, network_line, timed_row, torch_threads
from adm_rt.benchmarking.sampling_cases import random_weights
from adm_rt.models import build, preset
from adm_rt.models.classifier_gradient import ClassifierGradient

MAX_ERROR = 1e-4  # of float32 sums over a whole network, relative to the largest value
BASELINES = ("autograd", "as published")


def rows(args):
    """Time every baseline, printing as it goes."""
    cfg = preset(args.model)
    state = {name: torch.from_numpy(array) for name, array in random_weights(cfg).items()}
    classifier = _loaded(build(cfg), state).eval().requires_grad_(False)
    ours = ClassifierGradient(classifier)
    result = []
    with torch_threads(args.threads):
        print(heading(args))
        for name in BASELINES:
            if args.only not in name:
                continue
            taken = _autograd(classifier)
            if name == "as published":
                network = _loaded(published.build(cfg), state)
                taken = _published(network)
            for batch in args.batches:
                result.append(_row(name, ours, taken, cfg, batch, args))
                print(network_line(result[-1]), flush=True)
    return result


def _loaded(network, state):
    network.load_state_dict(state)
    return network


def _autograd(classifier):
    def gradient(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_probabilities = torch.log_softmax(classifier(x, t), dim=-1)
            return torch.autograd.grad(log_probabilities.gather(1, y[:, None]).sum(), x)[0]

    return gradient


def _published(network):
    return lambda x, t, y: published.classifier_gradient(network, x, t, y)


def _row(name, ours, baseline, cfg, batch, args):
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, cfg.in_channels, cfg.image_size, cfg.image_size)
    given = (
        torch.randn(shape, generator=generator),
        torch.full((batch,), 500.0),
        torch.randint(0, cfg.num_classes, (batch,), generator=generator),
    )

    def explicit():
        with torch.no_grad():
            return ours(*given)

    def taken():
        return baseline(*given)

    expected = taken()
    error = float((explicit() - expected).abs().max() / expected.abs().max())
    if not error <= MAX_ERROR:
        raise ValueError(f"{name}: the gradients differ by {error:.3g} of the largest value")
    functions = {"ours": explicit, "baseline": taken}
    sizes = f"{args.model} batch {batch} {cfg.image_size}x{cfg.image_size}"
    return timed_row("classifier_gradient", sizes, functions, error, args, baseline=name)
