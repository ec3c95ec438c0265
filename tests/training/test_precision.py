"""Low precision, loss scaling, skipped updates, microbatches, clipping, recomputation."""

import copy
import math

import pytest
import torch
from tiny_training import all_tensors, assert_same_bits, poisoned, tiny_trainer

from adm_rt.errors import NonFiniteError
from adm_rt.training.precision import LossScale


def gradients(trainer):
    """Gradients by name of the update ``trainer.step``, without making it."""
    batch = trainer.task.batch(trainer.step)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer._backward(batch, [len(batch)])
    return {name: p.grad.clone() for name, p in trainer.parameters.items()}


def relative(one, other):
    """Norm of the difference over the norm of ``other``, all tensors together."""
    flat, expected = (torch.cat([v.flatten() for v in side.values()]) for side in (one, other))
    return float((flat - expected).norm() / expected.norm())


def warmed(trainer):
    """The trainer after two updates: the layers that start at zero have gradients behind them."""
    for _ in range(2):
        trainer._update()
    return trainer


def test_the_scale_follows_the_published_rule():
    scale = LossScale(20.0, 1e-3)
    for good in (True, True, False, True):
        scale.update(good)
    assert scale.lg == pytest.approx(19.003)
    assert scale.factor == pytest.approx(2.0**19.003)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_gradients_are_near_those_of_float32(tmp_path, precision, tolerance):
    options = {"precision": precision, "initial_lg_loss_scale": 10.0}
    low = tiny_trainer(tmp_path, **options)
    full = tiny_trainer(tmp_path)
    for trainer in (low, full):  # the same weights, behind no zero layer
        torch.manual_seed(1)
        for p in trainer.parameters.values():
            torch.nn.init.normal_(p, std=0.2)
    got = {name: g / low.loss_scale.factor for name, g in gradients(low).items()}
    assert 0 < relative(got, gradients(full)) < tolerance
    assert {p.dtype for p in low.parameters.values()} == {torch.float32}


def test_an_overflowing_scale_is_lowered_until_updates_are_made(tmp_path):
    trainer = tiny_trainer(tmp_path, iterations=30, precision="fp16", initial_lg_loss_scale=26.0)
    start = copy.deepcopy(all_tensors(trainer))
    trainer._update()
    assert trainer.skipped == 1 and trainer.loss_scale.lg == 25.0
    assert_same_bits(start, all_tensors(trainer))
    trainer.run()
    scales = [scalars["loss_scale"] for _, _, scalars in trainer.monitor.rows]
    assert 1 < trainer.skipped < 12 and min(scales) < 2.0**24
    good = 30 - trainer.skipped
    assert trainer.loss_scale.lg == pytest.approx(26 - trainer.skipped + 1e-3 * good)


def test_a_bad_update_changes_nothing_and_is_counted(tmp_path):
    trainer = warmed(tiny_trainer(tmp_path, schedule_sampler="loss-second-moment"))
    before = copy.deepcopy(trainer._tensors())
    with poisoned(trainer, lambda step: True):
        _, scalars = trainer._update()
    assert scalars["skipped"] == 1
    assert (trainer.step, trainer.skipped, trainer.bad_in_a_row) == (3, 1, 1)
    assert_same_bits(before, trainer._tensors())
    expected = gradients(trainer)
    trainer._update()
    assert (trainer.skipped, trainer.bad_in_a_row) == (1, 0)
    assert_same_bits(expected, {name: p.grad for name, p in trainer.parameters.items()})


def test_a_skipped_update_is_told_with_its_losses_and_not_logged(tmp_path):
    told = []
    trainer = tiny_trainer(tmp_path, iterations=3, callback=lambda *values: told.append(values))
    with poisoned(trainer, lambda step: step == 1):
        trainer.run()
    assert [math.isnan(values["loss"]) for _, values in told] == [False, True, False]
    assert [bool(per_image) for _, per_image, _ in trainer.monitor.rows] == [True, False, True]


