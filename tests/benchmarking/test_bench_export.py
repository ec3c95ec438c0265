"""``adm-rt bench gradient`` and ``bench export``: the rows, what is compared, what is refused."""

import json

import pytest
from tiny_models import tiny_config

from adm_rt import benchmarking
from adm_rt.benchmarking import sampling_cases
from adm_rt.models import classifier_gradient, presets


@pytest.fixture
def tiny(monkeypatch):
    classifier = tiny_config("classifier")
    model = sampling_cases.BenchModel("64x64_diffusion", tiny_config(), classifier)
    monkeypatch.setitem(presets.PRESETS, "64x64_classifier", classifier)
    monkeypatch.setitem(sampling_cases.MODELS, "64x64_diffusion", model)


def test_gradient_rows(tiny, tmp_path):
    file = tmp_path / "rows.json"
    assert benchmarking.main(["gradient", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["baseline"], row["sizes"]) for row in rows] == [
        (name, f"64x64_classifier batch {batch} 16x16")
        for name in ("autograd", "as published")
        for batch in (1, 4)
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"])
        assert row["max_error"] < 1e-4


def test_other_gradients_are_not_timed(tiny, monkeypatch, capsys):
    rotated = classifier_gradient.rotated
    monkeypatch.setattr(classifier_gradient, "rotated", lambda w: 1.01 * rotated(w))
    assert benchmarking.main(["gradient", "--rounds", "1"]) == 1
    assert "gradients differ" in capsys.readouterr().err


def test_export_rows(tiny, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "rows.json"
    flags = ["--rounds", "1", "--batch", "1,3", "--dtype", "float32,float16"]
    assert benchmarking.main(["export", *flags, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["name"], row["sizes"]) for row in rows] == [
        (name, f"64x64_diffusion batch {batch} 16x16 {dtype}")
        for dtype in ("float32", "float16")
        for name in ("onnx unet", "onnx classifier_gradient")
        for batch in (1, 3)
    ]
    assert all(row["max_error"] < 2e-2 and row["nodes"] > 100 for row in rows)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["gradient", "--model", "64x64_diffusion"], "no classifier"),
        (["gradient", "--batch", "0"], "--batch 0"),
        (["export", "--model", "64x64_classifier"], "is unknown; allowed: unet32_128"),
        (["export", "--dtype", "bfloat16"], "--dtype bfloat16: allowed are"),
        (["export", "--threads", "2", "--clock", "cpu"], "--clock cpu"),
    ],
)
def test_bad_flags(arguments, said, capsys):
    assert benchmarking.main(arguments) == 1
    assert said in capsys.readouterr().err
