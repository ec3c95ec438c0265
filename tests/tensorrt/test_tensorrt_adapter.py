"""One adapter for every version of TensorRT, against fakes that have that version's names alone."""

import sys

import fake_tensorrt
import pytest
import torch

from adm_rt.engines import tensorrt_adapter
from adm_rt.engines.tensorrt_adapter import Profile, TensorRT
from adm_rt.errors import EngineError, MissingExtraError

IDS = ["-".join(pair) for pair in fake_tensorrt.VERSIONS]


@pytest.fixture(params=fake_tensorrt.VERSIONS, ids=IDS)
def trt(request):
    return fake_tensorrt.make(*request.param)


@pytest.fixture
def library(trt):
    return TensorRT(trt)


@pytest.fixture
def onnx_file(tmp_path):
    inputs = {"x": [-1, 3, 4, 4], "t": [-1]}
    text = fake_tensorrt.onnx_text(inputs, ["output", [-1, 6, 4, 4]], 2.0, layers=5, plugins=2)
    path = tmp_path / "unet.onnx"
    path.write_text(text)
    return path


def install(monkeypatch, **modules):
    """sys.modules as if exactly these were installed."""
    monkeypatch.delenv(tensorrt_adapter.MODULE_VARIABLE, raising=False)
    for name in tensorrt_adapter.MODULES:
        monkeypatch.setitem(sys.modules, name, modules.get(name))


def test_without_tensorrt_the_error_gives_the_pip_command_and_what_runs_instead(monkeypatch):
    install(monkeypatch)
    with pytest.raises(MissingExtraError) as caught:
        tensorrt_adapter.library()
    text = str(caught.value)
    assert "pip install 'adm_rt[tensorrt]'" in text
    for engine in ("torch", "native", "onnx"):
        assert f"engine={engine!r}" in text


def test_tensorrt_itself_comes_before_rtx_and_the_variable_decides(monkeypatch):
    full = fake_tensorrt.make("tensorrt", "10.13.3")
    rtx = fake_tensorrt.make("tensorrt_rtx", "1.7.1")
    install(monkeypatch, tensorrt=full, tensorrt_rtx=rtx)
    assert tensorrt_adapter.library().module is full
    assert tensorrt_adapter.library("tensorrt_rtx").module is rtx
    monkeypatch.setenv("ADM_RT_TENSORRT", "tensorrt_rtx")
    assert tensorrt_adapter.library().is_rtx
    monkeypatch.setenv("ADM_RT_TENSORRT", "tensorrt8")
    with pytest.raises(ValueError, match="tensorrt8.*allowed: tensorrt, tensorrt_rtx"):
        tensorrt_adapter.library()


def test_an_old_tensorrt_is_not_used(monkeypatch):
    old = fake_tensorrt.make("tensorrt", "10.12.0.36")
    install(monkeypatch, tensorrt=old)
    with pytest.raises(MissingExtraError, match=r"10.12.0.36 is installed, 10.13 or newer"):
        tensorrt_adapter.library()
    rtx = fake_tensorrt.make("tensorrt_rtx", "1.7.1")
    install(monkeypatch, tensorrt=old, tensorrt_rtx=rtx)
    assert tensorrt_adapter.library().module is rtx


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: no such file')")
    install(monkeypatch)
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtraError, match="libnvinfer.so.11: no such file"):
        tensorrt_adapter.library()


def test_a_folder_that_is_called_so_is_not_tensorrt(monkeypatch, tmp_path):
    (tmp_path / "tensorrt").mkdir()
    install(monkeypatch)
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # an installed one would come first
    with pytest.raises(MissingExtraError, match=r"tensorrt is not TensorRT.*adm_rt\[tensorrt\]"):
        tensorrt_adapter.library()


@pytest.mark.parametrize(
    "text, profile",
    [("8", (8, 8, 8)), (8, (8, 8, 8)), ("1,8,32", (1, 8, 32)), (" 2, 2,4", (2, 2, 4))],
)
def test_profiles(text, profile):
    parsed = Profile.parse(text)
    assert parsed == profile and Profile.parse(str(parsed)) == parsed
    assert parsed.static == (profile[0] == profile[2])
    assert [parsed.covers(n) for n in (profile[0] - 1, profile[0], profile[2], profile[2] + 1)] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("text", ["", "0", "-1", "8,4", "8,4,1", "a", "1,2,3,4", "1.5"])
def test_what_is_no_profile(text):
    with pytest.raises(ValueError, match="least,tuned,most"):
        Profile.parse(text)


@pytest.mark.parametrize("profile", [Profile(1, 4, 8), Profile(4, 4, 4)])
@pytest.mark.parametrize("refit", [False, True])
def test_build(trt, library, onnx_file, profile, refit):
    timing = None if library.is_rtx else b"earlier"
    built = library.build(
        onnx_file, profile, refit=refit, timing_cache=timing, workspace=1 << 30, listing=True
    )
    (_, flags, shapes) = next(call for call in trt.calls if call[0] == "build")
    expected = {"REFIT"} if refit else set()
    assert set(flags) == expected | ({"REQUIRE_USER_ALLOCATION"} if library.is_rtx else set())
    assert shapes["x"] == tuple((n, 3, 4, 4) for n in profile)
    assert shapes["t"] == tuple((n,) for n in profile)
    assert ("workspace", 1 << 30) in trt.calls
    assert built.plugins == 2
    assert built.listing == "Layers:\none\ntwo"
    assert built.timing_cache == (None if library.is_rtx else b"earlier+")
    engine = library.load(built.plan)
    assert engine.profile == profile and engine.refittable == refit
    assert engine.inputs == ["x", "t"] and engine.outputs == ["output"]


