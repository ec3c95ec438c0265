"""What a run leaves to look at: log rows, continued logs, the plot, sample grids, validation."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_network

from adm_rt.data import glyphs
from adm_rt.diffusion import Diffusion
from adm_rt.training.evaluations import SampleGrid, Validation, classification_terms
from adm_rt.training.monitor import Monitor, duration


@dataclasses.dataclass
class Config:
    iterations: int = 6
    batch_size: int = 4
    log_interval: int = 2


T = torch.tensor([0, 24, 25, 99])  # quartiles 0, 0, 1, 3 of 100 steps


def run(out, steps, start=0, **options):
    monitor = Monitor(out, Config(), 100, progress=False, tensorboard=False, **options)
    monitor.start(start, seconds=10.0 * start)
    for step in range(start + 1, steps + 1):
        losses = step + torch.tensor([1.0, 2.0, 3.0, 4.0])
        monitor.record(step, {"loss": losses, "t": T}, {"lr": step / 10, "grad_norm": step})
    return monitor


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_means_of_their_interval_and_split_by_quartile(tmp_path):
    run(tmp_path, 6).close()
    rows = table(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    second = rows[1]  # updates 3 and 4
    assert float(second["loss"]) == pytest.approx(3.5 + 2.5)
    assert float(second["loss_q0"]) == pytest.approx(3.5 + 1.5)
    assert float(second["loss_q1"]) == pytest.approx(3.5 + 3)
    assert second["loss_q2"] == ""
    assert float(second["loss_q3"]) == pytest.approx(3.5 + 4)
    assert float(second["lr"]) == pytest.approx(0.4)  # the newest
    assert float(second["grad_norm"]) == pytest.approx(3.5)  # the mean
    assert float(second["images_per_second"]) > 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[1]["loss_q2"] is None and lines[1]["loss"] == pytest.approx(6)


def test_a_continued_run_drops_what_came_after_its_checkpoint(tmp_path):
    run(tmp_path, 4)  # killed: never closed; its checkpoint was at 2
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # the kill cut a line
    run(tmp_path, 6, start=2).close()
    rows = table(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert float(rows[1]["seconds"]) >= 20
    steps = [json.loads(x)["step"] for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_skipped_updates_and_infinite_numbers_leave_valid_rows(tmp_path):
    monitor = Monitor(tmp_path, Config(iterations=2), 100, progress=False, tensorboard=False)
    monitor.start(0)
    monitor.record(1, {}, {"grad_norm": math.inf, "skipped": 1})
    monitor.record(2, {}, {"grad_norm": math.nan, "skipped": 2})
    monitor.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row["grad_norm"] is None and row["skipped"] == 2


def test_losses_after_skipped_updates_get_their_columns(tmp_path):
    """With fp16 the first updates are skipped until the scale fits, and have no losses."""
    monitor = Monitor(tmp_path, Config(log_interval=1), 100, progress=False, tensorboard=False)
    monitor.start(0)
    monitor.record(1, {}, {"grad_norm": math.inf, "skipped": 1})
    monitor.record(2, {"loss": torch.ones(4), "t": T}, {"grad_norm": 0.5, "skipped": 1})
    monitor.record(3, {}, {"grad_norm": math.inf, "skipped": 2})
    monitor.close()
    rows = table(tmp_path / "log.csv")
    assert [row["loss"] for row in rows] == ["", "1.0", ""]
    assert [row["loss_q0"] for row in rows] == ["", "1.0", ""]
    assert [row["skipped"] for row in rows] == ["1.0", "1.0", "2.0"]


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path, 6).close()
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG" and image.size[0] > 900
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert not list(tmp_path.glob(".*"))


def test_progress_goes_to_stderr(tmp_path, capsys):
    monitor = Monitor(tmp_path, Config(), 100, tensorboard=False)
    monitor.start(2)
    for step in range(3, 7):
        monitor.record(step, {"loss": torch.ones(4), "t": T}, {})
    monitor.close()
    out, err = capsys.readouterr()
    assert out == "" and "6/6" in err


def test_a_time_estimate_after_a_few_updates(tmp_path, capsys):
    monitor = Monitor(tmp_path, Config(iterations=100), 100, tensorboard=False)
    monitor.start(10)
    for step in range(11, 18):
        monitor.record(step, {"loss": torch.ones(4), "t": T}, {})
    monitor.close()
    assert capsys.readouterr().err.count(" for 84 updates of ") == 1
    assert [duration(s) for s in (40, 725, 12600)] == ["about 40 s", "about 12 min", "about 3.5 h"]


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(Monitor, "_open_tensorboard", lambda self, step: Writer())
    run(tmp_path, 2).close()
    assert ("loss", pytest.approx(4.0), 2) in seen and seen[-1] == "closed"
    assert not any(name == "loss_q2" for name, *_ in seen[:-1])


def test_evaluations_are_logged_apart(tmp_path):
    monitor = run(tmp_path, 2, evaluations=[lambda step, network: {"val_top1": network}])
    assert monitor.evaluate(2, 0.5) == {"val_top1": 0.5}
    monitor.close()
    assert table(tmp_path / "evaluation.csv") == [{"step": "2", "val_top1": "0.5"}]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["val_top1"] == 0.5


# ---- evaluations ----


def test_sample_grids_are_the_same_every_time_and_leave_the_network_alone(tmp_path):
    network = tiny_network()
    diffusion = Diffusion.from_config(network.cfg.diffusion_config())
    grid = SampleGrid(tmp_path, network.cfg, diffusion, count=6, steps=3)
    random_state = torch.get_rng_state()
    assert grid(10, network) == {} and grid(20, network) == {}
    first, second = sorted((tmp_path / "samples").iterdir())
    assert first.name == "step_0000010.png" and first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert image.size == (2 + 3 * 66, 2 + 2 * 66)  # 16x16, each pixel four times four
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.requires_grad for p in network.parameters())


def test_upsampler_grids_show_input_output_and_truth(tmp_path):
    network = tiny_network("upsampler")
    diffusion = Diffusion.from_config(network.cfg.diffusion_config())
    truth, _ = glyphs(3, 32)
    grid = SampleGrid(tmp_path, network.cfg, diffusion, steps=2, truth=truth)
    grid(1, network)
    with Image.open(tmp_path / "samples" / "step_0000001.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 + 3 * 66, 2 + 3 * 66, 3)
    cells = pixels[2:, 2:].reshape(3, 66, 3, 66, 3).transpose(0, 2, 1, 3, 4)[:, :, :64:2, :64:2]
    assert np.array_equal(cells[2], truth)
    area = truth[1].reshape(16, 2, 16, 2, 3).mean((1, 3))
    low = cells[0, 1][::2, ::2]
    assert np.abs(low - area).max() <= 0.51 and np.array_equal(low, cells[0, 1][1::2, 1::2])


def test_a_network_that_is_not_finite_is_noted_and_the_run_goes_on(tmp_path):
    network = tiny_network()
    diffusion = Diffusion.from_config(network.cfg.diffusion_config())
    torch.nn.init.constant_(network.out[2].bias, math.nan)
    grid = SampleGrid(tmp_path, network.cfg, diffusion, count=2, steps=2)
    assert grid(1, network) == {"samples_not_finite": 1.0}
    assert not (tmp_path / "samples").exists()


class FixedSet:
    """`count` glyphs 16x16 of five classes."""

    name, num_classes, image_size = "fixed", 5, 16

    def __init__(self, count, label=None):
        self.images, _ = glyphs(count, 16, labels=3)
        self.num_images = count
        self.labels = np.arange(count) % 5 if label is None else np.full(count, label)

    def get_many(self, indices, draws):
        return self.images[list(indices)], self.labels[list(indices)]


class KnowsTheLevel(torch.nn.Module):
    """Right for label 0 where the noise is small; else every class but the true one first."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        small = (t < 500).float()[:, None]
        right, wrong = torch.eye(6)[0], torch.arange(6.0)
        return small * right + (1 - small) * wrong


