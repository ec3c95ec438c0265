"""Building an ONNX graph op by op: values are names, weights stay outside until it is written.

A graph is made of a configuration alone; the weights are read later, when it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np

from adm_rt.export.nodes import DOMAIN, NODES, PLUGIN_NAMESPACE, PLUGIN_VERSION
from adm_rt.models.parameter_shapes import parameter_shapes

# numbers of onnx.TensorProto.DataType
TENSOR_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


@dataclasses.dataclass(frozen=True)
class Weight:
    """An initializer that comes of a weight (``initializers.initializer``)."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One node: what ``onnx.helper.make_node`` takes."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str
    attributes: dict[str, Any]


class GraphBuilder:
    """Nodes in order, and the initializers that they name.

    ``dtype``: of the network's trunk; "float32", "float16" or "bfloat16". A value is a string.
    ``scope(name)`` prefixes the names of what is made inside it.
    """

    def __init__(self, cfg, dtype):
        self.cfg, self.dtype = cfg, dtype
        self.shapes = parameter_shapes(cfg)
        self.operations: list[Operation] = []
        self.weights: dict[str, Weight] = {}
        self.constants: dict[str, tuple[str, np.ndarray]] = {}  # name -> (dtype, values)
        self._constant_names: dict[tuple, str] = {}
        self._scope = ""
        self._taken: dict[str, int] = {}

    @contextlib.contextmanager
    def scope(self, name):
        """What is made inside is called ``name.<op>``."""
        outer, self._scope = self._scope, name
        try:
            yield
        finally:
            self._scope = outer

    # ---- nodes ----

    def op(self, kind, *inputs, **attributes):
        """A standard op with one output."""
        return self._add(kind, inputs, 1, "", attributes)[0]

    def split(self, x, axis, sizes):
        """x in parts of ``sizes`` along ``axis``."""
        parts = (x, self.constant(sizes, "int64"))
        return self._add("Split", parts, len(sizes), "", {"axis": axis})

    def node(self, kind, *inputs, **attributes):
        """A node of ``NODES``; its outputs."""
        declared = NODES[kind]
        assert len(inputs) == len(declared.inputs) and set(attributes) == set(declared.attributes)
        attributes |= {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
        return self._add(kind, inputs, len(declared.outputs), DOMAIN, attributes)

    def finish(self, name):
        """Make the newest value the result of the graph, called ``name``."""
        last = self.operations[-1]
        self.operations[-1] = dataclasses.replace(last, outputs=(name,))

    def _add(self, kind, inputs, count, domain, attributes):
        name = self._fresh(f"{self._scope}.{kind}" if self._scope else kind)
        outputs = (name,) if count == 1 else tuple(f"{name}.{i}" for i in range(count))
        made = Operation(kind, name, tuple(inputs), outputs, domain, attributes)
        self.operations.append(made)
        return outputs

    def _fresh(self, name):
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return f"{name}.{count}" if count else name

    # ---- initializers ----

    def weight(self, name, shape=None, wide=False):
        """The initializer ``name``; ``shape`` may differ from the weight's, its bytes do not.

        wide: float32 whatever the trunk computes in.
        """
        made = Weight("float32" if wide else self.dtype, tuple(shape or self.shapes[name]))
        if self.weights.setdefault(name, made) != made:
            raise AssertionError(f"{name} is used as {self.weights[name]} and as {made}")
        return name

    def constant(self, values, dtype):
        """A small tensor; equal ones are one initializer. dtype: or "trunk"."""
        dtype = self.dtype if dtype == "trunk" else dtype
        array = np.asarray(values, np.int64 if dtype == "int64" else np.float32)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constant_names:
            name = f"const.{len(self._constant_names)}"
            self._constant_names[key] = name
            self.constants[name] = (dtype, array)
        return self._constant_names[key]

    # ---- small compositions ----

    def cast(self, x, dtype, source=None):
        """x of type ``source`` (None: the trunk's) as ``dtype``; x itself when that is the same."""
        source, dtype = source or self.dtype, self.dtype if dtype == "trunk" else dtype
        return x if source == dtype else self.op("Cast", x, to=TENSOR_TYPES[dtype])

    def reshape(self, x, shape):
        """0 keeps a dimension (the batch, that is), -1 is what is left."""
        return self.op("Reshape", x, self.constant(shape, "int64"))

    def transpose(self, x, perm):
        return self.op("Transpose", x, perm=list(perm))

    def linear(self, x, name):
        """[N, C] float32 -> [N, C'] float32, C' x C weight and bias in float32."""
        shape = self.shapes[f"{name}.weight"][:2]
        weight = self.weight(f"{name}.weight", shape, wide=True)
        return self.op("Gemm", x, weight, self.weight(f"{name}.bias", wide=True), transB=1)

    def linear_gradient(self, grad, name):
        """The gradient of ``linear`` with respect to x: the same weight, not transposed."""
        shape = self.shapes[f"{name}.weight"][:2]
        return self.op("Gemm", grad, self.weight(f"{name}.weight", shape, wide=True))

    def silu(self, x):
        return self.op("Mul", x, self.op("Sigmoid", x))

    def mean(self, x, axes):
        """The mean over ``axes``, which go away."""
        return self.op("ReduceMean", x, self.constant(axes, "int64"), keepdims=0)