def test_a_timing_cache_of_another_version_is_begun_anew(trt, library, onnx_file):
    if library.is_rtx:
        pytest.skip("TensorRT-RTX has no use for a timing cache here")
    built = library.build(onnx_file, Profile(1, 1, 1), timing_cache=b"alien")
    assert built.timing_cache == b"+"


def test_another_gpu_is_rtx_alone(trt, library, onnx_file):
    if library.is_rtx:
        library.build(onnx_file, Profile(1, 1, 1), compute_capability="8.9")
        assert ("capability", "SM89", 0) in trt.calls
        with pytest.raises(ValueError, match="'9.0' is not known.*allowed: 8.0, 8.9"):
            library.build(onnx_file, Profile(1, 1, 1), compute_capability="9.0")
    else:
        with pytest.raises(ValueError, match="GPU of this machine only"):
            library.build(onnx_file, Profile(1, 1, 1), compute_capability="8.9")


@pytest.mark.parametrize("what", ["parse", "build"])
def test_a_failed_build_says_what_tensorrt_said(trt, library, onnx_file, what):
    trt.fail[what] = "node_conv:\n no such thing"
    with pytest.raises(EngineError, match=f"{what}.* unet.onnx: node_conv: no such thing"):
        library.build(onnx_file, Profile(1, 1, 1))
    with pytest.raises(EngineError, match="such thing; an engine without refit may build"):
        trt.fail = {"build": "no such thing"}
        library.build(onnx_file, Profile(1, 1, 1), refit=True)
    trt.fail = {}
    assert library.build(onnx_file, Profile(1, 1, 1)).plan


def test_only_the_batch_may_be_dynamic(library, tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text(fake_tensorrt.onnx_text({"x": [-1, 3, -1, 4]}, ["output", [-1, 3, 4, 4]], 1.0))
    with pytest.raises(EngineError, match="input x.*only the batch may be dynamic"):
        library.build(path, Profile(1, 1, 1))


def test_run(trt, library, onnx_file):
    engine = library.load(library.build(onnx_file, Profile(1, 2, 4)).plan)
    memory = torch.empty(engine.memory_bytes, dtype=torch.uint8)
    engine.set_memory(memory.data_ptr(), len(memory))
    for batch in (1, 3, 3, 4):
        x, t = torch.randn(batch, 3, 4, 4), torch.full((batch,), 500.0)
        out = torch.empty(batch, 6, 4, 4)
        tensors = {"x": x, "t": t, "output": out}
        engine.run({n: (v.data_ptr(), v.shape) for n, v in tensors.items()}, 7)
        assert torch.equal(out[:, :3], 2 * x + 0.5) and torch.equal(out[:, 3:], out[:, :3])
    assert trt.calls.count(("run", 7)) == 4
    x, t, out = torch.randn(5, 3, 4, 4), torch.zeros(5), torch.empty(5, 6, 4, 4)
    tensors = {n: (v.data_ptr(), v.shape) for n, v in {"x": x, "t": t, "output": out}.items()}
    with pytest.raises(EngineError, match=r"x of shape \(5, 3, 4, 4\).*batches of 1,2,4.*profile"):
        engine.run(tensors, 7)
    trt.fail["run"] = "an illegal memory access"
    tensors = {n: (v.data_ptr(), v[:2].shape) for n, v in {"x": x, "t": t, "output": out}.items()}
    with pytest.raises(EngineError, match="could not run.*illegal memory access"):
        engine.run(tensors, 7)


def test_capturable_is_what_rtx_says(trt, library, onnx_file):
    engine = library.load(library.build(onnx_file, Profile(1, 1, 1)).plan)
    assert engine.capturable(0)
    trt.fail["capture"] = ""
    assert engine.capturable(0) == (not library.is_rtx)


def test_an_engine_of_another_version_does_not_load(library):
    with pytest.raises(EngineError, match="cannot load this engine: made by another version"):
        library.load(b'{"by": "9"}')


def test_refit(trt, library, onnx_file, tmp_path):
    engine = library.load(library.build(onnx_file, Profile(1, 1, 1), refit=True).plan)
    other = tmp_path / "other.onnx"
    other.write_text(onnx_file.read_text().replace('"scale": 2.0', '"scale": 5.0'))
    assert engine.refit(other) == ""
    assert b'"scale": 5.0' in engine.serialize()
    trt.fail["weights"] = ""
    assert engine.refit(other) == "1 weights have no new value, the first is 'conv.weight'"
    trt.fail["refit"] = "shapes differ"
    assert engine.refit(other) == "shapes differ"
    fixed = library.load(library.build(onnx_file, Profile(1, 1, 1)).plan)
    assert fixed.refit(other) == "it was not built to be refitted"