def test_validation_counts_by_noise_level():
    validation = Validation(FixedSet(200, label=0), Diffusion(), 6, batch_size=33)
    row = validation(1, KnowsTheLevel())
    small = np.mean(validation.t < 500)
    assert 0.3 < small < 0.7
    assert row["val_top1"] == pytest.approx(small)
    assert row["val_top5"] == pytest.approx(small)  # the true class is sixth of six
    assert [row[f"val_top1_q{q}"] for q in range(4)] == [1, 1, 0, 0]
    losses = [-1 + math.log(5 + math.e), math.log(sum(math.exp(k) for k in range(6)))]
    assert row["val_loss"] == pytest.approx(small * losses[0] + (1 - small) * losses[1])


def test_validation_of_a_part_sees_all_classes():
    """A folder is in the order of its classes: its first images are of the first ones."""
    data = FixedSet(1000)
    data.labels = np.arange(1000) // 200
    validation = Validation(data, Diffusion(), 5, num_images=100, batch_size=30)
    _, labels = data.get_many(validation._index, None)
    assert np.bincount(labels, minlength=5).min() > 8 and len(set(validation._index)) == 100
    data.labels[validation._index[40]] = 7
    with pytest.raises(ValueError, match=f"image {validation._index[40]} has label 7"):
        validation(1, KnowsTheLevel())


def test_validation_uses_all_of_a_small_set_and_checks_labels():
    assert Validation(FixedSet(7), Diffusion(), 5, num_images=50).count == 7
    assert Validation(FixedSet(7), Diffusion(), 5, num_images=3).count == 3
    with pytest.raises(ValueError, match="fixed: image 3 has label 3.*classes 0 to 2"):
        Validation(FixedSet(7), Diffusion(), 3)(1, KnowsTheLevel())
    with pytest.raises(ValueError, match="no images"):
        Validation(FixedSet(7), Diffusion(), 5, num_images=0)


def test_top5_of_few_classes():
    terms = classification_terms(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([2]))
    assert terms["top1"].item() == 0 and terms["top5"].item() == 1
    assert terms["loss"].item() == pytest.approx(math.log(1 + math.e + math.e**2))
