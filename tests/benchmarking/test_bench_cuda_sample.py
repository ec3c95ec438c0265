"""``adm-rt bench sample --device cuda`` on a GPU made of CPU memory, with tiny models."""

import argparse
import json

import pytest
import torch
from fake_gpu import FakeGpu
from tiny_models import tiny_config

from adm_rt import benchmarking
from adm_rt.benchmarking import cuda_contenders, cuda_sample
from adm_rt.benchmarking.cuda_contenders import CONTENDERS
from adm_rt.benchmarking.cuda_sample import Case
from adm_rt.models.presets import SamplingSettings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    presets = {
        "tiny": tiny_config(use_fp16=True),
        "guide": tiny_config("classifier"),
    }
    settings = SamplingSettings(ddim_guidance_scale=2.0, classifier="guide")
    monkeypatch.setattr(cuda_sample, "preset", presets.__getitem__)
    monkeypatch.setattr(cuda_sample, "sampling_settings", lambda name: settings)
    monkeypatch.setattr(cuda_sample, "CASES", (Case("tiny", 1, short=True), Case("tiny", 2)))
    monkeypatch.setattr(cuda_sample, "STEPS", 2)
    # What compilation changes needs minutes to see; what is compiled is tried all the same.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def arguments(**changes):
    fields = {"rounds": 1, "dtype": "float16", "json": None, "failures": [], "only": ""}
    return argparse.Namespace(**{**fields, "contenders": "", "short": False, **changes})


def measured(names, cases=None, gpu=None, **changes):
    args = arguments(**changes)
    cases = cuda_sample.CASES if cases is None else cases
    return cuda_sample.measured(cases, names, args, CPU, gpu or FakeGpu()), args


def test_everybody_makes_the_same_samples(tmp_path, capsys):
    file = tmp_path / "rows.json"
    found, args = measured(list(CONTENDERS), cuda_sample.CASES[:1], json=str(file))
    assert not args.failures and json.loads(file.read_text()) == found
    rivals = [name for name in CONTENDERS if name != "ours"]
    assert [row["baseline"] for row in found] == rivals
    for row in found:
        assert row["name"] == "sample" and row["ours_ms"] > 0 and row["rate_unit"] == "images/s"
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"])
        assert 1e-5 < row["max_error"] < 1e-2 and 1e-5 < row["baseline_max_error"] < 1e-2
        if row["baseline"].startswith("ours_"):
            assert row["sample_distance"] == 0
        else:
            assert 1e-5 < row["sample_distance"] < 2e-2
        assert row["versions"] and row["commit"] and row["rounds"] == 1
    assert found[0]["sizes"] == "tiny batch 1 float16 2 steps"
    assert "tiny 1, 2 steps" in capsys.readouterr().out


