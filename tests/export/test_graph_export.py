"""``export_model`` and ``adm-rt export``: what is written, what is refused, what is left behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from graph_checks import assert_parity, session, unet_inputs
from tiny_models import TINY_CLASSES, tiny_network

from adm_rt.cli import build_parser, main
from adm_rt.errors import CheckpointError, MissingExtraError
from adm_rt.export import manifest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from adm_rt.export import export_model, exporter, nodes, onnx_file  # noqa: E402


@pytest.fixture(scope="module")
def networks():
    return tiny_network(seed=3), tiny_network("classifier", seed=1)


@pytest.fixture(scope="module")
def exported(networks, tmp_path_factory):
    """Both networks in float32. Do not write into it."""
    return export_model(networks[0], tmp_path_factory.mktemp("exported") / "out", networks[1])


def test_the_folder_and_its_manifest(networks, exported):
    files = ["classifier_gradient.onnx", "manifest.json", "unet.onnx"]
    assert sorted(os.listdir(exported)) == files
    read = manifest.read_manifest(exported, verify=True)
    assert read.dtype == "float32" and read.opset == nodes.OPSET == 23
    assert read.unet.cfg == networks[0].cfg
    assert read.classifier_gradient.cfg == networks[1].cfg
    assert manifest.OPS_VERSION == nodes.OPS_VERSION
    for network in read.networks:
        model = onnx.load(network.path)
        assert {o.domain: o.version for o in model.opset_import} == {"": 23, "adm_rt": 1}
        interface = {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*model.graph.input, *model.graph.output)
        }
        declared = {**network.inputs, **network.outputs}
        assert interface == {name: list(dims) for name, (_, dims) in declared.items()}
        ours = {n: c for n, c in network.nodes.items() if n.startswith("adm_rt::")}
        assert sum(network.nodes.values()) == len(model.graph.node)
        used = {f"adm_rt::{f.name}" for f in model.functions}
        assert used == set(ours) and all(f.domain == "adm_rt" for f in model.functions)


def test_nodes_carry_the_plugin_attributes_of_their_table(exported):
    for file in exported.glob("*.onnx"):
        for node in onnx.load(file).graph.node:
            if node.domain == "adm_rt":
                declared = nodes.NODES[node.op_type]
                given = {a.name: a for a in node.attribute}
                assert given.pop("plugin_namespace").s == b"adm_rt"
                assert given.pop("plugin_version").s == b"1"
                kinds = {"int": onnx.AttributeProto.INT, "float": onnx.AttributeProto.FLOAT}
                wanted = {name: kinds[kind] for name, kind in declared.attributes.items()}
                assert {name: a.type for name, a in given.items()} == wanted
                assert len(node.input) == len(declared.inputs)
                assert len(node.output) == len(declared.outputs)


def test_the_same_bytes_again_and_nothing_of_this_machine(networks, exported, tmp_path):
    again = export_model(networks[0], tmp_path / "elsewhere", networks[1])
    for name in os.listdir(exported):
        data = (exported / name).read_bytes()
        assert data == (again / name).read_bytes()
        for secret in (str(Path.home()), str(tmp_path), os.getcwd(), str(exported)):
            assert len(secret) < 4 or secret.encode() not in data
    for name in ("unet.onnx", "classifier_gradient.onnx"):
        model = onnx.load(exported / name)
        assert not model.metadata_props and not model.doc_string and not model.graph.doc_string
        for node in (*model.graph.node, *(n for f in model.functions for n in f.node)):
            assert not node.metadata_props and not node.doc_string


def test_weights_above_the_limit_lie_beside_the_graph(networks, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_ABOVE", 1000)
    folder = export_model(networks[0], tmp_path / "out", networks[1])
    for name, network in (("unet", networks[0]), ("classifier_gradient", networks[1])):
        path = folder / f"{name}.onnx"
        assert path.stat().st_size < 2e5 < (folder / f"{name}.onnx.data").stat().st_size
        onnx.checker.check_model(str(path), full_check=True)
        assert_parity(network, path, batches=(2,))
    read = manifest.read_manifest(folder, verify=True)
    assert read.unet.data_file == "unet.onnx.data"
    assert read.unet.weights_sha256 == manifest.read_manifest(exported).unet.weights_sha256
    # a moved folder still finds its data
    moved = folder.rename(tmp_path / "moved")
    assert_parity(networks[0], moved / "unet.onnx", batches=(1,))


def test_class_names_and_settings_travel(tiny_folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["export", str(tiny_folder), "--dtype", "fp16", "--out", str(out)]) == 0
    assert "unet.onnx" in capsys.readouterr().out
    read = manifest.read_manifest(out, verify=True)
    assert read.dtype == "float16" and read.classifier_gradient is not None
    assert read.metadata == {"class_names": list(TINY_CLASSES), "guidance_scale": 2.0}
    without = tmp_path / "without"
    assert main(["export", str(tiny_folder), "--classifier", "none", "--out", str(without)]) == 0
    assert manifest.read_manifest(without).classifier_gradient is None


def test_an_upsampler_is_exported(tiny_upsampler_folder, tmp_path):
    assert main(["export", str(tiny_upsampler_folder), "--out", str(tmp_path / "out")]) == 0
    read = manifest.read_manifest(tmp_path / "out")
    assert "low_res" in read.unet.inputs and read.classifier_gradient is None


def test_export_needs_no_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from adm_rt.cli import build_parser, main\n"
        f"sys.exit(main(['export', 'glyphs32', '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    given = unet_inputs(manifest.read_manifest(tmp_path / "out").cfg, 1)
    assert np.isfinite(session(tmp_path / "out" / "unet.onnx").run(None, given)[0]).all()


# ---- refusals ----


def refused(networks, folder, error, match, **options):
    """``export_model`` raises, and leaves its parent folder as it was."""
    before = sorted(os.listdir(folder.parent)) if folder.parent.is_dir() else None
    with pytest.raises(error, match=match):
        export_model(networks[0], folder, **options)
    after = sorted(os.listdir(folder.parent)) if folder.parent.is_dir() else None
    assert before == after


def test_bad_arguments_are_named(networks, tmp_path):
    unet, classifier = networks
    out = tmp_path / "out"
    refused(networks, out, ValueError, "dtype='int8' is not known; allowed: float32", dtype="int8")
    refused((classifier,), out, ValueError, "the model is a classifier")
    refused(networks, out, ValueError, "loss_scale=4.0 is for a classifier", loss_scale=4.0)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        guided = {"classifier": classifier, "loss_scale": scale}
        refused(networks, out, ValueError, "loss_scale=.* must be positive and finite", **guided)
    small = tiny_network("classifier", image_size=32)
    refused(networks, out, ValueError, "made for 32x32 images.*makes 16x16", classifier=small)
    classes = tiny_network("classifier", num_classes=7)
    refused(networks, out, ValueError, "knows 7 classes.*has 5", classifier=classes)
    upsampler = (tiny_network("upsampler"),)
    other = {"classifier": tiny_network("classifier", image_size=32)}
    refused(upsampler, out, ValueError, "an upsampler is not guided", **other)
    refused(networks, out, ValueError, "plain JSON values", metadata={"class_names": {1, 2}})


def test_a_weight_beyond_float16(tmp_path):
    network = tiny_network(seed=3).requires_grad_(False)
    network.middle_block[0].in_layers[2].weight[0, 0, 0, 0] = 1e5
    refused(
        (network,),
        tmp_path / "out",
        CheckpointError,
        "middle_block.0.in_layers.2.weight.*float16.*65504.*bfloat16",
        dtype="float16",
    )
    export_model(network, tmp_path / "out", dtype="bfloat16")


def test_places_that_cannot_be_written(networks, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    refused(networks, tmp_path / "full", CheckpointError, "not empty. Choose another")
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"
    refused(networks, tmp_path / "full" / "mine.txt", CheckpointError, "is not a folder")
    refused(networks, tmp_path / "full" / "mine.txt" / "out", CheckpointError, "cannot write")
    refused(networks, Path("/proc/nowhere/out"), CheckpointError, "cannot write /proc/nowhere/out")
    (tmp_path / "empty").mkdir()
    export_model(networks[0], tmp_path / "empty")
    assert (tmp_path / "empty" / "manifest.json").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(networks, tmp_path, monkeypatch, error):
    write, calls = onnx_file.write_onnx, []

    def failing(graph, state, path, *rest):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise error
        return write(graph, state, path, *rest)

    monkeypatch.setattr(exporter, "write_onnx", failing)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_model(networks[0], tmp_path / "out", networks[1])
    assert len(calls) == 2 and os.listdir(tmp_path) == []


def test_without_onnx_the_extra_is_named(networks, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(networks, tmp_path / "out", MissingExtraError, r"pip install 'adm_rt\[onnx\]'")
    assert main(["export", "glyphs32", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'adm_rt[onnx]'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_an_old_onnx_is_named(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "__version__", "1.16.2")
    refused(networks, tmp_path / "out", MissingExtraError, "onnx 1.16.2 does not know opset 23")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["glyphs32", "--out", "o", "--dtype", "int8"], "allowed: fp32, fp16, bf16"),
        (["nothing_here", "--out", "o"], "neither a shipped model nor"),
        (["glyphs32_classifier", "--out", "o"], "is a classifier"),
        (["glyphs32", "--out", ""], "out='' is empty"),
        (["EXPORTED", "--out", "o"], "an exported folder already"),
        (["glyphs32", "--classifier", "SMALL", "--out", "o"], "made for 16x16 images"),
        (
            ["glyphs32", "--classifier", "glyphs32", "--out", "o"],
            "classifier='glyphs32' is of kind",
        ),
    ],
)
def test_command_lines_that_are_refused(
    arguments, message, exported, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    places = {"EXPORTED": str(exported), "SMALL": str(tiny_folder / "classifier")}
    assert main(["export", *(places.get(a, a) for a in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adm-rt: error: ") and message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_the_manifest_is_plain_json_without_paths(exported):
    text = (exported / "manifest.json").read_text()
    assert json.loads(text)["format"] == "adm_rt export"
    assert "/" not in text


PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not part of this installation")
def test_the_page_has_our_nodes_and_commands_that_parse():
    section = PAGE.read_text().split("## Export and run without PyTorch")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)
    ends = [re.findall(r"`(_\w+)`", cell) + ([""] if "none" in cell else []) for _, cell in rows]
    for i in range(len(rows)):
        ends[i] = ends[i] or ends[i - 1]  # "the same"
    named = {name + end for (name, _), endings in zip(rows, ends) for end in endings}
    assert named == set(nodes.NODES)
    (command,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    program, name, *arguments = command.split()
    assert program == "adm-rt" and build_parser(name).parse_args([name, *arguments])
