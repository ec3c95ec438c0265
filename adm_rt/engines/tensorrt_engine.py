"""The TensorRT engine: both networks as TensorRT engines, a run as replays of a CUDA graph.

Engines are built for the GPU that is here on first use, which takes minutes for a large model, and
kept in a cache (``tensorrt_cache``); ``adm-rt build-engine`` builds them beforehand. A run of all
steps without a callback is replayed from a recording of one step (``captured_run``): UNet and
classifier gradient side by side, then ``guided_mean_update``.

Nothing here has been measured, or run, on a GPU yet.
"""

from __future__ import annotations

import torch

from adm_rt.engines import tensorrt_adapter
from adm_rt.engines.base import DTYPES, check_fit, check_low_res
from adm_rt.engines.captured_run import RunRecorder
from adm_rt.engines.memory import activation_bytes
from adm_rt.engines.tensorrt_adapter import Profile
from adm_rt.engines.tensorrt_builder import EngineBuilder
from adm_rt.engines.tensorrt_cache import EngineCache, default_folder
from adm_rt.engines.tensorrt_source import Sources
from adm_rt.engines.torch_gpu import TorchGpu
from adm_rt.errors import EngineError
from adm_rt.export.manifest import CLASSIFIER_GRADIENT, UNET


class TensorRTEngine:
    """Runs a UNet (or SuperResUNet) and the gradient of a NoisyClassifier; see ``Engine``.

    unet, classifier: torch modules, ``ModelWeights``, or ``ExportedNetwork`` s of one folder.
    device: "auto", "cuda", "cuda:N". dtype: "auto" is float16, or that of an exported folder.

    batch: a ``Profile`` or its text ("8", "1,8,32") to use at all costs; None takes what the cache
    has for a batch, else builds 1,8,32. refit: build engines whose weights can be exchanged (a
    cached one of the same network is used for other weights without a build). ops: "plugins" runs
    our nodes with our kernels, "functions" as standard ops that TensorRT fuses itself; "auto" takes
    plugins where they can be loaded. graph: False runs the steps one by one, never as CUDA
    graphs. library, gpu, cache: for tests. One thread at a time.

    Raises MissingExtraError without TensorRT (naming the pip command), ValueError without a GPU,
    EngineError for what TensorRT says, OSError for a cache folder that cannot be written.
    """

    name = "tensorrt"

    def __init__(
        self,
        unet,
        classifier=None,
        device="auto",
        dtype="auto",
        *,
        batch=None,
        refit=False,
        ops="auto",
        graph=True,
        library=None,
        gpu=None,
        cache=None,
    ):
        if dtype != "auto" and dtype not in DTYPES:
            allowed = ", ".join(map(repr, ("auto", *DTYPES)))
            raise ValueError(f"dtype={dtype!r} is unknown; allowed: {allowed}")
        if classifier is not None:
            check_fit(unet.cfg, classifier.cfg)
        self._library = library or tensorrt_adapter.library()
        self._gpu = gpu or TorchGpu(device)
        self.device = self._gpu.device
        sources = Sources(unet, classifier, dtype)
        self.dtype = sources.dtype
        self.notes = []
        cache = EngineCache(default_folder()) if cache is None else cache
        if cache.folder is None:
            self.notes.append("the cache is off: TensorRT engines are built anew in every process")
        self._builder = EngineBuilder(
            self._library, cache, sources, self._gpu.identity, refit=refit, ops=ops
        )
        self.notes += self._builder.notes
        profile = Profile.parse(batch) if isinstance(batch, (str, int)) else batch
        self._networks = {
            name: _Network(name, self._builder, self._gpu, profile) for name in sources.names
        }
        self._cfg = unet.cfg
        self._classifier_cfg = None if classifier is None else classifier.cfg
        self._graph = bool(graph)
        self._runs = RunRecorder(self, self._gpu, unet.cfg.out_channels, self._check_capturable)

    def from_numpy(self, values):
        return self._gpu.from_numpy(values)

    def to_numpy(self, values):
        return values.detach().cpu().numpy()

    def prepare(self, timesteps):
        """Nothing to prepare."""

    def image_bytes(self, guided=False):
        size = 1 if self.dtype == "float32" else 2
        needed = activation_bytes(self._cfg) // size
        if guided and self._classifier_cfg is not None:
            needed += activation_bytes(self._classifier_cfg, gradient=True) // size
        return needed

    def denoise(self, x, t, y=None, low_res=None):
        cfg = self._cfg
        if cfg.class_cond and y is None:
            raise ValueError(
                f"y is missing: the model is class-conditional, pass int64 [{len(x)}] labels in "
                f"0..{cfg.num_classes - 1}"
            )
        check_low_res(low_res, cfg)
        inputs = {"x": x, "t": self._gpu.times(len(x), t)}
        if cfg.class_cond:
            inputs["y"] = y
        if low_res is not None:
            inputs["low_res"] = low_res
        shape = (len(x), cfg.out_channels, cfg.image_size, cfg.image_size)
        return self._networks[UNET].run(inputs, "output", shape)

    def classifier_gradient(self, x, t, y):
        if CLASSIFIER_GRADIENT not in self._networks:
            raise ValueError("classifier_gradient needs a classifier; this engine was made without")
        inputs = {"x": x, "t": self._gpu.times(len(x), t), "y": y}
        return self._networks[CLASSIFIER_GRADIENT].run(inputs, "gradient", tuple(x.shape))

    def run_captured(self, sampler, x, diffusion, y, guidance_scale, **options):
        """A whole run of ``sampler`` as replays of CUDA graphs; see ``RunRecorder.run``."""
        if not self._graph:
            return None
        return self._runs.run(sampler, x, diffusion, y, guidance_scale, **options)

    def _check_capturable(self, count):
        for network in self._networks.values():
            network.check_capturable(count)

    def refit(self, unet, classifier=None):
        """Go over to other weights of the same networks (an average, say), without a new engine.

        Arguments as the constructor's. Loaded engines that were built with ``refit=True`` take the
        new weights in place; others, and those that refuse, are loaded or built anew when they are
        next used. Returns the names of the networks that were refitted.
        """
        sources = Sources(unet, classifier, self.dtype)
        old = {name: network.cfg for name, network in self._networks.items()}
        new = {name: sources.cfg(name) for name in sources.names}
        if {k: v.to_dict() for k, v in old.items()} != {k: v.to_dict() for k, v in new.items()}:
            raise ValueError(
                "unet, classifier: refitting exchanges weights, but these are other networks; make "
                "a new engine"
            )
        self._runs.forget()
        self._builder.replace_sources(sources)
        return [name for name, network in self._networks.items() if network.refit()]


