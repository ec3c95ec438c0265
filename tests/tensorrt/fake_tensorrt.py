"""Modules that look like tensorrt 10.13, 10.16, 11 and tensorrt_rtx, and have nothing else.

``make("tensorrt", "10.13.3")`` has the names of that version alone, so that code which leans on
another version's fails. Its "ONNX" files are JSON {"scale": s, "classes": bool, ...}; an engine of
one computes ``s * x + t / 1000 + y / 100`` on CPU memory, with as many channels as its output has.
"""

import ctypes
import enum
import json
import math
import types

import numpy as np

VERSIONS = [
    ("tensorrt", "10.13.3.9"),
    ("tensorrt", "10.16.1.11"),
    ("tensorrt", "11.4.0.1"),
    ("tensorrt_rtx", "1.7.1.116"),
]


def onnx_text(inputs, output, scale, layers=3, plugins=0):
    """inputs: name -> shape with -1 for the batch; output: (name, shape)."""
    return json.dumps(
        {"inputs": inputs, "output": output, "scale": scale, "layers": layers, "plugins": plugins}
    )


def make(name, version):
    """The module, with ``calls``: a list of what was asked of it."""
    rtx, major = name == "tensorrt_rtx", int(version.split(".")[0])
    ten = not rtx and major == 10
    trt = types.ModuleType(name)
    trt.__version__, trt.calls = version, []
    trt.fail = {}  # what -> message: "parse", "build", "load", "run", "refit", "shape"
    say = trt.calls.append

    flags = ["REFIT", "TF32", "STRIP_PLAN", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"]
    flags += ["FP16", "BF16", "INT8"] if ten else []
    flags += ["REQUIRE_USER_ALLOCATION"] if rtx else []
    trt.BuilderFlag = enum.Enum("BuilderFlag", flags)
    creation = ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if ten else ["STRONGLY_TYPED"]
    trt.NetworkDefinitionCreationFlag = enum.IntEnum(
        "NetworkDefinitionCreationFlag", creation, start=0
    )
    trt.LayerType = enum.Enum("LayerType", ["CONVOLUTION", "PLUGIN_V3"])
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    trt.TensorIOMode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])
    trt.ExecutionContextAllocationStrategy = enum.Enum(
        "ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"]
    )
    if rtx:
        trt.ComputeCapability = enum.Enum("ComputeCapability", ["CURRENT", "SM80", "SM89"])

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Parsed:
        def __init__(self, log):
            self.log, self.num_errors, self.error = log, 0, None

        def get_error(self, index):
            return types.SimpleNamespace(desc=lambda: self.error)

        def read(self, path, what):
            say((what, str(path)))
            if what in trt.fail:
                self.num_errors, self.error = 1, trt.fail[what]
                return None
            with open(path) as file:
                return json.load(file)

    class Network:
        def __init__(self):
            self.graph = None

        num_inputs = property(lambda self: len(self.graph["inputs"]))
        num_layers = property(lambda self: self.graph["layers"])

        def get_input(self, index):
            name, shape = list(self.graph["inputs"].items())[index]
            return types.SimpleNamespace(name=name, shape=tuple(shape))

        def get_layer(self, index):
            ours = index < self.graph["plugins"]
            kind = trt.LayerType.PLUGIN_V3 if ours else trt.LayerType.CONVOLUTION
            return types.SimpleNamespace(type=kind)

    class OnnxParser(Parsed):
        def __init__(self, network, log):
            super().__init__(log)
            self.network = network

        def parse_from_file(self, path):
            self.network.graph = self.read(path, "parse")
            return self.network.graph is not None

    class TimingCache:
        def __init__(self, data):
            self.data = data

        def serialize(self):
            return self.data + b"+"

    class Config:
        def __init__(self):
            self.flags = {trt.BuilderFlag.TF32}
            self.profile, self.max_aux_streams, self.profiling_verbosity = None, None, None

        def set_flag(self, flag):
            self.flags.add(flag)

        def clear_flag(self, flag):
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool, size):
            say(("workspace", size))

        def add_optimization_profile(self, profile):
            self.profile = profile
            return 0

        def create_timing_cache(self, data):
            if rtx:
                raise AssertionError("TensorRT-RTX asks the driver for a GPU here")
            say(("timing", data))
            return None if data.startswith(b"alien") else TimingCache(data)

        def set_timing_cache(self, cache, ignore_mismatch):
            return True

        if rtx:
            num_compute_capabilities = 0

            def set_compute_capability(self, capability, index):
                say(("capability", capability.name, index))
                return True

    class Builder:
        def __init__(self, log):
            self.log = log

        def create_network(self, flags=0):
            if flags != 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
                raise AssertionError("not strongly typed")
            return Network()

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            shapes = {}
            return types.SimpleNamespace(
                shapes=shapes, set_shape=lambda name, *three: shapes.update({name: three})
            )

        def build_serialized_network(self, network, config):
            say(("build", sorted(flag.name for flag in config.flags), config.profile.shapes))
            if "build" in trt.fail:
                self.log.log(ILogger.ERROR, trt.fail["build"])
                return None
            if config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED:
                self.log.log(ILogger.VERBOSE, "Layers:\none\ntwo")
            refit = trt.BuilderFlag.REFIT in config.flags
            text = {**network.graph, "profile": config.profile.shapes, "refit": refit}
            return memoryview(json.dumps({**text, "by": version}).encode())

    class Engine:
        def __init__(self, log, plan):
            self.log, self.plan = log, json.loads(bytes(plan))
            self.names = [*self.plan["inputs"], self.plan["output"][0]]
            self.num_io_tensors, self.refittable = len(self.names), self.plan["refit"]
            self.device_memory_size_v2 = 1000

        def get_tensor_name(self, index):
            return self.names[index]

        def get_tensor_mode(self, name):
            last = name == self.names[-1]
            return trt.TensorIOMode.OUTPUT if last else trt.TensorIOMode.INPUT

        def get_tensor_profile_shape(self, name, profile):
            return self.plan["profile"][name]

        def create_execution_context(self, strategy):
            if strategy != trt.ExecutionContextAllocationStrategy.USER_MANAGED:
                raise AssertionError("memory must be the caller's")
            return Context(self)

        def serialize(self):
            return memoryview(json.dumps(self.plan).encode())

    class Context:
        def __init__(self, engine):
            self.engine, self.shapes, self.addresses, self.memory = engine, {}, {}, None

        def set_device_memory(self, address, size):
            self.memory = (address, size)

        def set_input_shape(self, name, shape):
            low, _, high = self.engine.plan["profile"][name]
            if not low[0] <= shape[0] <= high[0] or list(shape[1:]) != list(low[1:]):
                self.engine.log.log(ILogger.ERROR, f"{name}: shape is not in the profile")
                return False
            self.shapes[name] = shape
            return True

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream):
            say(("run", stream))
            if "run" in trt.fail:
                self.engine.log.log(ILogger.ERROR, trt.fail["run"])
                return False
            if not self.memory or self.memory[1] < self.engine.device_memory_size_v2:
                raise AssertionError("no memory was given")
            if set(self.addresses) != set(self.engine.names):
                raise AssertionError("a tensor has no address")
            values = {name: self._array(name, shape) for name, shape in self.shapes.items()}
            output, shape = self.engine.plan["output"]
            result = self.engine.plan["scale"] * values["x"]
            shift = values["t"] / 1000
            if "y" in values:
                shift = shift + values["y"] / 100
            result = result + shift.astype(np.float32)[:, None, None, None]
            result = np.tile(result, (1, shape[1] // values["x"].shape[1], 1, 1))
            self._array(output, result.shape)[...] = result
            return True

        def _array(self, name, shape):
            kind = ctypes.c_int64 if name == "y" else ctypes.c_float
            memory = (kind * math.prod(shape)).from_address(self.addresses[name])
            return np.frombuffer(memory, dtype=kind).reshape(shape)

        if rtx:

            def is_stream_capturable(self, stream):
                return "capture" not in trt.fail

    class Runtime:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, plan):
            say(("load", len(bytes(plan))))
            if "load" in trt.fail or json.loads(bytes(plan)).get("by") != version:
                self.log.log(ILogger.ERROR, trt.fail.get("load", "made by another version"))
                return None
            return Engine(self.log, plan)

    class Refitter:
        def __init__(self, engine, log):
            self.engine, self.log, self.new = engine, log, None

        def get_missing_weights(self):
            return [] if self.new is not None else ["conv.weight"]

        def refit_cuda_engine(self):
            self.engine.plan["scale"] = self.new
            return True

    class OnnxParserRefitter(Parsed):
        def __init__(self, refitter, log):
            super().__init__(log)
            self.refitter = refitter

        def refit_from_file(self, path):
            graph = self.read(path, "refit")
            if graph is None:
                return False
            if "weights" not in trt.fail:
                self.refitter.new = graph["scale"]
            return True

    class Registry:
        def __init__(self):
            self.creators = {}

        def get_creator(self, kind, version, plugin_namespace=""):
            return self.creators.get((kind, version, plugin_namespace))

        def register_creator(self, creator, plugin_namespace=""):
            key = (creator.name, creator.plugin_version, plugin_namespace)
            if key in self.creators:
                return False
            self.creators[key] = creator
            return True

        def deregister_creator(self, creator):
            if getattr(creator, "from_library", False):
                return False
            self.creators = {k: c for k, c in self.creators.items() if c is not creator}
            return True

        def load_library(self, path):
            say(("library", path))
            return None if "library" in trt.fail else object()

    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.ILogger = ILogger
    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    trt.Refitter, trt.OnnxParserRefitter = Refitter, OnnxParserRefitter
    _add_plugin_classes(trt)
    return trt


def _add_plugin_classes(trt):
    trt.DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64"])
    trt.TensorFormat = enum.Enum("TensorFormat", ["LINEAR", "HWC8"])
    trt.PluginFieldType = enum.Enum("PluginFieldType", ["INT32", "FLOAT32", "CHAR"])
    trt.PluginFieldCollection = list

    class PluginField:
        def __init__(self, name, data, type):
            self.name, self.data, self.type = name, data, type

    class DimsExprs(list):
        def __init__(self, value):
            super().__init__([None] * value if isinstance(value, int) else value)

    trt.PluginField, trt.DimsExprs = PluginField, DimsExprs
    for name in ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime"):
        setattr(trt, name, type(name, (), {}))
    trt.IPluginCreatorV3One = type("IPluginCreatorV3One", (), {})
