"""engine="onnx" against engine="torch": whole guided runs of the shipped model, and tiny stacks."""

import os
import sys
import tempfile

import numpy as np
import pytest
from tiny_models import tiny_network

import adm_rt
from adm_rt import Pipeline
from adm_rt.errors import CheckpointError, MissingExtraError

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'adm_rt[onnx]'")
pytest.importorskip("onnx", reason="needs onnx: pip install 'adm_rt[onnx]'")

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """The shipped model and its classifier, exported."""
    from adm_rt.export import export_model
    from adm_rt.loading import load_parts

    parts = load_parts("glyphs32", None, None, "native", "cpu", "auto", None, {})
    folder = tmp_path_factory.mktemp("exported") / "glyphs32_onnx"
    return export_model(parts["unet"], folder, parts["classifier"], metadata=parts["settings"])


@pytest.fixture(scope="module")
def pipelines(glyphs):
    return adm_rt.load(glyphs), adm_rt.load("glyphs32", engine="torch")


def test_25_guided_steps_are_those_of_torch(pipelines):
    request = {"classes": ["A", "M"], "steps": 25, "seed": 1, **QUIET}
    ours, expected = (pipeline(**request) for pipeline in pipelines)
    assert ours.metadata["engine"] == "onnx" and expected.metadata["engine"] == "torch"
    # the folder's own defaults are the model's
    for key in ("sampler", "guidance_scale", "timesteps"):
        assert ours.metadata[key] == expected.metadata[key]
    assert ours.metadata["guidance_scale"] > 0 and len(ours.metadata["timesteps"]) == 25
    apart = np.abs(ours.images.astype(int) - expected.images)
    assert (apart <= 1).mean() >= 0.999, f"{(apart > 1).mean():.2%} differ by up to {apart.max()}"
    assert expected.images.std() > 20


def test_an_ordinary_model_is_exported_for_the_run(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pipeline = adm_rt.load("glyphs32", engine="onnx", dtype="float16")
    assert os.listdir(tmp_path) == []
    assert any("adm-rt export MODEL --out FOLDER" in note for note in pipeline.notes)
    assert any("float32 is used on the CPU" in note for note in pipeline.notes)
    request = {"num_images": 2, "steps": 2, **QUIET}
    ours, expected = pipeline(**request), pipelines[0](**request)
    assert np.array_equal(ours.images, expected.images)
    assert (ours.metadata["engine"], ours.metadata["dtype"]) == ("onnx", "float32")


def test_modules_of_a_stack():
    networks = (tiny_network(), tiny_network("classifier", seed=1), tiny_network("upsampler"))
    request = {"classes": [0, 3], "steps": 3, "guidance_scale": 2.0, **QUIET}
    ours = Pipeline(*networks, engine="onnx")(**request)
    expected = Pipeline(*networks, engine="torch")(**request)
    assert ours.images.shape == (2, 32, 32, 3)
    assert np.abs(ours.images.astype(int) - expected.images).max() <= 1
    assert expected.images.std() > 1


def test_weights_in_a_file_of_their_own(pipelines, tmp_path, monkeypatch):
    """As above 2 GB; they must outlive the temporary folder, and are checked like the graph."""
    from adm_rt.export import export_model, onnx_file

    monkeypatch.setattr(onnx_file, "EXTERNAL_ABOVE", 0)
    networks = (tiny_network(), tiny_network("classifier", seed=1))
    request = {"classes": [0, 3], "steps": 3, "guidance_scale": 2.0, **QUIET}
    folder = export_model(networks[0], tmp_path / "big", networks[1])
    assert {"unet.onnx.data", "classifier_gradient.onnx.data"} <= set(os.listdir(folder))
    expected = Pipeline(*networks, engine="torch")(**request).images
    for pipeline in (adm_rt.load(folder), Pipeline(*networks, engine="onnx")):
        assert np.abs(pipeline(**request).images.astype(int) - expected).max() <= 1
    data = folder / "unet.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="unet.onnx.data is damaged or was changed"):
        adm_rt.load(folder)


def test_exporting_for_the_run_without_onnx_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"adm_rt\[onnx\]"):
        adm_rt.load("glyphs32", engine="onnx")
