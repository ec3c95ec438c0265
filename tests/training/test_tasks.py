"""What tasks hand to the network and get from it: labels, class dropout, low-resolution images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adm_rt.data import glyphs
from adm_rt.diffusion import Diffusion, losses
from adm_rt.training.randomness import StepRandom
from adm_rt.training.schedule_samplers import LossSecondMomentSampler, UniformSampler
from adm_rt.training.tasks import ClassifierTask, DiffusionTask, UpsamplerTask

DIFFUSION = Diffusion(noise_schedule="cosine", timestep_respacing="50")


class Images:
    """A stream of the same glyphs, 8x8, whatever the step; labels 0 .. 4 in turn."""

    def __init__(self, count=6, label=None):
        images, _ = glyphs(count, 8, labels=7)
        self.x0 = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.y = torch.arange(count) % 5
        if label is not None:
            self.y[3] = label

    def batch(self, step, rank=0, world_size=1):
        return self.x0, self.y, 0


class Recorder(torch.nn.Module):
    """Keeps what it is called with; its output is a function of the noisy image."""

    def __init__(self, outputs=6):
        super().__init__()
        self.outputs = outputs
        self.calls = []

    def forward(self, x, t, *more):
        self.calls.append((x, t, *more))
        return torch.cat([0.5 * x, 0.1 * x], dim=1) if self.outputs == 6 else x.mean((2, 3))


def losses_of(task, model, rows=slice(None), sampler=None, seed=3, step=11):
    batch = task.batch(step)
    random = StepRandom(seed, step, batch.first, len(batch))
    sampler = sampler or UniformSampler(task.diffusion.num_timesteps)
    return task.losses(model, batch[rows], random[rows], sampler)


def test_the_loss_is_that_of_the_noised_image_at_the_networks_timestep():
    task, model = DiffusionTask(DIFFUSION, Images(), class_cond=True), Recorder()
    got = losses_of(task, model)
    ((x_t, times, y),) = model.calls
    x0, t = task.data.x0, got["t"]
    noise = StepRandom(3, 11, 0, 6).normal((3, 8, 8))
    torch.testing.assert_close(x_t, losses.q_sample(DIFFUSION, x0, t, noise))
    assert times.tolist() == DIFFUSION.timestep_map[t].tolist() and torch.equal(y, task.data.y)
    output = torch.cat([0.5 * x_t, 0.1 * x_t], dim=1)
    expected = losses.training_losses(DIFFUSION, output, x0, x_t, t, noise)
    for name in ("loss", "mse", "vb"):
        torch.testing.assert_close(got[name], expected[name])
    assert got["weight"].tolist() == [1.0] * 6 and len(set(t.tolist())) > 2


@pytest.mark.parametrize("make", [DiffusionTask, UpsamplerTask, ClassifierTask])
def test_rows_of_a_batch_have_the_values_of_the_whole(make):
    options = {DiffusionTask: {"class_cond": False}, UpsamplerTask: {"class_cond": True}}
    options[UpsamplerTask] |= {"small_size": 4, "num_classes": 5, "class_dropout": 0.5}
    task = make(DIFFUSION, Images(), **options.get(make, {}))
    outputs = 3 if make is ClassifierTask else 6
    task.data.y %= 3
    whole = losses_of(task, Recorder(outputs))
    parts = [losses_of(task, Recorder(outputs), rows) for rows in (slice(0, 4), slice(4, 6))]
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values)


def test_importance_weights_are_those_of_the_sampler():
    sampler = LossSecondMomentSampler(50, history=1)
    sampler.update(torch.arange(50), torch.linspace(1, 20, 50))
    task = DiffusionTask(DIFFUSION, Images(), class_cond=False)
    got = losses_of(task, Recorder(), sampler=sampler)
    probabilities = sampler.probabilities()[got["t"]]
    torch.testing.assert_close(got["weight"], (1 / (50 * probabilities)).float())


def test_class_dropout_gives_some_images_the_null_class():
    data = Images(3000)
    task = DiffusionTask(DIFFUSION, data, True, num_classes=5, class_dropout=0.2)
    model = Recorder()
    losses_of(task, model)
    y = model.calls[0][2]
    dropped = y == 5
    assert torch.equal(y[~dropped], data.y[~dropped])
    assert 0.17 < dropped.float().mean() < 0.23
    everywhere = DiffusionTask(DIFFUSION, Images(), True, num_classes=5, class_dropout=1.0)
    losses_of(everywhere, model)
    assert model.calls[1][2].tolist() == [5] * 6
    assert task.batch(0).y.max() == 4  # the labels of the data are as they were


def test_jittered_noise_is_in_the_image_and_in_the_target():
    task, model = DiffusionTask(DIFFUSION, Images(200), False, noise_jitter=0.2), Recorder()
    got = losses_of(task, model)
    ((x_t, _, _),) = model.calls
    clean = losses.q_sample(DIFFUSION, task.data.x0, got["t"], torch.zeros_like(x_t))
    spread = torch.from_numpy(DIFFUSION.sqrt_one_minus_alphas_cumprod.copy())[got["t"]]
    noise = (x_t - clean) / spread.float().reshape(-1, 1, 1, 1)
    unit = StepRandom(3, 11, 0, 200).normal((3, 8, 8))
    amplitude = (noise * unit).mean((1, 2, 3)) / (unit * unit).mean((1, 2, 3))
    torch.testing.assert_close(noise, unit * amplitude.reshape(-1, 1, 1, 1), rtol=1e-3, atol=1e-3)
    assert 0.15 < amplitude.std() < 0.25 and abs(amplitude.mean() - 1) < 0.05
    torch.testing.assert_close(got["mse"], (0.5 * x_t - noise).square().mean((1, 2, 3)))


def test_no_jitter_leaves_every_bit_of_the_noise():
    models = [Recorder(), Recorder()]
    losses_of(DiffusionTask(DIFFUSION, Images(), False), models[0])
    losses_of(DiffusionTask(DIFFUSION, Images(), False, noise_jitter=0.0), models[1])
    assert torch.equal(models[0].calls[0][0], models[1].calls[0][0])


def test_snr_weight_weighs_the_error_of_x0():
    diffusion = Diffusion(noise_schedule="cosine", predict_xstart=True)
    got = losses_of(DiffusionTask(diffusion, Images(), False, snr_weight=True), Recorder())
    plain = losses_of(DiffusionTask(diffusion, Images(), False), Recorder())
    alpha2 = torch.from_numpy(diffusion.alphas_cumprod.copy())[got["t"]]
    weight = (alpha2 / (1 - alpha2)).clamp(1, 1000).float()
    assert weight.min() == 1 < weight.max()
    torch.testing.assert_close(got["loss"], weight * got["mse"] + got["vb"])
    torch.testing.assert_close(plain["loss"], got["mse"] + got["vb"])
    with pytest.raises(ValueError, match="snr_weight is for the mse of x0; .* eps"):
        DiffusionTask(DIFFUSION, Images(), False, snr_weight=True)


def test_upsampler_sees_the_area_mean():
    task, model = UpsamplerTask(DIFFUSION, Images(), 4, class_cond=False), Recorder()
    losses_of(task, model, slice(2, 5))
    ((_, _, low, y),) = model.calls
    expected = task.data.x0.numpy().reshape(6, 3, 4, 2, 4, 2).mean((3, 5))[2:5]
    np.testing.assert_allclose(low, expected, atol=1e-6)
    assert y is None


def test_upsampler_of_an_odd_ratio():
    task = UpsamplerTask(DIFFUSION, Images(), 3, class_cond=False)
    low = task.batch(0).extra["low_res"]
    assert torch.equal(low, F.adaptive_avg_pool2d(task.data.x0, 3)) and low.shape == (6, 3, 3, 3)


def test_classifier_values():
    task, model = ClassifierTask(DIFFUSION, Images(), num_classes=5), Recorder(3)
    task.data.y %= 3
    got = losses_of(task, model)
    logits = model.calls[0][0].mean((2, 3))
    expected = F.cross_entropy(logits, task.data.y, reduction="none")
    torch.testing.assert_close(got["loss"], expected)
    assert torch.equal(got["top1"], (logits.argmax(1) == task.data.y).float())
    assert got["top5"].tolist() == [1.0] * 6 and "weight" not in got


@pytest.mark.parametrize("label, said", [(5, "label 5"), (-1, "no label")])
@pytest.mark.parametrize("make", [DiffusionTask, UpsamplerTask, ClassifierTask])
def test_labels_out_of_range_are_named(make, label, said):
    options = {DiffusionTask: {"class_cond": True}, UpsamplerTask: {"class_cond": True}}
    options[UpsamplerTask] |= {"small_size": 4}
    task = make(DIFFUSION, Images(label=label), num_classes=5, **options.get(make, {}))
    with pytest.raises(ValueError, match=f"batch 4: image 3 has {said}, .*classes 0 to 4"):
        task.batch(4)
    if make is not ClassifierTask:
        make(
            DIFFUSION, Images(label=label), num_classes=5, **options[make] | {"class_cond": False}
        ).batch(4)


@pytest.mark.parametrize(
    "options",
    [{"class_cond": False, "num_classes": 5}, {"class_cond": True}],
    ids=["no labels", "no null class"],
)
def test_class_dropout_needs_classes(options):
    with pytest.raises(ValueError, match="class_dropout=0.1 needs"):
        DiffusionTask(DIFFUSION, Images(), class_dropout=0.1, **options)
    with pytest.raises(ValueError, match="class_dropout=1.5"):
        DiffusionTask(DIFFUSION, Images(), class_dropout=1.5, **options)


def test_descriptions_tell_runs_apart():
    clean = Diffusion(predict_xstart=True)

    def describe(**options):
        return DiffusionTask(clean, Images(), True, num_classes=5, **options).describe()

    assert describe() == describe() != describe(class_dropout=0.1)
    assert describe() != describe(noise_jitter=0.1)
    assert describe() != describe(snr_weight=True)
    upsampler = UpsamplerTask(DIFFUSION, Images(), 4, True).describe()
    assert upsampler["small_size"] == 4 and upsampler["diffusion"] == DIFFUSION.to_config()
    other = ClassifierTask(Diffusion(), Images()).describe()
    assert other != ClassifierTask(DIFFUSION, Images()).describe()
