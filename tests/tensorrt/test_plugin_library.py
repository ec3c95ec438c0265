"""The C++ plugins against the Python ones: names, fields, types, shapes and what they launch.

The table of nodes is compared from its source text, everywhere. With TensorRT's headers
(ADM_RT_TENSORRT_INCLUDE) the plugins are compiled and driven; neither TensorRT nor CUDA is needed.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_tensorrt_plugins import ATTRIBUTES, SHAPES

from adm_rt.engines import tensorrt_plugins
from adm_rt.export.nodes import NODES, PLUGIN_NAMESPACE, PLUGIN_VERSION, T

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "tensorrt"
DIRECTIONS = {
    "kForward": ("forward",),
    "kForwardForBackward": ("forward_with_moments", "forward_with_stats"),
    "kBackward": ("backward",),
}
FIELD_TYPES = {"int": 5, "float": 1}  # nvinfer1::PluginFieldType


def table():
    """Rows (name, op, direction, modulated, silu, order) of csrc/tensorrt/nodes.h."""
    text = (SOURCES / "nodes.h").read_text()
    rows = text[text.index("kNodes = {{") : text.index("}};", text.index("kNodes = {{"))]
    pattern = r'\{"(\w+)", Op::(\w+), Direction::(\w+), (\w+), (\w+), (?:\{\}|QkvOrder::(\w+))\}'
    return re.findall(pattern, rows)


def test_the_table_in_cpp_is_the_one_of_the_exporter():
    rows = table()
    assert [row[0] for row in rows] == list(NODES)
    for (_, op, direction, modulated, silu, order), node in zip(rows, NODES.values(), strict=True):
        assert {"kAdaGroupNorm": "ada_group_norm", "kQkvAttention": "qkv_attention"}[op] == node.op
        options = node.options
        assert options["direction"] in DIRECTIONS[direction]
        assert (modulated == "true") == options.get("modulated", False), node.name
        assert (silu == "true") == options.get("silu", False), node.name
        assert order == {"legacy": "kLegacy", "new": "kNew", None: ""}[options.get("order")]
    text = (SOURCES / "nodes.h").read_text()
    assert f'kNamespace = "{PLUGIN_NAMESPACE}"' in text
    assert f'kVersion = "{PLUGIN_VERSION}"' in text
    fields = set(re.findall(r'\{"(\w+)", (?:&Attributes::\w+, nullptr|nullptr, &)', text))
    assert fields == {name for node in NODES.values() for name in node.attributes}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What the harness printed, in order."""
    include = os.environ.get("ADM_RT_TENSORRT_INCLUDE")
    if not include:
        pytest.skip("ADM_RT_TENSORRT_INCLUDE does not name a folder with TensorRT's headers")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("harness")
    # All that TensorRT's headers want of CUDA's.
    (folder / "cuda_runtime_api.h").write_text(
        "typedef struct CUstream_st* cudaStream_t;\ntypedef struct CUevent_st* cudaEvent_t;\n"
    )
    program = folder / "harness"
    command = [compiler, "-std=c++17", "-O0", "-fsanitize=address,undefined", "-Wall", "-Werror"]
    command += ["-Wno-deprecated-declarations", f"-I{ROOT / 'csrc'}", "-isystem", include]
    command += ["-isystem", str(folder), str(Path(__file__).with_name("plugin_harness.cpp"))]
    command += [str(path) for path in sorted(SOURCES.glob("*.cpp"))] + ["-o", str(program)]
    subprocess.run(command, check=True, timeout=600)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_creators_have_the_names_versions_and_fields_of_the_python_ones(facts):
    found = [fact for fact in facts if "node" in fact]
    assert found == [
        {
            "node": node.name,
            "version": PLUGIN_VERSION,
            "namespace": PLUGIN_NAMESPACE,
            "fields": [[name, FIELD_TYPES[kind]] for name, kind in node.attributes.items()],
        }
        for node in NODES.values()
    ]


def test_plugins_have_the_tensors_of_the_table(facts):
    found = [fact for fact in facts if "serialized" in fact]
    for fact, node in zip(found, NODES.values(), strict=True):
        assert fact["name"] == node.name
        expected = [ATTRIBUTES[name] for name in node.attributes]
        assert fact["serialized"] == pytest.approx(expected)
        tensors = (*node.inputs.values(), *node.outputs.values())
        assert fact["of_node_type"] == [int(kind == T) for kind, _ in tensors]
        assert fact["shapes"] == [list(SHAPES[dims]) for _, dims in node.outputs.values()]


class Recorder:
    """Records what the Python plugins launch, in the words of the harness."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments):
            if name.startswith("ada_group_norm"):
                shape, options, inputs, outputs, *rest = arguments
                fact = {"shape": shape, "options": options}
            else:
                count = 6 if "backward" in name else 3
                inputs, sizes, rest = arguments[:count], arguments[count:-1], arguments[-1:]
                outputs, fact = (), {"sizes": sizes}
            fact |= {"call": name, "inputs": inputs, "outputs": outputs, "rest": rest}
            self.calls.append({k: v if k == "call" else list(v) for k, v in fact.items()})

        return call


def test_both_launch_the_same(facts):
    recorder = Recorder()
    for node in NODES.values():
        names = (*node.inputs, *node.outputs)
        pointers = {name: 1000 + i for i, name in enumerate(names)}
        shapes = {name: SHAPES[dims] for name, (_, dims) in node.inputs.items()}
        for code in (0, 1, 2):
            arguments = (node, ATTRIBUTES, shapes, code, pointers, 77, 88)
            if node.options["direction"] == "backward" and node.op == "ada_group_norm":
                arguments = (node, {"groups": ATTRIBUTES["groups"]}, *arguments[2:])
            tensorrt_plugins.launch(recorder, *arguments)
    found = [fact for fact in facts if "call" in fact]
    assert len(found) == len(recorder.calls) == 3 * len(NODES)
    for ours, python in zip(found, recorder.calls, strict=True):
        eps, own_eps = ours.get("options", [0])[0], python.get("options", [0])[0]
        assert eps == pytest.approx(own_eps)
        for fact in (ours, python):
            fact["options"] = [int(value) for value in fact.get("options", [])[1:]]
        assert ours == python
    sizes = [fact["workspace"] for fact in facts if "workspace" in fact]
    expected = {"ada_group_norm": [100, 200], "qkv_attention": [0, 300]}
    assert sizes == [
        expected[node.op][node.options["direction"] == "backward"]
        for node in NODES.values()
        for _ in range(3)
    ]


def test_wrong_attributes_and_ranks_go_into_the_log(facts):
    texts = [fact["log"] for fact in facts if "log" in fact]
    assert len(texts) == 4 * len(NODES)  # one for the attributes, one for a wrong rank per type
    assert all(text.startswith("adm_rt plugin ") for text in texts)
    assert sum("is missing or is not" in text for text in texts) == len(NODES)
    assert sum(text.endswith(("not 4", "not 3")) for text in texts) == 3 * len(NODES)
