"""``adm-rt bench tensorrt`` on fakes: what it builds, compares and reports."""

import json

import fake_tensorrt
import pytest
import torch
from fake_gpu import FakeGpu
from fake_graphs import write_graphs

from adm_rt import benchmarking
from adm_rt.benchmarking import sampling_cases
from adm_rt.engines import tensorrt_adapter, tensorrt_plugins, torch_engine
from adm_rt.models import list_presets, preset


@pytest.fixture
def trt(monkeypatch, tmp_path):
    """tensorrt 10.16 on a GPU whose torch engine answers as the fake engines do."""
    module = fake_tensorrt.make("tensorrt", "10.16.1")
    library = tensorrt_adapter.TensorRT(module)
    monkeypatch.setattr(tensorrt_adapter, "library", lambda name=None: library)
    monkeypatch.setattr("adm_rt.engines.torch_gpu.TorchGpu", lambda device: FakeGpu())
    monkeypatch.setattr("adm_rt.export.exporter.export_model", export_model)
    monkeypatch.setattr(tensorrt_plugins, "_missing_launchers", lambda: "")
    monkeypatch.setattr(tensorrt_plugins, "_registered", {})
    monkeypatch.setattr(torch_engine, "TorchEngine", Plain)
    monkeypatch.setenv("ADM_RT_CACHE", str(tmp_path / "cache"))
    return module


def export_model(unet, folder, classifier=None, dtype="float32"):
    cfgs = {"unet": unet.cfg}
    if classifier is not None:
        cfgs["classifier_gradient"] = classifier.cfg
    return write_graphs(folder, cfgs=cfgs, dtype=dtype)


class Plain:
    """The fake engines' formula in torch."""

    def __init__(self, unet, classifier=None, device="cpu", dtype="float32"):
        self.channels = unet.cfg.out_channels

    def to_numpy(self, values):
        return values.numpy()

    def denoise(self, x, t, y=None, low_res=None):
        return self._run(0.5, x, t, y).tile(1, self.channels // 3, 1, 1)

    def classifier_gradient(self, x, t, y):
        return self._run(-0.1, x, t, y)

    def _run(self, scale, x, t, y):
        shift = torch.full((len(x),), t / 1000) + y / 100
        return scale * x + shift[:, None, None, None]


ARGUMENTS = ["tensorrt", "--models", "glyphs32", "--batch", "2", "--steps", "3", "--rounds", "1"]


def test_the_report(trt, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert benchmarking.main([*ARGUMENTS, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    names = ["denoise", "classifier_gradient", "sample"]
    assert [row["name"] for row in rows] == [
        f"tensorrt {name} {ops}" for ops in ("functions", "plugins") for name in names
    ]
    for row in rows:
        assert row["device"] == "NVIDIA H200 sm_90" and row["library"] == "tensorrt 10.16.1"
        assert row["ratio"] == row["baseline_ms"] / row["ours_ms"] > 0
        assert row["max_error"] is None if "sample" in row["name"] else row["max_error"] < 1e-6
    assert [c[2]["x"][0][0] for c in trt.calls if c[0] == "build"] == [2] * 4  # static
    text = capsys.readouterr().out
    assert "NVIDIA H200 sm_90, tensorrt 10.16.1" in text and "images/s" in text


def test_a_wrong_result_and_a_path_that_fails_are_reported_and_the_rest_goes_on(
    trt, monkeypatch, capsys
):
    monkeypatch.setattr(tensorrt_plugins, "_missing_launchers", lambda: "no CUDA module")
    plain = Plain.classifier_gradient
    monkeypatch.setattr(
        Plain, "classifier_gradient", lambda self, x, t, y: 1.1 * plain(self, x, t, y)
    )
    assert benchmarking.main(ARGUMENTS) == 1
    captured = capsys.readouterr()
    assert "glyphs32 batch 2 plugins: ops='plugins': no CUDA module" in captured.err
    assert "functions: differs from torch in float32 by classifier_gradient 0.09" in captured.err
    assert captured.out.count("images/s") == 3


def test_every_released_model_can_be_measured_with_the_classifier_of_its_size():
    for name in (*list_presets("diffusion"), *list_presets("upsampler")):
        size = name.partition("x")[0]
        guide = [preset(f"{size}x{size}_classifier")] if size.isdecimal() else []
        found = sampling_cases.configs(sampling_cases.ALL_MODELS[name])
        assert list(found.values()) == [preset(name), *guide]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "adm512"], "adm512 is unknown; allowed: glyphs32"),
        (["--models", "64x64_classifier"], "64x64_classifier is unknown"),
        (["--dtype", "int8"], "int8 is unknown; allowed: float32"),
        (["--ops", "both"], "allowed are plugins and functions"),
        (["--steps", "0"], "must be at least 1"),
    ],
)
def test_bad_arguments(trt, capsys, arguments, message):
    assert benchmarking.main(["tensorrt", *arguments]) == 1
    assert message in capsys.readouterr().err
