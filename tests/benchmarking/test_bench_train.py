"""``adm-rt bench train``: the rows, what is compared before timing, what is refused."""

import json

import pytest
import torch
from tiny_models import tiny_config

from adm_rt import benchmarking
from adm_rt.benchmarking import train
from adm_rt.models import presets


@pytest.fixture
def tiny_preset(monkeypatch):
    cfg = tiny_config(dropout=0.1, use_new_attention_order=True)
    monkeypatch.setitem(presets.PRESETS, "64x64_diffusion", cfg)
    return cfg


QUICK = ["train", "--rounds", "1"]


def test_rows(tiny_preset, tmp_path, capsys):
    file = tmp_path / "rows.json"
    threads = torch.get_num_threads()
    assert benchmarking.main([*QUICK, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["baseline"] for row in rows] == ["plain torch", "as published"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"])
        assert row["max_error"] < 1e-3 and row["name"] == "training_step"
        assert row["sizes"] == "64x64_diffusion batch 2 16x16" and row["ours_ms"] > 0
    assert torch.get_num_threads() == threads
    assert capsys.readouterr().out.count("x  error") == 2


def test_networks_share_their_weights(tiny_preset):
    from adm_rt import models
    from adm_rt.benchmarking import published

    ours = models.build(tiny_preset)
    plain = train._sharing_weights(published.build(tiny_preset), ours)
    pairs = zip(ours.named_parameters(), plain.named_parameters())
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in pairs)


def test_other_gradients_are_not_timed(tiny_preset, monkeypatch):
    norm = torch.nn.GroupNorm.forward
    monkeypatch.setattr(train.published.GroupNorm32, "forward", lambda self, x: 1.1 * norm(self, x))
    with pytest.raises(ValueError, match="gradients differ"):
        benchmarking.run(_args(*QUICK))


def _args(*argv):
    import argparse

    parser = argparse.ArgumentParser()
    benchmarking.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model", "64x64_classifier"], "no denoiser"),
        (["--batch", "0"], "--batch 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "2", "--clock", "cpu"], "--clock cpu"),
        (["--json", "nowhere/x.json"], "nowhere"),
    ],
)
def test_bad_flags(flags, said, capsys):
    assert benchmarking.main(["train", *flags]) == 1
    assert said in capsys.readouterr().err
