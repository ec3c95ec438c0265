"""What the TensorRT plugins enqueue against the reference in float64, in a CUDA graph.

No TensorRT is needed: the plugins are made of a stand-in's base classes. Not run on a GPU yet.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import devices
import numpy as np
import pytest
import torch
from node_cases import attention_case, norm_case, types_of

from adm_rt.engines import tensorrt_plugins
from adm_rt.export.nodes import NODES

devices.require()

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tensorrt"))

import fake_tensorrt  # noqa: E402

KINDS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
# Of the largest value; under the emulator a fourth of it at most.
LIMITS = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2.5e-2}
LENGTH = 77
SIZES = {"channels": 64, "groups": 8, "height": 9, "width": 7}
HEADS = {"heads": 2, "head_dim": 64, "length": LENGTH}
CASES = [
    (name, queries)
    for name, node in NODES.items()
    for queries in ((LENGTH, 1) if node.op == "qkv_attention" else (None,))
]


@pytest.fixture(scope="module")
def trt():
    return fake_tensorrt.make("tensorrt", "10.16.1")


def made_plugin(trt, case):
    creators = tensorrt_plugins.plugin_creators(trt, tensorrt_plugins.cuda_launchers)
    (creator,) = [c for c in creators if c.name == case.node.name]
    fields = [trt.PluginField(k, np.array([v]), None) for k, v in case.attributes.items()]
    return creator.create_plugin("layer", fields, None)


def descs(trt, tensors):
    """What TensorRT tells a plugin of its tensors, while it builds and when it runs."""
    kinds = {getattr(torch, name): getattr(trt.DataType, kind) for name, kind in KINDS.items()}
    made = [SimpleNamespace(dims=tuple(t.shape), type=kinds[t.dtype]) for t in tensors.values()]
    return [SimpleNamespace(desc=d, max=d.dims, **vars(d)) for d in made]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name, queries", CASES)
def test_a_plugin_enqueues_what_the_reference_says(gpu, trt, name, queries, dtype):
    if queries is None:
        case = norm_case(name, dtype, **SIZES)
    else:
        case = attention_case(name, dtype, queries, **HEADS)
    types = types_of(case.node.inputs | case.node.outputs, dtype)

    def on_device(tensors):
        return {k: v.to(gpu, getattr(torch, types[k])).contiguous() for k, v in tensors.items()}

    inputs, outputs = on_device(case.inputs), on_device(case.outputs)
    plugin = made_plugin(trt, case)
    given, made = descs(trt, inputs), descs(trt, outputs)
    size = plugin.get_workspace_size(given, made)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=gpu)

    def enqueue():
        addresses = [[t.data_ptr() for t in tensors.values()] for tensors in (inputs, outputs)]
        stream = torch.cuda.current_stream(gpu).cuda_stream
        plugin.enqueue(given, made, *addresses, workspace.data_ptr() if size else 0, stream)

    enqueue()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # neither memory nor a wait may be asked for in here
        enqueue()
    for output in outputs.values():
        output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize(gpu)
    for key, found in outputs.items():
        expected = case.outputs[key]
        error = float((found.double().cpu() - expected).abs().max() / expected.abs().max())
        assert error <= LIMITS[dtype], f"{key}: {error:.3g} of the largest value"
