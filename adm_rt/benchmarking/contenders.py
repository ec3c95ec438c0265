"""Who takes part in ``adm-rt bench sample``: each is made in a process of its own.

A contender offers the methods of ``adm_rt.engines.Engine``. Ours come as a ``Pipeline``, as a user
would load them; the rivals run the published network (``published.py``) of the same weights, and
for the classifier's gradient, which no exporter makes from the published code, our explicit
gradient network in plain torch operations (``models.classifier_gradient``).
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """A line of the registry.

    For planning memory: ``copies`` of the raw weights that it holds, ``maps`` the times it needs
    the rough estimate of the activations.
    """

    factory: str  # "module:attribute", called with (Setup)
    title: str
    copies: float
    maps: float = 2.0
    needs: tuple[str, ...] = ()  # packages
    ours: bool = False
    default: bool = True
    exports: bool = False  # wants the ONNX graphs


class Setup(NamedTuple):
    """What a contender is made from. folders: part -> model folder; graphs: part -> ONNX file."""

    folders: dict[str, str]
    graphs: dict[str, str]
    threads: int


_HERE = "adm_rt.benchmarking.contenders"
CONTENDERS = {
    "cpu": {
        "eager": Entry(f"{_HERE}:Eager", "PyTorch eager, published code", 1.0, needs=("torch",)),
        "native": Entry(f"{_HERE}:native", "adm_rt native", 2.6, 0.5, ours=True),
        "torch": Entry(f"{_HERE}:torch_engine", "adm_rt torch", 1.0, needs=("torch",), ours=True),
        "native_1": Entry(
            f"{_HERE}:native_one_thread", "adm_rt native, 1 thread", 2.6, 0.5, default=False
        ),
        "compile": Entry(
            f"{_HERE}:Compiled", "torch.compile, frozen", 2.5, needs=("torch",), default=False
        ),
        "onnxruntime": Entry(
            f"{_HERE}:OnnxRuntime",
            "ONNX Runtime",
            2.5,
            1.0,
            needs=("torch", "onnx", "onnxruntime"),
            exports=True,
        ),
        "openvino": Entry(
            f"{_HERE}:OpenVino",
            "OpenVINO",
            3.0,
            1.0,
            needs=("torch", "onnx", "openvino"),
            exports=True,
        ),
    }
}
OURS = ("native", "torch")  # the first that is there is "ours" in the table


def missing(name, device="cpu"):
    """Why a contender cannot take part here, or None."""
    entry = CONTENDERS[device][name]
    absent = [p for p in entry.needs if importlib.util.find_spec(p) is None]
    if absent:
        return f"{', '.join(absent)} is not installed (pip install 'adm_rt[bench]')"
    if entry.ours:
        from adm_rt import engines

        if name not in engines.ENGINES:
            return "this build has no such engine"
    return None


# ---- ours ----


def native(setup):
    return _pipeline(setup, "native")


def native_one_thread(setup):
    """What the other threads are good for, where ``setup`` has several."""
    from adm_rt import _C

    _C.set_num_threads(1)
    return native(setup)


def torch_engine(setup):
    return _pipeline(setup, "torch")


def _pipeline(setup, engine):
    from adm_rt import Pipeline

    return Pipeline.from_pretrained(
        setup.folders["diffusion"], setup.folders.get("classifier", "none"), engine=engine
    )


# ---- PyTorch ----


class Eager:
    """The published modules as they are."""

    def __init__(self, setup):
        self.networks = {part: published_network(path) for part, path in setup.folders.items()}

    def from_numpy(self, values):
        import torch

        return torch.from_numpy(values)

    def to_numpy(self, values):
        return values.detach().numpy()

    def denoise(self, x, t, y=None, low_res=None):
        import torch

        network = self.networks["diffusion"]
        labels = (y,) if network.cfg.class_cond else ()
        with torch.no_grad():
            return network(x, _times(x, t), *labels)

    def classifier_gradient(self, x, t, y):
        from adm_rt.benchmarking.published import classifier_gradient

        return classifier_gradient(self.networks["classifier"], x, _times(x, t), y)


class Compiled(Eager):
    """torch.compile with the weights frozen into the graph; checkpointing left out."""

    def __init__(self, setup):
        import torch
        import torch._inductor.config

        torch._inductor.config.freezing = True
        self.networks = {}
        for part, path in setup.folders.items():
            network = plain_network(part, path)
            self.networks[part] = torch.compile(network, dynamic=False)
            self.networks[part].cfg = network.cfg

    def classifier_gradient(self, x, t, y):
        import torch

        with torch.no_grad():
            return self.networks["classifier"](x, _times(x, t), y)


def _times(x, t):
    import torch

    return torch.full((len(x),), float(t))


def published_network(folder, checkpoint=True):
    """The published network of a model folder."""
    from adm_rt.models.weight_folder import read_weights

    return published_of(*read_weights(folder), checkpoint)


def published_of(cfg, weights, checkpoint=True):
    """The published network of a configuration; weights: name -> array, whose memory it shares."""
    import torch

    from adm_rt.benchmarking import published
    from adm_rt.models.checkpoint import empty_module

    network = empty_module(cfg, lambda cfg: published.build(cfg, checkpoint))
    state = {k: torch.from_numpy(np.require(v, requirements="CW")) for k, v in weights.items()}
    network.load_state_dict(state, assign=True)
    return network


def plain_network(part, folder):
    """What a rival compiles: no checkpointing, no autograd, plain torch operations only.

    part "diffusion": (x, t[, y]) -> output; "classifier": (x, t, y) -> gradient.
    """
    if part == "diffusion":
        return published_network(folder, checkpoint=False).requires_grad_(False)
    from torch import nn

    from adm_rt import ops
    from adm_rt.models import load_model
    from adm_rt.models.classifier_gradient import ClassifierGradient

    classifier = load_model(folder).requires_grad_(False)

    class PlainGradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = ClassifierGradient(classifier)
            self.cfg = classifier.cfg

        def forward(self, x, t, y):
            with ops.use_reference():
                return self.network(x, t, y)

    return PlainGradient().eval()


# ---- by way of ONNX ----


def export_onnx(part, folder, file):
    """Write the graph of a part, batch size open; ``file`` lies in a folder of its own.

    The TorchScript exporter: its graph of a UNet runs faster in ONNX Runtime 1.32 than that of the
    newer one. Above 2 GB the weights become files beside it.
    """
    import torch

    network = plain_network(part, folder)
    cfg = network.cfg
    x = torch.zeros(2, cfg.in_channels, cfg.image_size, cfg.image_size)
    names, arguments = ["x", "t"], [x, torch.full((2,), 500.0)]
    if part == "classifier" or cfg.class_cond:
        names.append("y")
        arguments.append(torch.tensor([0, 1]))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about this exporter's age, and shapes that stay fixed
        torch.onnx.export(
            network,
            tuple(arguments),
            str(file),
            input_names=names,
            output_names=["out"],
            dynamic_axes={name: {0: "batch"} for name in (*names, "out")},
            opset_version=17,
            dynamo=False,
        )


class _Graphs:
    """An engine over ONNX graphs, each compiled for the one batch size in use."""

    def __init__(self, setup):
        self.setup = setup
        self.compiled = {}  # part -> (batch, callable)

    def from_numpy(self, values):
        return values

    def to_numpy(self, values):
        return values

    def denoise(self, x, t, y=None, low_res=None):
        return self._run("diffusion", x, t, y)

    def classifier_gradient(self, x, t, y):
        return self._run("classifier", x, t, y)

    def _run(self, part, x, t, y):
        batch = len(x)
        if self.compiled.get(part, (0, None))[0] != batch:
            self.compiled.pop(part, None)  # its memory first
            self.compiled[part] = batch, self.compile(self.setup.graphs[part], batch)
        feeds = {"x": x, "t": np.full(batch, t, np.float32), "y": y}
        return self.compiled[part][1](feeds)


class OnnxRuntime(_Graphs):
    """CPU execution provider, all graph optimisations."""

    def compile(self, file, batch):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.setup.threads
        options.inter_op_num_threads = 1
        options.add_free_dimension_override_by_name("batch", batch)
        # Threads that go on spinning after a request would take the next contender's cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        return lambda feeds: session.run(None, {k: feeds[k] for k in names})[0]


class OpenVino(_Graphs):
    """CPU plugin in float32: left alone it would take bfloat16 where the processor has it."""

    def compile(self, file, batch):
        import openvino

        core = openvino.Core()
        model = core.read_model(file)
        model.reshape(
            {value.any_name: [batch, *list(value.partial_shape)[1:]] for value in model.inputs}
        )
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(self.setup.threads),
            "NUM_STREAMS": "1",
            "ENABLE_CPU_PINNING": "NO",  # the process is pinned already
        }
        request = core.compile_model(model, "CPU", options).create_infer_request()
        names = [value.any_name for value in model.inputs]
        return lambda feeds: request.infer({k: feeds[k] for k in names})[0].copy()
