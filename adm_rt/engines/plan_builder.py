"""Building a ``_C.Plan``: buffers as values, ops by name, and where each op's weights come from.

A plan is made from shapes alone; the weights are read later, when it is packed, or never, when the
packed ones lie in the cache. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from adm_rt.ops._library import extension


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One value of a plan. shape: (height, width, channels) of one image.

    ``stats``: the buffer [1, 2, channels] of its channels' mean and variance, where its op was
    asked for them.
    """

    id: int
    shape: tuple[int, int, int]
    stats: Buffer | None = None

    @property
    def channels(self):
        return self.shape[2]

    @property
    def floats(self):
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """A weight of an op: its shape, and how it is made from the model's raw weights.

    ``names`` are the raw weights it reads, ``make(*arrays)`` combines them (float32, any layout);
    None takes the one raw weight as it is, in the shape given.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    make: Callable[..., np.ndarray] | None = None

    def array(self, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weight, dense float32 of ``shape``."""
        raw = [weights[name] for name in self.names]
        value = raw[0] if self.make is None else self.make(*raw)
        return np.ascontiguousarray(value, np.float32).reshape(self.shape)


def concatenated(sources: list[WeightSource]) -> WeightSource:
    """The given weights (raw ones) one below the other."""
    rows = sum(source.shape[0] for source in sources)
    names = tuple(name for source in sources for name in source.names)
    return WeightSource(
        (rows, *sources[0].shape[1:]), names, lambda *arrays: np.concatenate(arrays)
    )


class PlanBuilder:
    """A plan under construction, over the raw weights' ``shapes`` (name -> shape).

    ``sources``: index of an op -> {argument: WeightSource}.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes
        self.plan = extension().Plan()
        self.sources: dict[int, dict[str, WeightSource]] = {}

    def input(self, name, shape):
        """A value that ``run`` is given. shape: (height, width, channels)."""
        return Buffer(self.plan.input(name, shape), tuple(shape))

    def output(self, name, value):
        """Name a value that ``run`` hands back."""
        self.plan.output(name, value.id)

    def weight(self, name, make=None, shape=None):
        """The raw weight ``name`` as an op's weight; ``make`` and its ``shape`` where changed."""
        return WeightSource(tuple(shape or self.shapes[name]), (name,), make)

    def layer(self, name, bias=True):
        """{"weight": ..., "bias": ...} of the published layer ``name``."""
        sources = {"weight": self.weight(f"{name}.weight")}
        if bias:
            sources["bias"] = self.weight(f"{name}.bias")
        return sources

    def op(self, op, inputs, shape, *, output="y", stats=False, weights=None, **attributes):
        """Add an op with one output (and its statistics) and return it.

        inputs: name -> Buffer or None (left out). shape: of the output, (height, width, channels).
        weights: argument -> WeightSource. attributes: numbers.
        """
        wanted = {output: shape} | ({"stats": (1, 2, shape[2])} if stats else {})
        made = self.many(op, inputs, wanted, weights=weights, **attributes)
        return dataclasses.replace(made[output], stats=made.get("stats"))

    def many(self, op, inputs, shapes, *, weights=None, **attributes):
        """Add an op with several outputs, name -> shape; returns name -> Buffer."""
        weights = weights or {}
        outputs = {k: Buffer(self.plan.buffer(s), tuple(s)) for k, s in shapes.items()}
        index = self.plan.add(
            op,
            {k: v.id for k, v in inputs.items() if v is not None},
            {k: v.id for k, v in outputs.items()},
            {k: float(v) for k, v in attributes.items()},
            {k: list(v.shape) for k, v in weights.items()},
        )
        if weights:
            self.sources[index] = dict(weights)
        return outputs

    def finish(self):
        """The finished ``LoweredPlan``."""
        self.plan.finish()
        return LoweredPlan(self.plan, self.sources)


@dataclasses.dataclass(frozen=True)
class LoweredPlan:
    """A finished ``_C.Plan`` and where the weights of its ops come from."""

    plan: object
    sources: dict[int, dict[str, WeightSource]]

    def pack(self, weights: Mapping[str, np.ndarray], blob, threads=1):
        """Pack all ops' weights into ``blob`` (``_C.PackedWeights``), on ``threads`` threads.

        Ctrl-C between two ops leaves the blob half packed.
        """

        def one(index):
            arrays = {k: s.array(weights) for k, s in self.sources[index].items()}
            self.plan.pack(index, arrays, blob)

        with ThreadPoolExecutor(max(1, threads), thread_name_prefix="adm_rt-pack") as pool:
            futures = [pool.submit(one, index) for index in self.sources]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
