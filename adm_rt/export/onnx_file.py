"""A ``GraphBuilder``'s graph and weights -> an ONNX file, or two when it is large.

The file holds names, shapes and values: no path, no date, no trace of the machine, so that the
same weights give the same bytes. Above ``EXTERNAL_ABOVE`` (a protocol buffer ends at 2 GiB) the
weights go, one after the other, to ``<file>.data`` beside it.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adm_rt import __version__
from adm_rt.export.graph_builder import TENSOR_TYPES, GraphBuilder
from adm_rt.export.initializers import initializer
from adm_rt.export.nodes import DOMAIN, OPS_VERSION, OPSET
from adm_rt.models.safetensors_file import stored_array

IR_VERSION = 10  # of onnx 1.16; newer ones say nothing that these graphs need
EXTERNAL_ABOVE = 2**31 - 2**25
_ALIGNMENT = 4096  # of weights in the data file: they can be mapped
_ITEM_BYTES = {"float32": 4, "int64": 8, "float16": 2, "bfloat16": 2}


def write_onnx(
    graph: GraphBuilder,
    state: Mapping[str, np.ndarray],
    path: Path,
    inputs: Mapping[str, tuple],
    outputs: Mapping[str, tuple],
    external_above: int | None = None,
) -> Path | None:
    """Write ``path``; returns the data file's path where there is one.

    state: name -> float32 array. inputs, outputs: name -> (dtype, dims), dims ints or a name.
    Raises CheckpointError for a weight that the graph's dtype cannot hold.
    """
    import onnx
    from onnx import helper

    limit = EXTERNAL_ABOVE if external_above is None else external_above
    data = path.with_name(path.name + ".data") if weight_bytes(graph) > limit else None
    tensors = [_constant(name, *graph.constants[name]) for name in graph.constants]
    if data is None:
        for name in graph.weights:
            tensors.append(_tensor(graph, name))
            tensors[-1].raw_data = _values(graph, name, state).tobytes()
    else:
        with open(data, "wb") as file:
            for name in graph.weights:
                tensors.append(_tensor(graph, name))
                _append(file, tensors[-1], data.name, _values(graph, name, state))
    proto = helper.make_graph(
        [_node(operation) for operation in graph.operations],
        path.stem,
        [_value_info(name, *spec) for name, spec in inputs.items()],
        [_value_info(name, *spec) for name, spec in outputs.items()],
        tensors,
    )
    model = helper.make_model(
        proto,
        functions=_functions(graph),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, OPS_VERSION)],
        ir_version=IR_VERSION,
        producer_name="adm_rt",
        producer_version=__version__,
    )
    onnx.save_model(model, path)
    return data


def weight_bytes(graph: GraphBuilder) -> int:
    """Bytes of all weights in the file."""
    return sum(math.prod(w.shape) * _ITEM_BYTES[w.dtype] for w in graph.weights.values())


def node_counts(graph: GraphBuilder) -> dict[str, int]:
    """Op -> number of nodes; ours are called "adm_rt::<name>"."""
    names = (f"{o.domain}::{o.kind}" if o.domain else o.kind for o in graph.operations)
    return dict(sorted(collections.Counter(names).items()))


def _functions(graph):
    from adm_rt.export.functions import function

    used = dict.fromkeys(o.kind for o in graph.operations if o.domain == DOMAIN)
    return [function(name) for name in used]


def _node(operation):
    from onnx import helper

    return helper.make_node(
        operation.kind,
        list(operation.inputs),
        list(operation.outputs),
        operation.name,
        domain=operation.domain,
        **operation.attributes,
    )


def _value_info(name, dtype, dims):
    from onnx import helper

    return helper.make_tensor_value_info(name, TENSOR_TYPES[dtype], list(dims))


def _proto(name, dtype, shape):
    from onnx import TensorProto

    return TensorProto(name=name, data_type=TENSOR_TYPES[dtype], dims=shape)


def _constant(name, dtype, values):
    proto = _proto(name, dtype, values.shape)
    little = values.astype("<i8") if dtype == "int64" else stored_array(name, values, dtype)
    proto.raw_data = little.tobytes()
    return proto


def _tensor(graph, name):
    weight = graph.weights[name]
    return _proto(name, weight.dtype, weight.shape)


def _values(graph, name, state):
    """The initializer's values in the bytes of its dtype."""
    weight, values = graph.weights[name], initializer(name, state)
    if values.size != math.prod(weight.shape):
        raise AssertionError(f"{name} is {values.shape}, the graph has {weight.shape}")
    return stored_array(name, values, weight.dtype)


def _append(file, proto, location, values):
    from onnx import TensorProto

    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    entries = {"location": location, "offset": file.tell(), "length": values.nbytes}
    for key, value in entries.items():
        proto.external_data.add(key=key, value=str(value))
    proto.data_location = TensorProto.EXTERNAL
    file.write(memoryview(np.ascontiguousarray(values)).cast("B"))