def test_twenty_bad_updates_in_a_row_stop_and_nineteen_do_not(tmp_path):
    trainer = tiny_trainer(tmp_path / "19", iterations=60, save_interval=60)
    with poisoned(trainer, lambda step: step % 20 > 0):
        trainer.run()
    assert trainer.skipped == 57
    trainer = tiny_trainer(tmp_path / "20", iterations=60, save_interval=2)
    with poisoned(trainer, lambda step: step >= 5), pytest.raises(NonFiniteError) as caught:
        trainer.run()
    assert trainer.step == 25 and "20 updates in a row up to step 25" in str(caught.value)
    good = tiny_trainer(tmp_path / "good", iterations=5)
    good.run()
    assert_same_bits(all_tensors(good), all_tensors(trainer))
    # and the way out that the message names is one
    changed = tiny_trainer(tmp_path / "20", iterations=26, lr=1e-3, allow_changes="lr")
    changed.run()
    assert changed.bad_in_a_row == 0


@pytest.mark.parametrize("microbatch", [1, 2, 3, 4, 7])
def test_microbatches_average_by_the_number_of_images(tmp_path, microbatch):
    whole = warmed(tiny_trainer(tmp_path, batch_size=5))
    parts = warmed(tiny_trainer(tmp_path, batch_size=5, microbatch=microbatch))
    assert relative(gradients(parts), gradients(whole)) < 1e-5


def test_the_published_sum_of_microbatches_is_a_flag(tmp_path):
    summed = tiny_trainer(tmp_path, batch_size=5, microbatch=2, sum_microbatches=True)
    whole = warmed(tiny_trainer(tmp_path, batch_size=5))
    summed.model.load_state_dict(whole.model.state_dict())
    summed.step = whole.step
    batch = whole.task.batch(whole.step)
    expected = {name: torch.zeros_like(p) for name, p in whole.parameters.items()}
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):  # the mean of each, then the sum
        whole.task.batch = lambda step, rows=rows: batch[rows]
        for name, gradient in gradients(whole).items():
            expected[name] += gradient
    assert relative(gradients(summed), expected) < 1e-5


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    clipped, free = (warmed(tiny_trainer(tmp_path, lr=1e-3)) for _ in range(2))
    object.__setattr__(clipped.config, "grad_clip", 0.01)
    for trainer in (clipped, free):
        _, scalars = trainer._update()
        assert scalars["grad_norm"] > 0.02  # logged as it was
    norms = [
        float(torch.nn.utils.get_total_norm([p.grad for p in t.parameters.values()]))
        for t in (clipped, free)
    ]
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] == pytest.approx(scalars["grad_norm"], rel=1e-5)


def test_activation_checkpointing_recomputes_and_changes_no_gradient(tmp_path):
    plain = tiny_trainer(tmp_path, model={"dropout": 0.2})
    saving = tiny_trainer(tmp_path, model={"dropout": 0.2, "use_checkpoint": True})
    calls = {}
    for name, trainer in (("plain", plain), ("saving", saving)):
        trainer.model.train()
        block = trainer.model.middle_block[0]
        calls[name] = 0

        def count(*args, name=name):
            calls[name] += 1

        block.in_layers[2].register_forward_hook(count)
    assert_same_bits(gradients(plain), gradients(saving))
    assert calls == {"plain": 1, "saving": 2}


def test_dropout_is_seeded_by_update_and_microbatch(tmp_path):
    def seeds(out):
        trainer = tiny_trainer(out, iterations=3, microbatch=2)
        losses, seen = trainer.task.losses, []

        def noted(model, batch, random, sampler):
            seen.append((random.step, random.first, torch.initial_seed()))
            return losses(model, batch, random, sampler)

        trainer.task.losses = noted
        trainer.run()
        return seen

    first = seeds(tmp_path / "first")
    assert [place[:2] for place in first] == [(s, i) for s in range(3) for i in (0, 2)]
    assert len({seed for _, _, seed in first}) == 6
    assert seeds(tmp_path / "second") == first
