"""The ONNX engine: exported graphs in ONNX Runtime, without torch; NumPy arrays.

The portable engine, and the oracle of the exported bytes: what another runtime is given runs here,
our nodes by their function bodies of standard operators.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import numpy as np

from adm_rt.engines.base import (
    DTYPES,
    check_fit,
    check_images,
    check_labels,
    check_low_res,
    driver_is_there,
)
from adm_rt.engines.memory import activation_bytes, require_memory
from adm_rt.errors import CheckpointError, EngineError, MissingExtraError
from adm_rt.export.manifest import ExportedNetwork, read_manifest

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_LOG_ERRORS = 3  # ONNX Runtime's severity: its warnings are about its own optimisations


class OnnxEngine:
    """Runs an exported UNet (or SuperResUNet) and classifier gradient; see ``Engine``.

    unet, classifier: the ``ExportedNetwork`` s of a folder, whose sha256 is checked first. Modules
    and ``ModelWeights`` are exported to a temporary folder first, which takes seconds and needs
    onnx.

    device: "cpu", or "cuda", "cuda:N" where ONNX Runtime has its CUDA provider (not measured);
    "auto" takes CUDA where both the provider and a driver are. dtype: an exported folder has its
    own, so "auto" or that one. The CPU provider has no bfloat16.

    As many threads as our kernels use when the engine is made (``ADM_RT_NUM_THREADS``,
    ``--threads``). Any number of threads may use one engine; a forked child needs one of its own.
    Ctrl-C ends a call when the network has run.
    """

    name = "onnx"

    def __init__(self, unet, classifier=None, device="cpu", dtype="auto"):
        if dtype not in ("auto", *DTYPES):
            raise ValueError(
                f"dtype={dtype!r} is unknown; allowed: {', '.join(map(repr, ('auto', *DTYPES)))}"
            )
        runtime = _onnxruntime()
        if classifier is not None:
            check_fit(unet.cfg, classifier.cfg)
        self.notes = []
        self.device = _resolve_device(runtime, device)
        if all(isinstance(n, ExportedNetwork) for n in (unet, classifier) if n is not None):
            self._open(runtime, unet, classifier, device, dtype)
        elif isinstance(unet, ExportedNetwork) or isinstance(classifier, ExportedNetwork):
            raise ValueError(
                "unet and classifier: one is exported and the other is not; export them together "
                "(adm-rt export MODEL --classifier C --out FOLDER)"
            )
        else:
            self._export_and_open(runtime, unet, classifier, device, dtype)
        self._pid = os.getpid()

    def _export_and_open(self, runtime, unet, classifier, device, dtype):
        from adm_rt.export import export_model

        asked = "float32" if dtype == "auto" else dtype
        if self.device == "cpu" and asked != "float32":
            self.notes.append(f"dtype={dtype} was asked for; float32 is used on the CPU")
            asked = "float32"
        self.notes.append(
            "the model was exported for this run only: `adm-rt export MODEL --out FOLDER` and "
            "FOLDER as the model save that time"
        )
        with tempfile.TemporaryDirectory(prefix="adm_rt_export_") as place:
            folder = Path(place) / "model"
            export_model(unet, folder, classifier, dtype=asked)
            made = read_manifest(folder)
            self._open(runtime, made.unet, made.classifier_gradient, device, "auto")

    def _open(self, runtime, unet, classifier, device, dtype):
        self.dtype = unet.dtype
        for network in (unet, classifier):
            if network is not None and dtype not in ("auto", network.dtype):
                raise ValueError(
                    f"dtype={dtype!r}: {network.path} was exported in {network.dtype}; use "
                    f"dtype='auto', or export the model again with --dtype {dtype}"
                )
        self._unet = _Network(runtime, unet, self.device)
        self._gradient = None if classifier is None else _Network(runtime, classifier, self.device)
        opened = [n for n in (self._unet, self._gradient) if n is not None]
        if self.device != "cpu" and not all(n.on_cuda for n in opened):
            if device != "auto":
                raise ValueError(
                    f"device={device!r} cannot be used: onnxruntime {runtime.__version__} has a "
                    "CUDA provider, but it does not start (its own message is above); use "
                    "device='cpu'"
                )
            self.notes.append("ONNX Runtime's CUDA provider does not start; the CPU is used")
            self.device = "cpu"
        if self.device == "cpu" and self.dtype == "float16":
            self.notes.append(
                "float16 graphs run through casts on the CPU; float32 ones are faster"
            )

    def from_numpy(self, values):
        return values

    def to_numpy(self, values):
        return values

    def prepare(self, timesteps):
        """Nothing to prepare."""

    def image_bytes(self, guided=False):
        needed = activation_bytes(self._unet.cfg)
        if guided:
            needed = max(needed, activation_bytes(self._gradient.cfg, gradient=True))
        return needed

    def denoise(self, x, t, y=None, low_res=None):
        cfg = self._unet.cfg
        x = check_images(x, "x", cfg.in_channels, cfg.image_size)
        check_low_res(low_res, cfg)
        feeds = {"x": x, "t": _times(x, t)}
        if cfg.class_cond:
            feeds["y"] = np.asarray(check_labels(y, len(x), cfg.embedding_rows), np.int64)
        if low_res is not None:
            low = check_images(low_res, "low_res", cfg.in_channels, cfg.small_size, len(x))
            feeds["low_res"] = low
        return self._run(self._unet, feeds, activation_bytes(cfg))

    def classifier_gradient(self, x, t, y):
        if self._gradient is None:
            raise ValueError("classifier_gradient needs a classifier; this engine was made without")
        cfg = self._gradient.cfg
        x = check_images(x, "x", cfg.in_channels, cfg.image_size)
        labels = np.asarray(check_labels(y, len(x), cfg.num_classes), np.int64)
        needed = activation_bytes(cfg, gradient=True)
        return self._run(self._gradient, {"x": x, "t": _times(x, t), "y": labels}, needed)

    def _run(self, network, feeds, image_bytes):
        if os.getpid() != self._pid:
            # ONNX Runtime's threads do not exist in the child: the call would wait for ever.
            raise RuntimeError(
                "this ONNX engine was made before the process was forked; make one in the child"
            )
        batch = len(feeds["x"])
        if self.device == "cpu":
            # Half of the rough estimate: refuse what cannot fit, not what might not.
            require_memory(
                batch * image_bytes // 2, f"a batch of {batch} images", "; use a smaller batch_size"
            )
        return network.run(feeds)


class _Network:
    """One graph in an inference session."""

    def __init__(self, runtime, exported: ExportedNetwork, device):
        exported.verify()
        self.cfg, self._path = exported.cfg, exported.path
        self._output = next(iter(exported.outputs))
        if device == "cpu" and exported.dtype == "bfloat16":
            raise ValueError(
                f"{exported.path} is bfloat16, which ONNX Runtime has no CPU kernels for; export "
                "the model again with --dtype float32, or use a GPU"
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = _threads()
        options.inter_op_num_threads = 1
        # The threads of the other network's session would spin against this one's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = _LOG_ERRORS
        providers = [_CPU]
        if device != "cpu":
            # float32 in the file means float32
            chosen = {"device_id": device.partition(":")[2] or "0", "use_tf32": "0"}
            providers = [(_CUDA, chosen), _CPU]
        try:
            self._session = runtime.InferenceSession(
                os.fspath(exported.path), options, providers=providers
            )
        except Exception as error:  # its exceptions have no base class but this
            raise EngineError(
                f"onnxruntime {runtime.__version__} cannot load {exported.path}: {_short(error)}. "
                "Update onnxruntime, or export the model again with this version of adm_rt."
            ) from error
        self.on_cuda = _CUDA in self._session.get_providers()
        for kind, declared, found in (
            ("inputs", exported.inputs, self._session.get_inputs()),
            ("outputs", exported.outputs, self._session.get_outputs()),
        ):
            named = {value.name: _described(value) for value in found}
            if named != {name: (dtype, tuple(dims)) for name, (dtype, dims) in declared.items()}:
                raise CheckpointError(
                    f"{exported.path}: the graph's {kind} are not those that its manifest names: "
                    f"{named}. Export the model again."
                )

    def run(self, feeds):
        try:
            return self._session.run([self._output], feeds)[0]
        except Exception as error:
            message = _short(error)
            if "allocate memory" in message or "bad_alloc" in message:
                raise MemoryError(f"{self._path}: {message}; use a smaller batch_size") from error
            raise EngineError(f"ONNX Runtime failed on {self._path}: {message}") from error


def _onnxruntime():
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f'engine="onnx" needs ONNX Runtime ({error}): pip install "adm_rt[onnx]" '
            "(on a GPU machine onnxruntime-gpu instead of onnxruntime)"
        ) from None
    return onnxruntime


def _resolve_device(runtime, device):
    """ "cpu" or "cuda:N"; ValueError when it cannot be."""
    there = _CUDA in runtime.get_available_providers()
    if device == "auto":
        # The provider is compiled in whether or not there is a GPU.
        return "cuda:0" if there and driver_is_there() else "cpu"
    if device == "cpu":
        return device
    if not isinstance(device, str) or not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"device={device!r} is not a device; use 'auto', 'cpu' or 'cuda'")
    if not there:
        raise ValueError(
            f"device={device!r} cannot be used: onnxruntime {runtime.__version__} is here, but "
            "without its CUDA provider; install onnxruntime-gpu in its place, or use device='cpu'"
        )
    return device if ":" in device else f"{device}:0"


def _threads():
    """As many as our own kernels use."""
    from adm_rt.ops._library import extension, extension_available

    if extension_available():
        return extension().num_threads()
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _times(x, t):
    return np.full(len(x), t, np.float32)


_KINDS = {"tensor(float)": "float32", "tensor(int64)": "int64"}


def _described(value):
    """(dtype, dims) of a session's input or output, in the manifest's words."""
    return _KINDS.get(value.type, value.type), tuple(value.shape)


def _short(error):
    return " ".join(str(error).split())[:300]