def test_the_rivals_are_what_they_say():
    networks = cuda_sample._networks("tiny")
    released, half, last, compiled = (
        CONTENDERS[name].make(networks, CPU)
        for name in ("released", "float16", "channels_last", "compile")
    )
    assert (released._unet.dtype, released._classifier.dtype) == (torch.float16, torch.float32)
    assert (half._unet.dtype, half._classifier.dtype) == (torch.float16, torch.float16)
    for contender in (last, compiled):
        unet = contender._unet if contender is last else contender._unet.run
        weight = unet.input_blocks[1][0].in_layers[2].weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert weight.dtype == torch.float16
    checkpointed = [m.use_checkpoint for m in last._unet.modules() if hasattr(m, "use_checkpoint")]
    assert any(checkpointed) and all(p.requires_grad for p in last._classifier.parameters())
    network = compiled._classifier.run
    assert not any(getattr(m, "use_checkpoint", False) for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_compiled_rivals_copy_nothing_from_the_host_in_a_step(monkeypatch):
    networks = cuda_sample._networks("tiny")
    work = cuda_sample._work(Case("tiny", 1), networks, CPU)
    compiled, eager = (CONTENDERS[n].make(networks, CPU) for n in ("compile", "channels_last"))
    compiled.sample(work)
    copies = []
    for name in ("from_numpy", "tensor"):
        original = getattr(torch, name)
        counted = lambda *a, original=original, **k: copies.append(1) or original(*a, **k)  # noqa: E731
        monkeypatch.setattr(torch, name, counted)
    compiled.sample(work)
    assert not copies
    eager.sample(work)
    assert len(copies) > 2 * 10  # as published


def test_a_wrong_network_of_ours_is_not_timed(monkeypatch, capsys):
    original = cuda_contenders.TorchEngine.denoise
    monkeypatch.setattr(
        cuda_contenders.TorchEngine, "denoise", lambda self, *a: original(self, *a) * 1.1
    )
    found, args = measured(["ours", "float16"], cuda_sample.CASES[:1])
    assert found == [] and "a network differs from float32 by 0.1" in args.failures[0]
    assert "left out" in capsys.readouterr().out


def test_a_wrong_sample_of_ours_is_not_timed(monkeypatch):
    original = cuda_contenders.TorchEngine.run_captured

    def wrong(self, *arguments, **options):
        run = original(self, *arguments, **options)
        return run._replace(x=run.x * 0.7)

    monkeypatch.setattr(cuda_contenders.TorchEngine, "run_captured", wrong)
    found, args = measured(["ours", "float16"], cuda_sample.CASES[:1])
    assert found == [] and "its sample differs from those of float16 0.3" in args.failures[0]


def test_a_run_that_cannot_be_recorded_is_said():
    gpu = FakeGpu()
    gpu.can_capture = False
    found, args = measured(["ours", "float16"], cuda_sample.CASES[:1], gpu)
    assert found == [] and "not permitted when stream is capturing" in args.failures[0]


def test_a_rival_that_fails_is_left_out(monkeypatch, capsys):
    def fails(self, work):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(cuda_contenders.ChannelsLast, "sample", fails)
    gpu = FakeGpu()
    found, args = measured(["ours", "float16", "channels_last"], gpu=gpu)
    assert [row["baseline"] for row in found] == ["float16"] * 2 and not args.failures
    assert found[1]["sizes"] == "tiny batch 2 float16 2 steps"
    assert "channels_last: tiny 2: no memory; left out" in capsys.readouterr().out
    assert gpu.captures == 2  # once for each batch size


def test_a_rival_that_is_wrong_does_not_cost_the_others(monkeypatch, capsys):
    released, sample = cuda_contenders.Released, cuda_contenders.ChannelsLast.sample
    gradient = released.classifier_gradient
    monkeypatch.setattr(
        cuda_contenders.ChannelsLast, "sample", lambda self, work: sample(self, work) * float("nan")
    )

    def overflows(self, *arguments):
        return gradient(self, *arguments) * (float("nan") if type(self) is released else 1.0)

    monkeypatch.setattr(released, "classifier_gradient", overflows)
    found, args = measured(["ours", "released", "float16", "channels_last"], cuda_sample.CASES[:1])
    assert [row["baseline"] for row in found] == ["float16"] and not args.failures
    said = capsys.readouterr().out
    assert "channels_last: tiny 1: its sample is not finite" in said
    assert "released: tiny 1: a network differs from float32 by nan" in said


def test_a_case_too_large_to_compare_does_not_cost_the_others(monkeypatch, capsys):
    exact = cuda_sample._exact

    def short_of_memory(networks, work, device):
        if len(work.x) == 1:
            raise torch.OutOfMemoryError("no memory")
        return exact(networks, work, device)

    monkeypatch.setattr(cuda_sample, "_exact", short_of_memory)
    found, args = measured(["ours", "float16"])
    assert [row["sizes"] for row in found] == ["tiny batch 2 float16 2 steps"]
    assert "tiny 1: no memory; left out" in capsys.readouterr().out and not args.failures


def test_selection():
    cases, names = cuda_sample.selected(arguments())
    assert len(cases) == 2 and names == ["ours", "released", "float16", "channels_last"]
    cases, names = cuda_sample.selected(arguments(short=True))
    assert [c.name for c in cases] == ["tiny 1"] and names == ["ours", "float16"]
    cases, names = cuda_sample.selected(arguments(only="tiny 2", contenders="compile"))
    assert [c.name for c in cases] == ["tiny 2"] and names == ["ours", "compile"]
    with pytest.raises(ValueError, match="--contenders eager: known are ours"):
        cuda_sample.selected(arguments(contenders="eager"))


def test_the_command(monkeypatch, capsys):
    assert benchmarking.main(["sample", "--device", "cuda", "--list"]) == 0
    assert "tiny 1  (--short)" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmarking.main(["sample", "--device", "cuda"]) == 1
    assert "nothing was measured" in capsys.readouterr().err
