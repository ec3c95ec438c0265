"""TrainConfig: what a field may be, the learning rate, and the averages it asks for."""

import dataclasses
import math

import pytest
import torch
from tiny_training import tiny_trainer

from adm_rt.training import TrainConfig
from adm_rt.training.config import differences
from adm_rt.training.ema import Ema


def config(**changes):
    return TrainConfig(**({"iterations": 100, "out": "x"} | changes))


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp8"},
        {"parallel": "mpi"},
        {"schedule_sampler": "loss"},
        {"ema_rate": "0.9,1.0"},
        {"ema_rate": "0.9,x"},
        {"ema_rate": "0.9,0.90"},
        {"ema_rate": ""},
        {"ema_rate": None},
        {"microbatch": -1},
        {"lr_anneal_steps": 99},
        {"initial_lg_loss_scale": 100.0},
        {"timeout": 0.0},
        {"seed": 2**31},
        {"warmup_steps": math.nan},
    ],
    ids=str,
)
def test_a_bad_field_is_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        config(**change)


def test_every_field_has_its_line_of_help():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"], field.name


@pytest.mark.parametrize(
    ("given", "kept"),
    [("0.9999", "0.9999"), (0.5, "0.5"), (" .9999, 0.99", "0.9999,0.99"), ((0.9, 0), "0.9,0.0")],
)
def test_decays_are_given_as_published_or_as_numbers(given, kept):
    rates = config(ema_rate=given).ema_rates
    assert ",".join(rates) == kept
    assert list(rates.values()) == [float(text) for text in kept.split(",")]


def test_the_learning_rate_is_annealed_over_the_whole_run():
    rates = [config(lr=2.0, lr_anneal_steps=200).learning_rate(step) for step in (0, 50, 99)]
    assert rates == pytest.approx([2.0, 1.5, 1.01])
    both = config(lr=2.0, lr_anneal_steps=100, warmup_steps=10)
    assert both.learning_rate(4) == pytest.approx(2.0 * 0.5 * 0.96)


def test_differences_name_fields_that_may_not_differ():
    one = {"train": {"lr": 1.0, "keep": 2}, "model": {"dropout": 0.0}, "task": {}}
    other = {"train": {"lr": 2.0, "keep": 9}, "model": {"dropout": 0.1}, "task": {"data": "x"}}
    found, _ = differences(one, other)
    assert [line.split()[0] for line in found] == ["model.dropout", "task.data", "lr"]
    found, changed = differences(one, other, "lr, model.dropout")
    assert found == ["task.data is 'x', was None"] and changed
    assert differences(one, one, "lr") == ([], False)


def test_a_difference_deep_inside_is_named_alone():
    one = {"task": {"data": {"set": {"num_images": 24, "seed": 1}, "shuffle": True}}}
    other = {"task": {"data": {"set": {"num_images": 9, "seed": 1}, "shuffle": True}}}
    found, _ = differences(one, other)
    assert found == ["task.data.set.num_images is 9, was 24"]
    for allowed in ("task.data.set.num_images", "task.data"):
        assert differences(one, other, allowed) == ([], True)
    assert differences(one, other, "task.da")[0] == found


def test_several_averages_follow_the_published_rule_without_the_ramp():
    weights = {"w": torch.zeros(3)}
    ema = Ema(weights, {"0.9": 0.9, "0.5": 0.5}, ramp=False)
    expected = {"0.9": 0.0, "0.5": 0.0}
    for step in range(5):
        weights["w"] += 1.0
        ema.update(weights, step)
        for name, rate in ema.rates.items():
            expected[name] = rate * expected[name] + (1 - rate) * float(weights["w"][0])
    for name, value in expected.items():
        assert ema.averages[name]["w"].tolist() == pytest.approx([value] * 3)


def test_a_run_gives_the_average_of_every_rate(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_rate="0.5,0.0", ema_ramp=False)
    first = trainer.run()
    weights = trainer.ema_weights()
    assert list(weights) == ["0.5", "0.0"]
    for name, parameter in trainer.parameters.items():
        assert torch.equal(first[name], weights["0.5"][name])
        assert torch.equal(weights["0.0"][name], parameter)
    assert not torch.equal(first["out.2.bias"], weights["0.0"]["out.2.bias"])


def test_the_callback_sees_every_update_and_stops_the_run(tmp_path):
    seen = []

    def callback(step, values):
        seen.append((step, values))
        return step < 4

    trainer = tiny_trainer(tmp_path, callback=callback)
    trainer.run()
    assert [step for step, _ in seen] == [1, 2, 3, 4] and trainer.step == 4
    assert {"loss", "mse", "vb", "lr", "grad_norm", "skipped"} <= seen[0][1].keys()
    assert (tmp_path / "step_0000004").is_dir()


def test_the_monitor_sees_the_averaged_model_and_training_does_not_notice(tmp_path):
    looked = tiny_trainer(tmp_path / "looked", sample_interval=2, model={"dropout": 0.1})
    result = looked.run()
    assert [step for step, _ in looked.monitor.networks] == [2, 4, 6]
    network = looked.monitor.networks[-1][1]
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, result[name])
    alone = tiny_trainer(tmp_path / "alone", model={"dropout": 0.1}).run()
    for name, tensor in alone.items():
        assert torch.equal(tensor, result[name])
