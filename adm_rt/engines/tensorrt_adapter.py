"""TensorRT behind one interface: whatever differs between its versions is in this file.

Served are ``tensorrt`` 10.13 and newer, ``tensorrt`` 11 and ``tensorrt_rtx`` (TensorRT for RTX).
What they have in common is enough: strongly typed networks (the types are those of the ONNX file),
``execute_async_v3``, memory given by the caller. The differences:

* 10 must be asked for a strongly typed network, 11 and RTX make no other;
* RTX alone builds for GPUs that are not there, wants to be told when a graph will be captured
  (``REQUIRE_USER_ALLOCATION``), and cannot read a timing cache without a GPU;
* a plugin creator is found by ``get_creator`` everywhere (``get_plugin_creator`` is 10's own).
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from adm_rt.errors import EngineError, MissingExtraError

MODULES = ("tensorrt", "tensorrt_rtx")
MODULE_VARIABLE = "ADM_RT_TENSORRT"
OLDEST = {"tensorrt": (10, 13), "tensorrt_rtx": (1, 0)}
INSTALL = "pip install 'adm_rt[tensorrt]'"

_LISTING = "Layers:"


class Profile(NamedTuple):
    """Batch sizes of an engine: smallest, the one it is tuned for, largest; all equal: static."""

    least: int
    tuned: int
    most: int

    @classmethod
    def parse(cls, text):
        """Profile of "8" (static) or "1,8,32" (dynamic); ValueError for anything else."""
        parts = [part.strip() for part in str(text).split(",")]
        numbers = [int(part) if part.isdecimal() else 0 for part in parts]
        if len(numbers) not in (1, 3) or min(numbers) < 1 or sorted(numbers) != numbers:
            raise ValueError(
                f"batch={text!r} is no batch profile; give one size such as 8, or least,tuned,most "
                "such as 1,8,32"
            )
        return cls(*numbers) if len(numbers) == 3 else cls(*numbers * 3)

    @property
    def static(self):
        return self.least == self.most

    def covers(self, batch):
        return self.least <= batch <= self.most

    def __str__(self):
        return str(self.least) if self.static else f"{self.least},{self.tuned},{self.most}"


class Built(NamedTuple):
    """plan: the serialised engine; timing_cache: bytes or None; plugins: PLUGIN_V3 layers of the
    network; listing: TensorRT's own list of the engine's layers, when it was asked for."""

    plan: bytes
    timing_cache: bytes | None
    plugins: int
    listing: str


def library(module=None):
    """The ``TensorRT`` that is installed.

    module: "tensorrt" or "tensorrt_rtx"; None takes ADM_RT_TENSORRT, else the first that is there.
    Raises MissingExtraError, with the pip command and what runs without it.
    """
    wish = module or os.environ.get(MODULE_VARIABLE) or None
    if wish is not None and wish not in MODULES:
        raise ValueError(f"{MODULE_VARIABLE}={wish!r} is unknown; allowed: {', '.join(MODULES)}")
    why = []
    for name in (wish,) if wish else MODULES:
        try:
            module = importlib.import_module(name)
            if not hasattr(module, "__version__"):  # a folder of that name is a package, too
                raise ImportError(f"{list(module.__path__)[0]} is not TensorRT")
            found = TensorRT(module)
        except (ImportError, OSError) as error:  # OSError: its shared library does not load
            why.append(f"{name}: {error}")
            continue
        if found.version_info < OLDEST[name]:
            oldest = ".".join(map(str, OLDEST[name]))
            why.append(f"{name}: {found.version} is installed, {oldest} or newer is needed")
            continue
        return found
    raise MissingExtraError(
        f"engine='tensorrt' needs TensorRT ({'; '.join(why)}): {INSTALL}, on a machine with an "
        "NVIDIA GPU. Without it engine='torch' runs on the GPU, engine='native' and "
        "engine='onnx' on the CPU"
    )


class TensorRT:
    """One imported module: builds plans, loads them, refits them.

    ``name`` "tensorrt" | "tensorrt_rtx"; ``version`` its version; ``is_rtx``; ``module`` itself.
    """

    def __init__(self, module):
        self.module = module
        self.name = module.__name__
        self.version = module.__version__
        self.is_rtx = self.name == "tensorrt_rtx"
        self.log = _make_log(module)

    @property
    def version_info(self):
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])

    @property
    def registry(self):
        return self.module.get_plugin_registry()

    def build(
        self,
        onnx_file,
        profile: Profile,
        *,
        refit=False,
        timing_cache=None,
        compute_capability=None,
        workspace=None,
        listing=False,
    ) -> Built:
        """Parse an ONNX file and build its engine.

        refit: an engine whose weights can be exchanged. timing_cache: bytes of an earlier build
        (b"" begins one, None does without). compute_capability: "8.9": build for that GPU, RTX
        only; None: for the GPU that is here (RTX: its default range). workspace: bytes. listing:
        collect the list of layers. Raises EngineError with TensorRT's own words.
        """
        trt, log = self.module, self.log
        log.begin(listing)
        builder = trt.Builder(log)
        network = builder.create_network(self._network_flags())
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(onnx_file)):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise EngineError(
                f"{self} cannot parse {Path(onnx_file).name}: {_join(errors or log.errors)}"
            )
        config = builder.create_builder_config()
        self._set_flags(config, refit)
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace))
        if listing:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if compute_capability is not None:
            target = self.compute_capability(compute_capability)
            config.num_compute_capabilities = 1
            config.set_compute_capability(target, 0)
        config.add_optimization_profile(self._profile(builder, network, profile))
        cache = self._set_timing_cache(config, timing_cache)
        plugins = sum(
            network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers)
        )
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            # RTX refuses without a GPU, in words that say nothing of it.
            hint = "; an engine without refit may build" if refit else ""
            raise EngineError(
                f"{self} cannot build {Path(onnx_file).name}: {_join(log.errors)}{hint}"
            )
        times = None if cache is None else bytes(cache.serialize())
        return Built(bytes(plan), times, int(plugins), log.listing)

    def load(self, plan: bytes) -> LoadedEngine:
        """The engine of a plan. Raises EngineError when this version or GPU cannot use it."""
        self.log.begin()
        # The runtime must outlive the engine; LoadedEngine keeps both.
        runtime = self.module.Runtime(self.log)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"{self} cannot load this engine: {_join(self.log.errors)}")
        return LoadedEngine(self, runtime, engine)

    def _network_flags(self):
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def _set_flags(self, config, refit):
        flags = self.module.BuilderFlag
        config.clear_flag(flags.TF32)  # float32 in the file means float32
        config.max_aux_streams = 0  # all on the one stream that is captured
        if refit:
            config.set_flag(flags.REFIT)
        if hasattr(flags, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(flags.REQUIRE_USER_ALLOCATION)

    def compute_capability(self, text):
        """TensorRT's own constant for "8.9"; ValueError where it builds for no such GPU."""
        if not self.is_rtx:
            raise ValueError(
                f"compute_capability={text!r}: {self} builds for the GPU of this machine only; "
                "leave it out, or use tensorrt_rtx"
            )
        known = self.module.ComputeCapability.__members__
        name = "SM" + str(text).replace(".", "")
        if name not in known:
            numbers = [k[2:-1] + "." + k[-1] for k in known if k.startswith("SM")]
            raise ValueError(
                f"compute_capability={text!r} is not known to {self}; allowed: {', '.join(numbers)}"
            )
        return known[name]

    def _profile(self, builder, network, profile):
        made = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            fixed = tuple(tensor.shape)[1:]
            if -1 in fixed:
                raise EngineError(f"input {tensor.name} has shape {tuple(tensor.shape)}; only the "
                                  "batch may be dynamic")  # fmt: skip
            made.set_shape(tensor.name, *((size, *fixed) for size in profile))
        return made

    def _set_timing_cache(self, config, timing_cache):
        if timing_cache is None:
            return None
        cache = config.create_timing_cache(timing_cache)
        if cache is None and timing_cache:  # of another version: begin anew
            cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            return None
        return cache

    def __str__(self):
        return f"{self.name} {self.version}"


