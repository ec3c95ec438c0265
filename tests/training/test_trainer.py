"""The training loop: exact resume, schedules, stops."""

import math

import numpy as np
import pytest
import torch
from tiny_training import Quiet

from adm_rt import models
from adm_rt.data import BatchStream, open_dataset
from adm_rt.diffusion import Diffusion
from adm_rt.errors import NonFiniteError
from adm_rt.models import ModelConfig
from adm_rt.training import ClassifierTask, DiffusionTask, TrainConfig, Trainer
from adm_rt.training.monitor import Monitor

TINY = {
    "image_size": 8,
    "num_channels": 32,
    "channel_mult": "1,1",
    "num_res_blocks": 1,
    "num_head_channels": 32,
    "attention_resolutions": "4",
    "resblock_updown": True,
    "num_classes": 36,
}


def make_trainer(out, what="diffusion", monitor=None, **changes):
    torch.manual_seed(0)
    cfg = ModelConfig(
        kind=what,
        class_cond=what == "diffusion",
        learn_sigma=what == "diffusion",
        dropout=0.1,
        **TINY,
    )
    diffusion = Diffusion(noise_schedule="cosine")
    options = {"iterations": 6, "batch_size": 4, "lr": 1e-3, "save_interval": 3, "log_interval": 2}
    config = TrainConfig(out=str(out), **(options | changes))
    data = BatchStream(open_dataset("glyphs", 8, seed=5), config.batch_size, seed=5)
    if what == "diffusion":
        task = DiffusionTask(diffusion, data, class_cond=True)
    else:
        task = ClassifierTask(diffusion, data)
    return Trainer(models.build(cfg), task, config, monitor=monitor or Quiet())


@pytest.mark.parametrize("what", ["diffusion", "classifier"])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, what):
    whole = make_trainer(tmp_path / "whole", what).run(progress=False)
    make_trainer(tmp_path / "parts", what, iterations=3).run(progress=False)
    resumed = make_trainer(tmp_path / "parts", what)
    weights = resumed.run(progress=False)
    assert resumed.step == 6
    for name, tensor in whole.items():
        assert torch.equal(tensor, weights[name]), name


def test_training_lowers_the_loss(tmp_path):
    options = {"iterations": 60, "batch_size": 16, "log_interval": 10}
    monitor = Monitor(tmp_path, TrainConfig(out=str(tmp_path), **options), 1000, progress=False)
    make_trainer(tmp_path, monitor=monitor, **options).run()
    log = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    assert list(log["step"]) == [10, 20, 30, 40, 50, 60]
    assert log["mse"][-1] < 0.8 * log["mse"][0]
    assert np.isfinite(log["vb"]).all()


def test_ema_is_the_ramped_average_of_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, iterations=3, ema_rate=0.15)
    name = "out.2.bias"
    expected = trainer.parameters[name].detach().clone()
    for step in range(3):
        trainer._update()
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.parameters[name].detach()
    torch.testing.assert_close(trainer.ema[name], expected, rtol=1e-6, atol=1e-9)


def test_learning_rate_rises_holds_and_falls():
    config = TrainConfig(iterations=100, out="x", lr=2.0, warmup_steps=10, cooldown_steps=20)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10:80] == [2.0] * 70
    assert rates[90] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)


def test_only_the_newest_checkpoints_stay(tmp_path):
    make_trainer(tmp_path, iterations=8, save_interval=2, keep=2).run(progress=False)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_0000006", "step_0000008"]
    assert not list(tmp_path.glob(".step_*"))


def test_non_finite_gradients_stop_the_run_with_the_last_good_state(tmp_path):
    trainer = make_trainer(tmp_path, iterations=60, save_interval=2)
    losses = trainer.task.losses

    def poisoned(model, batch, random, sampler):
        result = losses(model, batch, random, sampler)
        return {**result, "loss": result["loss"] * math.nan} if random.step >= 4 else result

    trainer.task.losses = poisoned
    with pytest.raises(NonFiniteError, match="20 updates in a row"):
        trainer.run(progress=False)
    assert trainer.step < 30
    assert all(torch.isfinite(p).all() for p in trainer.parameters.values())


@pytest.mark.parametrize(
    "change",
    [
        {"lr": math.nan},
        {"lr": 0.0},
        {"ema_rate": 1.0},
        {"precision": "fp8"},
        {"iterations": 0},
        {"weight_decay": math.inf},
        {"out": ""},
        {"out": __file__},
    ],
    ids=str,
)
def test_bad_configuration_names_the_field(change):
    (name, value) = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name}="):
        TrainConfig(**({"iterations": 1, "out": "x"} | {name: value}))