class _Network:
    """One network's engines by profile, each with its memory."""

    def __init__(self, name, builder, gpu, profile):
        self.name, self._builder, self._gpu, self._profile = name, builder, gpu, profile
        self.cfg = builder.sources.cfg(name)
        self._loaded = []  # (engine, its scratch memory)

    def run(self, inputs, output, shape):
        """inputs: name -> tensor on the device. Enqueues; returns float32 ``shape``."""
        engine = self._engine(shape[0])
        kinds = {"y": torch.int64}
        inputs = {
            name: value.to(kinds.get(name, torch.float32)).contiguous()
            for name, value in inputs.items()
        }
        out = self._gpu.empty(shape)
        tensors = {name: (value.data_ptr(), value.shape) for name, value in inputs.items()}
        tensors[output] = (out.data_ptr(), shape)
        engine.run(tensors, self._gpu.stream)
        return out

    def check_capturable(self, batch):
        for engine, _ in self._loaded:
            if engine.profile.covers(batch) and not engine.capturable(self._gpu.stream):
                raise EngineError(f"{self.name}: the library says it cannot be captured in a graph")

    def refit(self):
        """Whether all loaded engines took the weights of the builder's sources; they are dropped
        otherwise."""
        loaded, self._loaded = self._loaded, []
        for engine, _ in loaded:
            why = engine.refit(self._builder.sources.file(self.name))
            if why:
                self._builder.cache.notes.append(f"{self.name}: not refitted ({why}): built anew")
                return False
        self._loaded = loaded
        return bool(loaded)

    def _engine(self, batch):
        # A static engine is at least as good as a dynamic one, so the narrowest comes first.
        fitting = [pair[0] for pair in self._loaded if pair[0].profile.covers(batch)]
        if fitting:
            return min(fitting, key=lambda e: e.profile.most - e.profile.least)
        engine = self._builder.engine(self.name, batch, self._profile)
        scratch = self._gpu.scratch(engine.memory_bytes)
        engine.set_memory(scratch.data_ptr(), len(scratch))
        self._loaded.append((engine, scratch))
        self._builder.sources.done(self.name)
        return engine