class LoadedEngine:
    """A deserialised engine with one execution context, whose memory the caller gives.

    ``inputs``, ``outputs``: names; ``profile``: its batch sizes; ``memory_bytes``: of activations.
    """

    def __init__(self, library: TensorRT, runtime: Any, engine: Any):
        self._library, self._runtime, self._engine = library, runtime, engine
        trt = library.module
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]
        shapes = engine.get_tensor_profile_shape(self.inputs[0], 0)
        self.profile = Profile(*(int(shape[0]) for shape in shapes))
        self.memory_bytes = int(engine.device_memory_size_v2)
        self._context = self._make_context()
        self._shapes = {}

    @property
    def refittable(self):
        return bool(self._engine.refittable)

    def serialize(self) -> bytes:
        return bytes(self._engine.serialize())

    def set_memory(self, address, size):
        """Where activations go: device memory, 256-byte aligned, of ``memory_bytes`` at least."""
        self._context.set_device_memory(address, size)

    def run(self, tensors, stream):
        """Enqueue on ``stream`` (an int). tensors: name -> (device address, shape), all of them.

        Raises EngineError with TensorRT's own words.
        """
        context, log = self._context, self._library.log
        log.begin()
        for name, (address, shape) in tensors.items():
            shape = tuple(shape)
            if name in self.inputs and self._shapes.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    raise EngineError(f"{name} of shape {shape} does not fit the engine (batches "
                                      f"of {self.profile}): {_join(log.errors)}")  # fmt: skip
                self._shapes[name] = shape
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(stream):
            raise EngineError(f"{self._library} could not run the engine: {_join(log.errors)}")

    def capturable(self, stream):
        """Whether the next ``run`` may be captured in a CUDA graph, as far as the library says."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(stream))

    def refit(self, onnx_file):
        """Exchange the weights for those of another ONNX file of the same graph, by their names.

        Returns "" or the reason why it failed, after which the engine must not be used.
        """
        trt, log = self._library.module, self._library.log
        if not self.refittable:
            return "it was not built to be refitted"
        log.begin()
        refitter = trt.Refitter(self._engine, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        if not parser.refit_from_file(str(onnx_file)):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            return _join(errors or log.errors)
        missing = list(refitter.get_missing_weights())
        if missing:
            return f"{len(missing)} weights have no new value, the first is {missing[0]!r}"
        return "" if refitter.refit_cuda_engine() else _join(log.errors)

    def _make_context(self):
        trt = self._library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(
                f"{self._library} made no execution context: {_join(self._library.log.errors)}"
            )
        return context


def load_plugin_library(library: TensorRT, path):
    """Register the plugins of a shared library for the life of the process. Raises EngineError."""
    handle = library.registry.load_library(str(path))
    if handle is None:
        raise EngineError(f"{library} cannot load the plugin library {path}")
    return handle


def find_creator(library: TensorRT, name, version, namespace):
    """The registered plugin creator, or None."""
    return library.registry.get_creator(name, version, namespace)


def _make_log(trt):
    class Log(trt.ILogger):
        """Keeps errors for our messages, and the list of layers; prints nothing."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.begin()

        def begin(self, listing=False):
            self.errors, self.listing, self._wants_listing = [], "", listing

        def log(self, severity, text):
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(text)
            elif self._wants_listing and text.startswith(_LISTING):
                self.listing = text

    return Log()


def _join(errors):
    return "; ".join(" ".join(str(e).split()) for e in errors[-3:]) or "it gave no reason"
