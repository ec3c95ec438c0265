"""A GPU made of CPU memory, and exported networks whose graphs the fake TensorRT understands."""

import contextlib
import functools
from unittest import mock

import fake_tensorrt
import torch
from tiny_models import tiny_config

from adm_rt.export.manifest import interface, read_manifest, write_manifest

_WAITING = ("cpu", "numpy", "item", "tolist", "__bool__", "__float__", "__int__", "__array__")


@contextlib.contextmanager
def recording():
    """What a CUDA graph cannot record is an error: whatever waits for the GPU or feeds it."""

    def refused(name):
        def call(*arguments, **options):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")

        return call

    with contextlib.ExitStack() as stack:
        for name in _WAITING:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refused(name)))
        stack.enter_context(mock.patch.object(torch, "from_numpy", refused("from_numpy")))
        yield


class FakeGpu:
    """``TorchGpu`` on the CPU. A captured graph is the function itself, called at each replay."""

    device, stream, torch_device = "cuda:0", 5, torch.device("cpu")

    def __init__(self, identity="NVIDIA H200 sm_90"):
        self.identity, self.captures, self.replays, self.can_capture = identity, 0, 0, True
        self.branches = 0

    def from_numpy(self, values):
        return torch.from_numpy(values)

    def empty(self, shape, dtype=torch.float32):
        return torch.full(shape, 77, dtype=dtype)

    def times(self, count, t):
        return t.expand(count) if isinstance(t, torch.Tensor) else torch.full((count,), float(t))

    def scratch(self, size):
        return torch.empty(size, dtype=torch.uint8)

    def synchronize(self):
        pass

    def side_by_side(self, first, second):
        self.branches += 1
        aside = second()
        return first(), aside

    def capture(self, warm_up, functions):
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        warm_up()
        for function in functions:
            self.captures += 1
            with recording():
                function()
        return [functools.partial(self._replay, function) for function in functions]

    def _replay(self, function):
        self.replays += 1
        with recording():  # a replay runs no code of ours, so nothing of it may wait either
            function()


def write_graphs(folder, unet_scale=0.5, gradient_scale=-0.1, cfgs=None, dtype="float16"):
    """An exported folder whose graphs are the fake's JSON. Returns its path."""
    folder.mkdir(parents=True)
    cfgs = cfgs or {
        "unet": tiny_config(),
        "classifier_gradient": tiny_config("classifier"),
    }
    scales = {"unet": unet_scale, "classifier_gradient": gradient_scale}
    networks = {}
    for name, cfg in cfgs.items():
        inputs, outputs = interface(name, cfg)
        shapes = {n: [-1 if d == "N" else d for d in dims] for n, (_, dims) in inputs.items()}
        ((output, (_, dims)),) = outputs.items()
        output = [output, [-1, *dims[1:]]]
        file = folder / f"{name}.onnx"
        file.write_text(fake_tensorrt.onnx_text(shapes, output, scales[name]))
        digest = f"{abs(hash((name, scales[name]))):064x}"[-64:]
        networks[name] = {"file": file.name, "weights_sha256": digest, "nodes": {}}
    write_manifest(
        folder,
        dtype=dtype,
        opset=23,
        cfg=cfgs["unet"],
        classifier_cfg=cfgs.get("classifier_gradient"),
        networks=networks,
        versions={"torch": "0", "onnx": "0"},
    )
    return folder


def exported(folder, **options):
    """(unet, classifier gradient) of ``write_graphs``."""
    manifest = read_manifest(write_graphs(folder, **options))
    return manifest.unet, manifest.classifier_gradient
