"""manifest.json of an exported folder: written, read back, and what is wrong with one is said."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
from tiny_models import TINY_CLASSES, tiny_config

from adm_rt.errors import CheckpointError
from adm_rt.export import manifest
from adm_rt.export.manifest import (
    MANIFEST_FILE,
    ExportedNetwork,
    interface,
    is_exported_folder,
    read_manifest,
    write_manifest,
)


def entry(file, **more):
    return {
        "file": file,
        "weights_sha256": hashlib.sha256(b"w").hexdigest(),
        "nodes": {"Conv": 3, "adm_rt.qkv_attention_legacy": 1},
        **more,
    }


def write(folder, *, classifier=True, data=False, **changes):
    """An exported folder whose graphs are any bytes: nobody here looks into them."""
    folder.mkdir(exist_ok=True)
    (folder / "unet.onnx").write_bytes(b"unet" * 100)
    networks = {"unet": entry("unet.onnx")}
    if data:
        (folder / "unet.onnx.data").write_bytes(b"weights" * 99)
        networks["unet"]["data_file"] = "unet.onnx.data"
    if classifier:
        (folder / "classifier_gradient.onnx").write_bytes(b"gradient" * 50)
        networks["classifier_gradient"] = entry("classifier_gradient.onnx")
    arguments = {
        "dtype": "float32",
        "opset": 23,
        "cfg": tiny_config(),
        "classifier_cfg": tiny_config("classifier") if classifier else None,
        "networks": networks,
        "metadata": {"class_names": list(TINY_CLASSES), "guidance_scale": 2.0},
        "versions": {"torch": "2.13.0", "onnx": "1.23.2"},
    }
    write_manifest(folder, **{**arguments, **changes})
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "tiny_export", data=True)


def change(folder, edit):
    """Edit the manifest as an object and write it in its own form."""
    path = folder / MANIFEST_FILE
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value, indent=2) + "\n")


def test_what_was_written_is_read(folder):
    read = read_manifest(folder, verify=True)
    assert (read.dtype, read.opset, read.folder) == ("float32", 23, folder)
    assert read.cfg == tiny_config() and read.classifier_gradient.cfg == tiny_config("classifier")
    assert read.metadata == {"class_names": list(TINY_CLASSES), "guidance_scale": 2.0}
    assert read.versions["torch"] == "2.13.0" and read.versions["adm_rt"]
    unet = read.unet
    assert isinstance(unet, ExportedNetwork) and unet.path == folder / "unet.onnx"
    assert unet.sha256 == hashlib.sha256(b"unet" * 100).hexdigest() and unet.bytes == 400
    assert unet.data_file == "unet.onnx.data" and unet.data_bytes == 7 * 99
    assert unet.nodes == {"Conv": 3, "adm_rt.qkv_attention_legacy": 1}
    assert unet.inputs == {
        "x": ("float32", ("N", 3, 16, 16)),
        "t": ("float32", ("N",)),
        "y": ("int64", ("N",)),
    }
    assert unet.outputs == {"output": ("float32", ("N", 6, 16, 16))}
    assert list(read.classifier_gradient.outputs) == ["gradient"]
    assert [n.name for n in read.networks] == ["unet", "classifier_gradient"]


def test_it_names_no_place_and_no_time(folder, tmp_path):
    first = (folder / MANIFEST_FILE).read_bytes()
    assert str(tmp_path).encode() not in first
    shutil.rmtree(folder)
    assert (write(folder, data=True) / MANIFEST_FILE).read_bytes() == first


def test_an_unguided_upsampler(tmp_path):
    cfg = tiny_config("upsampler")
    read = read_manifest(write(tmp_path / "up", classifier=False, cfg=cfg, metadata=None))
    assert read.classifier_gradient is None and read.metadata == {}
    assert read.unet.inputs["low_res"] == ("float32", ("N", 3, 16, 16))
    assert read.unet.inputs["x"] == ("float32", ("N", 3, 32, 32))
    assert "y" not in interface("unet", tiny_config(class_cond=False))[0]


def test_settings_that_name_other_models_are_left_out(tmp_path):
    named = {"classifier": "elsewhere", "guidance_scale": 1.0, "few_step_guidance_scale": 2.5}
    read = read_manifest(write(tmp_path / "e", metadata=named))
    assert read.metadata == {"guidance_scale": 1.0, "few_step_guidance_scale": 2.5}


def test_reading_needs_neither_torch_nor_onnx(folder):
    program = (
        "import sys; from adm_rt.export.manifest import read_manifest\n"
        "read_manifest(sys.argv[1], verify=True)\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_what_is_an_exported_folder(folder, tmp_path):
    assert is_exported_folder(folder)
    assert not is_exported_folder(tmp_path) and not is_exported_folder(tmp_path / "nothing")
    # a model folder has a manifest.json too
    (tmp_path / MANIFEST_FILE).write_text('{"format_version": 1, "files": {}}')
    assert not is_exported_folder(tmp_path)
    (folder / MANIFEST_FILE).write_text("{")
    assert is_exported_folder(folder)  # damaged: reading it says so


# ---- bad input ----


def set_to(*keys, value):
    def edit(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit


BAD = {
    "another version of the ops": (
        set_to("ops_version", value=2),
        r"use version 2 of adm_rt's ops .*exported by adm_rt \S+.*version 1\. Export .* again",
    ),
    "another format": (set_to("format", value="tar"), "format 'tar' version 1"),
    "another format version": (set_to("format_version", value=7), "version 7.*reads .*version 1"),
    "a key too many": (set_to("path", value="/home"), "damaged: its keys are not"),
    "dtype": (set_to("dtype", value="int8"), "dtype 'int8' is not one of float32, float16"),
    "opset": (set_to("opset", value="23"), "opset '23'"),
    "an unknown flag": (set_to("model", "num_chanels", value=3), "model: .*num_channels"),
    "a wrong kind": (set_to("model", "kind", value="classifier"), "'model'|class_cond"),
    "no configuration": (set_to("model", value=[]), "'model' is not an object"),
    "a network too few": (set_to("classifier", value=None), "networks are .*classifier_gradient"),
    "a file outside": (
        set_to("networks", "unet", "file", value="../unet.onnx"),
        "file of unet, '../unet.onnx', is not a plain file name",
    ),
    "data outside": (
        set_to("networks", "unet", "data_file", value="/etc/passwd"),
        "data_file of unet, '/etc/passwd'",
    ),
    "one file for two": (
        set_to("networks", "classifier_gradient", "file", value="unet.onnx"),
        "share a file",
    ),
    "no sha256": (set_to("networks", "unet", "sha256", value="abc"), "sha256 of unet"),
    "other inputs": (
        set_to("networks", "unet", "inputs", "x", value=["float16", ["N", 3, 16, 16]]),
        "inputs of unet are not those of its configuration",
    ),
    "other outputs": (
        set_to("networks", "unet", "outputs", value={}),
        "outputs of unet are not those",
    ),
    "nodes": (set_to("networks", "unet", "nodes", value={"Conv": -1}), "nodes of unet"),
    "metadata": (set_to("metadata", "owner", value="me"), "unknown key 'owner'"),
    "class names": (set_to("metadata", "class_names", value=["A"]), "class_names has 1 .* for 5"),
    "a size": (set_to("networks", "unet", "bytes", value=399), "400 bytes, .* manifest says 399"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_manifest_that_does_not_fit(folder, case):
    edit, message = BAD[case]
    read_manifest(folder)
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def places(value, keys=()):
    """The keys that lead to every value of a nested object."""
    for key, inner in value.items():
        yield (*keys, key)
        if isinstance(inner, dict):
            yield from places(inner, (*keys, key))


def test_no_value_anywhere_breaks_more_than_the_reading(folder):
    text = (folder / MANIFEST_FILE).read_text()
    refused = tried = 0
    for keys in places(json.loads(text)):
        for value in (None, [[]], -1):
            change(folder, set_to(*keys, value=value))
            tried += 1
            try:
                read_manifest(folder)
            except CheckpointError:
                refused += 1
            (folder / MANIFEST_FILE).write_text(text)
    assert tried > 300 and refused > tried // 2


def test_a_manifest_that_is_not_as_it_was_written(folder):
    path = folder / MANIFEST_FILE
    text = path.read_text()
    path.write_text(text.replace('  "dtype"', '    "dtype"'))
    with pytest.raises(CheckpointError, match="not as it was written"):
        read_manifest(folder)
    for damaged in (text[: len(text) // 2], "[]", "", "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match="manifest.json is damaged.*Export the model"):
            read_manifest(folder)
    path.write_bytes(b" " * (manifest._MAX_BYTES + 1))
    with pytest.raises(CheckpointError, match="larger than a manifest can be"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["unet.onnx", "unet.onnx.data", "classifier_gradient.onnx"])
def test_files_that_are_missing_short_or_changed(folder, name):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{name} is damaged: it has {len(data) - 1} bytes"):
        read_manifest(folder)
    path.write_bytes(data[:-1] + b"?")
    read = read_manifest(folder)  # sizes only
    with pytest.raises(CheckpointError, match=f"{name} is damaged or was changed.*sha256"):
        for network in read.networks:
            network.verify()
    with pytest.raises(CheckpointError, match="sha256"):
        read_manifest(folder, verify=True)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing, but the manifest names it"):
        read_manifest(folder)


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_manifest(folder / "unet.onnx")


def test_writing_refuses_what_reading_would(tmp_path):
    place = tmp_path / "bad"
    for changes, message in (
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"metadata": {"class_names": ["A"]}}, "class_names has 1"),
        ({"classifier_cfg": None}, "'classifier_gradient', but there is no configuration"),
        ({"metadata": {"guidance_scale": float("nan")}}, "plain JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            write(place, **changes)
        assert not (place / MANIFEST_FILE).exists()
