"""``adm-rt build-engine`` on fakes: what it builds, copies and takes."""

import sys

import fake_tensorrt
import pytest
from fake_gpu import FakeGpu
from fake_graphs import write_graphs

from adm_rt.cli import main
from adm_rt.engines import tensorrt_adapter
from adm_rt.engines.tensorrt_adapter import TensorRT
from adm_rt.engines.tensorrt_cache import EngineCache, default_folder, read_facts
from adm_rt.engines.tensorrt_engine import TensorRTEngine
from adm_rt.export.manifest import read_manifest


@pytest.fixture
def folder(tmp_path):
    return str(write_graphs(tmp_path / "exported"))


@pytest.fixture
def trt(monkeypatch, tmp_path):
    """tensorrt 10.16 on one GPU, and a cache of its own."""
    module = fake_tensorrt.make("tensorrt", "10.16.1")
    use(monkeypatch, module)
    monkeypatch.setattr("adm_rt.engines.torch_gpu.TorchGpu", lambda device: FakeGpu())
    monkeypatch.setenv("ADM_RT_CACHE", str(tmp_path / "cache"))
    return module


def use(monkeypatch, module):
    monkeypatch.setattr(tensorrt_adapter, "library", lambda name=None: TensorRT(module))


def builds(trt):
    return [[n[0] for n in c[2]["x"]] for c in trt.calls if c[0] == "build"]


def build(*arguments):
    return main(["build-engine", *arguments, "--ops", "functions"])


def test_both_networks_are_built_where_the_engine_finds_them(trt, folder, capsys):
    assert build(folder, "--batch", "4", "--batch", "1,2,8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "unet, batches of 4, float16, functions: 0.0 MB in" in lines[0]
    assert builds(trt) == [[4, 4, 4], [1, 2, 8]] * 2
    exported = read_manifest(folder)
    engine = TensorRTEngine(
        exported.unet,
        exported.classifier_gradient,
        ops="functions",
        library=TensorRT(trt),
        gpu=FakeGpu(),
    )
    x = FakeGpu().empty((4, 3, 16, 16))
    y = FakeGpu().empty((4,)).long() * 0
    engine.denoise(x, 1.0, y)
    engine.classifier_gradient(x[:3], 1.0, y[:3])
    assert len(builds(trt)) == 4
    assert build(folder, "--batch", "4") == 0
    assert len(builds(trt)) == 4


def test_a_refittable_engine_is_found_by_those_who_do_not_ask_for_one(trt, folder):
    assert build(folder, "--refit") == 0
    unet = read_manifest(folder).unet
    engine = TensorRTEngine(unet, ops="functions", library=TensorRT(trt), gpu=FakeGpu())
    engine.denoise(FakeGpu().empty((2, 3, 16, 16)), 1.0, FakeGpu().empty((2,)).long() * 0)
    assert len(builds(trt)) == 2


def test_engine_files_travel_and_are_taken_with_trust_alone(
    trt, folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "files"
    assert build(folder, "--batch", "4", "--out", str(out)) == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == [
        f"exported-{network}-float16-batch4-NVIDIA-H200-sm-90.engine"
        for network in ("classifier-gradient", "unet")
    ]
    assert read_facts(out / names[1])["gpu"] == "NVIDIA H200 sm_90"
    monkeypatch.setenv("ADM_RT_CACHE", str(tmp_path / "other machine"))
    adopt = [folder, "--adopt", str(out / names[0]), "--adopt", str(out / names[1])]
    assert build(*adopt) == 1
    assert "executable code" in capsys.readouterr().err
    assert build(*adopt, "--trust") == 0
    assert "batches of 4" in capsys.readouterr().out
    assert len(builds(trt)) == 2
    assert build(folder, "--batch", "4") == 0
    assert len(builds(trt)) == 2
    # another GPU, another model
    monkeypatch.setattr("adm_rt.engines.torch_gpu.TorchGpu", lambda device: FakeGpu("L4 sm_89"))
    assert build(*adopt, "--trust") == 1
    assert 'gpu="NVIDIA H200 sm_90", but "L4 sm_89" is needed' in capsys.readouterr().err
    other = str(write_graphs(tmp_path / "other", unet_scale=0.25))
    assert build(other, "--adopt", str(out / names[1]), "--trust") == 1
    assert "weights=" in capsys.readouterr().err


def test_rtx_builds_for_a_gpu_that_is_not_here(folder, trt, monkeypatch, capsys):
    rtx = fake_tensorrt.make("tensorrt_rtx", "1.7.1")
    use(monkeypatch, rtx)
    assert main(["build-engine", folder, "--compute-capability", "8.9"]) == 0
    assert ("capability", "SM89", 0) in rtx.calls
    assert "note: tensorrt_rtx 1.7.1 takes no plugins" in capsys.readouterr().out
    unet = read_manifest(folder).unet
    for identity, built in (("NVIDIA L4 sm_89", 2), ("NVIDIA A100 sm_80", 3)):
        gpu = FakeGpu(identity)
        engine = TensorRTEngine(unet, library=TensorRT(rtx), gpu=gpu)
        engine.denoise(gpu.empty((2, 3, 16, 16)), 1.0, gpu.empty((2,)).long() * 0)
        assert len(builds(rtx)) == built


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "int8"], "dtype='int8' is not known; allowed: auto, fp32, fp16, bf16"),
        (["--dtype", "fp32"], "holds float16 graphs"),
        (["--batch", "8,4,1"], "least,tuned,most"),
        (["--ops", "fast"], "ops='fast' is unknown; allowed: auto, plugins, functions"),
        (["--compute-capability", "8.9"], "builds for the GPU of this machine only"),
        (["--adopt", "/nowhere.engine"], "engine file /nowhere.engine: No such file"),
        (["--adopt", __file__], "test_build_engine.py: it is no engine file of this version"),
    ],
)
def test_bad_arguments_are_one_line(trt, folder, capsys, arguments, message):
    arguments = arguments if "--ops" in arguments else [*arguments, "--ops", "functions"]
    assert main(["build-engine", folder, *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("adm-rt: error: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda:1"], "device='cuda:1': tensorrt_rtx 1.7.1 builds for a range of GPUs"),
        (["--compute-capability", "9.0"], "'9.0' is not known to tensorrt_rtx 1.7.1; allowed: 8.0"),
    ],
)
def test_bad_arguments_of_rtx_are_found_before_the_model_is_read(
    trt, monkeypatch, capsys, arguments, message
):
    use(monkeypatch, fake_tensorrt.make("tensorrt_rtx", "1.7.1"))
    assert main(["build-engine", "/no/model", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_without_a_cache_the_engines_need_a_place(trt, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ADM_RT_CACHE", "off")
    assert build(folder) == 1
    assert "nothing would be kept" in capsys.readouterr().err
    assert build(folder, "--out", str(tmp_path / "out")) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert default_folder() is None and EngineCache(None).similar({}, ()) == []
    monkeypatch.setenv("ADM_RT_CACHE", "/proc/nowhere")
    assert build(folder) == 1
    assert "/proc/nowhere/tensorrt cannot be written" in capsys.readouterr().err


def test_without_tensorrt_the_command_says_how_to_get_it(folder, monkeypatch, capsys):
    for name in tensorrt_adapter.MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["build-engine", folder]) == 1
    assert "pip install 'adm_rt[tensorrt]'" in capsys.readouterr().err
    assert main(["sample", "--model", folder, "--engine", "tensorrt", "--num-images", "1"]) == 1
    assert "pip install 'adm_rt[tensorrt]'" in capsys.readouterr().err
