"""The classifier's plans of the native engine, whole, against autograd in float64."""

import numpy as np
import pytest
import torch
from op_checks import ISAS, THREADS, C
from tiny_models import tiny_network

from adm_rt import ops
from adm_rt.engines.lowering import lower_embedding
from adm_rt.engines.lowering_classifier import lower_classifier, lower_classifier_gradient
from adm_rt.models import preset

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
OPTIONS = {
    **{pool: {"pool": pool} for pool in POOLS},
    "strided": {"resblock_updown": False},
    "additive-strided-spatial": {
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "pool": "spatial",
    },
    "new-order": {"use_new_attention_order": True, "num_head_channels": 16},
    "rescaled": {"rescale_residual": True, "pool": "adaptive"},
    "groups-8": {"norm_groups": 8, "num_channels": 24, "num_head_channels": 12},
    "three-levels": {"channel_mult": "1,1,2", "num_res_blocks": 2, "attention_resolutions": "8,4"},
}
RELEASED = [f"{size}x{size}_classifier" for size in (64, 128, 256, 512)]


def released_flags(name):
    """The flags of a released classifier at 8 channels, 4 groups and a smaller image."""
    released = preset(name)
    size = max(16, 2 ** len(released.channel_mult_tuple))
    resolutions = (size * int(r) // released.image_size for r in "32,16,8".split(","))
    return {
        "num_channels": 8,
        "num_head_channels": 4,
        "norm_groups": 4,
        "num_classes": 20,
        "channel_mult": released.channel_mult_tuple,
        "num_res_blocks": released.num_res_blocks,
        "image_size": size,
        "attention_resolutions": ",".join(str(max(1, r)) for r in resolutions),
    }


class Native:
    """Both plans of a classifier with their weights packed."""

    def __init__(self, classifier):
        cfg = self.cfg = classifier.cfg
        weights = {key: value.numpy() for key, value in classifier.float().state_dict().items()}
        lowered = lower_embedding(cfg), lower_classifier(cfg), lower_classifier_gradient(cfg)
        self.plans = []
        for plan in lowered:
            blob = C.PackedWeights(plan.plan.packed_bytes)
            plan.pack(weights, blob)
            self.plans.append((plan.plan, blob))

    def _run(self, which, batch, inputs, name):
        plan, blob = self.plans[which]
        shape = plan.shape(plan.outputs[name])
        out = {name: np.full((batch, int(np.prod(shape))), np.nan, np.float32)}
        plan.run(batch, inputs, out, blob)
        return out[name]

    def __call__(self, x, t, y):
        """(logits [N, K], gradient like x)."""
        batch = len(x)
        modulation = self._run(0, batch, {"t": t.numpy()}, "modulation")
        inputs = {"x": x.numpy(), "modulation": modulation}
        logits = self._run(1, batch, inputs, "logits")
        inputs["y"] = y.numpy().astype(np.float32)
        return logits, self._run(2, batch, inputs, "gradient").reshape(x.shape)


def torch_gradient(classifier, x, t, y):
    """(logits, d log p(y|x) / dx) by autograd through ops.reference, in x's dtype."""
    with ops.use_reference():
        x = x.requires_grad_(True)
        logits = classifier(x, t)
        chosen = torch.log_softmax(logits, dim=-1)[torch.arange(len(x)), y]
        return logits.detach().numpy(), torch.autograd.grad(chosen.sum(), x)[0].numpy()


def relative_error(value, exact):
    return np.linalg.norm(value - exact) / np.linalg.norm(exact)


def case(seed=3, count=2, **flags):
    classifier = tiny_network("classifier", seed=seed, **flags).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    side = classifier.cfg.image_size
    x = torch.randn(count, classifier.cfg.in_channels, side, side, generator=generator)
    t = torch.rand(count, generator=generator) * 999
    return classifier, x, t, torch.randint(0, classifier.cfg.num_classes, (count,))


@pytest.fixture
def settings():
    before = C.cpu_isa(), C.num_threads()
    yield
    C.set_cpu_isa(before[0])
    C.set_num_threads(before[1])


@pytest.mark.parametrize("flags", [*OPTIONS.values(), *map(released_flags, RELEASED)], ids=str)
def test_against_autograd(flags):
    classifier, x, t, y = case(**flags)
    ours = Native(classifier)(x, t, y)
    plain = torch_gradient(classifier, x.clone(), t, y)
    exact = torch_gradient(classifier.double(), x.double(), t, y)
    for name, value, single, wanted in zip(("logits", "gradient"), ours, plain, exact, strict=True):
        error, allowed = relative_error(value, wanted), 2 * relative_error(single, wanted)
        assert np.linalg.norm(wanted) > 1e-6
        assert error <= allowed + 2e-7, f"{name}: {error:.2e}, torch's {allowed / 2:.2e}"


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_batch_and_thread_count(isa, settings):
    C.set_cpu_isa(isa)
    classifier, x, t, y = case(count=3)
    native = Native(classifier)
    C.set_num_threads(1)
    logits, gradient = native(x, t, y)
    for threads in THREADS[1:]:
        C.set_num_threads(threads)
        again = native(x, t, y)
        assert np.array_equal(again[0], logits) and np.array_equal(again[1], gradient)
    for i in range(3):
        alone = native(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        assert np.array_equal(alone[0][0], logits[i]) and np.array_equal(alone[1][0], gradient[i])


def test_a_class_that_does_not_exist():
    classifier, x, t, y = case()
    with pytest.raises(ValueError, match="index=5 of image 1"):
        Native(classifier)(x, t, torch.tensor([0, 5]))


def test_only_classifiers_are_lowered():
    cfg = tiny_network().cfg
    for lower in (lower_classifier, lower_classifier_gradient):
        with pytest.raises(ValueError, match="a classifier is needed"):
            lower(cfg)
