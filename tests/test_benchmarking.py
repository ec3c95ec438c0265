"""``adm-rt bench ops``: the rows it writes, what it refuses, and the timing helper."""

import json

import pytest
import torch

from adm_rt import benchmarking, ops, testing
from adm_rt.benchmarking import baselines
from adm_rt.ops import reference

KEYS = {"name", "sizes", "device", "ours_ms", "baseline_ms", "ratio", "max_error"}
QUICK = ["ops", "--batch", "1", "--rounds", "1", "--model", "none"]


@pytest.fixture(autouse=True)
def small_cases(monkeypatch):
    groups = [
        ("ada_group_norm", [testing.AdaGroupNormCase(1, 64, 4, 4)]),
        ("ada_group_norm_backward", [testing.AdaGroupNormCase(1, 64, 4, 4, scale_shift=False)]),
        (
            "qkv_attention",
            [testing.AttentionCase(1, 2, 64, 9, order) for order in ("legacy", "new")],
        ),
        ("qkv_attention_backward", [testing.AttentionCase(1, 2, 64, 9, "new", num_queries=1)]),
        (
            "guided_mean_update",
            [
                testing.UpdateCase(1, 8, sampler, guided)
                for sampler in ("ddpm", "ddim")
                for guided in (False, True)
            ],
        ),
    ]
    monkeypatch.setattr("adm_rt.benchmarking.ops.GROUPS", groups)


def test_rows(tmp_path):
    file = tmp_path / "rows.json"
    threads = torch.get_num_threads()
    assert benchmarking.main([*QUICK, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert len(rows) == 9 and {row["device"] for row in rows} == {"cpu"}
    for row in rows:
        assert set(row) >= KEYS
        assert row["ours_ms"] > 0 and row["baseline_ms"] > 0 and row["max_error"] < 1e-5
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"])
    assert torch.get_num_threads() == threads
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_only_and_the_console_command(tmp_path, capsys):
    from adm_rt.cli import main

    file = tmp_path / "rows.json"
    assert main(["bench", *QUICK, "--only", "update", "--clock", "cpu", "--json", str(file)]) == 0
    assert {row["name"] for row in json.loads(file.read_text())} == {"guided_mean_update"}
    assert "guided_mean_update" in capsys.readouterr().out


def test_wrong_results_are_not_timed(tmp_path, monkeypatch, capsys):
    right = ops.ada_group_norm
    monkeypatch.setattr(ops, "ada_group_norm", lambda *args, **kw: right(*args, **kw) + 1e-2)
    file = tmp_path / "rows.json"
    assert benchmarking.main([*QUICK, "--json", str(file)]) == 1
    assert not file.exists()
    assert "differs from the baseline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch", "0"], "--batch 0"),
        (["--batch", "a"], "--batch a"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "0"], "--threads 0"),
        (["--threads", "2", "--clock", "cpu"], "--clock cpu"),
        (["--json", "/nonexistent/rows.json"], "/nonexistent"),
        (["--device", "cuda"], "--device cuda: this benchmark runs on the CPU; on a GPU there are"),
    ],
)
def test_bad_arguments(arguments, text, capsys):
    assert benchmarking.main(["ops", *arguments]) == 1
    assert text in capsys.readouterr().err


def test_baselines_are_the_reference():
    """The baseline computes the same function; else a ratio would mean nothing."""
    torch.manual_seed(0)
    x, ss = torch.randn(2, 64, 3, 5), torch.randn(2, 128)
    weight, bias = torch.randn(64), torch.randn(64)
    torch.testing.assert_close(
        baselines.ada_group_norm(x, weight, bias, ss),
        reference.ada_group_norm(x, weight, bias, ss),
    )
    qkv = torch.randn(2, 3 * 2 * 8, 7)
    for order in ("legacy", "new"):
        torch.testing.assert_close(
            baselines.qkv_attention(qkv, 2, order), reference.qkv_attention(qkv, 2, order)
        )


def test_interleaved_timings():
    order, now = [], [0.0]

    def work(name, seconds):
        order.append(name)
        now[0] += seconds

    functions = {"slow": lambda: work("slow", 0.004), "fast": lambda: work("fast", 0.001)}
    timings = testing.interleaved_timings(functions, rounds=3, sample_ms=2.0, clock=lambda: now[0])
    assert timings["slow"] == pytest.approx((4.0, 4.0))
    assert timings["fast"] == pytest.approx((1.0, 1.0))
    # One call each to find the length of a sample, then samples that change places.
    once = ["slow", "fast"]
    there, back = ["slow", "fast", "fast"], ["fast", "fast", "slow"]
    assert order == once + there + back + there
