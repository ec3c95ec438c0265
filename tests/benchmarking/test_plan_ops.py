"""The table of a native plan's ops: ``adm-rt bench ops --model MODEL``."""

import argparse
import json

import pytest
from tiny_models import tiny_config

from adm_rt import benchmarking
from adm_rt.benchmarking import plan_ops, sampling_cases


@pytest.fixture
def tiny_model(monkeypatch):
    cfg = tiny_config()
    weights = sampling_cases.random_weights(cfg)
    monkeypatch.setattr(plan_ops, "_model", lambda name: (cfg, weights))
    return cfg, weights


def arguments(**given):
    return argparse.Namespace(
        **{"model": "tiny", "only": "", "batches": [1], "rounds": 2, "device": "cpu", **given}
    )


def test_every_op_of_the_plan_is_in_one_row(tiny_model, capsys):
    rows = plan_ops.rows(arguments(batches=[1, 3]))
    plan, _ = plan_ops._packed(*tiny_model)
    for batch in (1, 3):
        own = [row for row in rows if f"batch {batch}:" in row["sizes"]]
        assert sum(row["count"] for row in own) == len(plan)
        assert sum(row["share"] for row in own) == pytest.approx(1)
        assert [row["ours_ms"] for row in own] == sorted((r["ours_ms"] for r in own), reverse=True)
    convolutions = [row for row in rows if row["name"] == "plan conv3x3"]
    assert convolutions and all(row["gflops"] > 0 for row in convolutions)
    assert all(row["baseline_ms"] is None and row["device"] == "cpu" for row in rows)
    assert f"{len(plan)} ops" in capsys.readouterr().out


def test_work_per_second_is_that_of_the_batch(monkeypatch, tiny_model):
    """With equal times, three images are three times the work."""
    monkeypatch.setattr(plan_ops, "_seconds", lambda plan, *_: [1e-3] * len(plan))
    rows = plan_ops.rows(arguments(only="conv3x3", batches=[1, 3]))
    one, three = ([row for row in rows if f"batch {n}:" in row["sizes"]] for n in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert b["gflops"] == pytest.approx(3 * a["gflops"])


def test_only_on_the_command_line(tiny_model, tmp_path):
    file = tmp_path / "rows.json"
    flags = ["--only", "plan linear", "--batch", "1", "--rounds", "1", "--json", str(file)]
    assert benchmarking.main(["ops", *flags]) == 0
    assert {row["name"] for row in json.loads(file.read_text())} == {"plan linear"}


def test_no_plan_is_made_when_none_is_wanted(monkeypatch):
    monkeypatch.setattr(plan_ops, "_model", None)
    assert plan_ops.rows(arguments(model="none")) == []
    assert plan_ops.rows(arguments(only="guided_mean_update")) == []


def test_an_unknown_model_is_refused(capsys):
    assert benchmarking.main(["ops", "--only", "plan", "--model", "no_such_model"]) == 1
    assert "no_such_model" in capsys.readouterr().err
