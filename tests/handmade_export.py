"""Exported folders with small graphs made by hand: the seam without an exporter or torch."""

import hashlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_models import TINY_CLASSES, tiny_config

from adm_rt.export.manifest import interface, write_manifest

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
OPSET = 23


def denoiser(x, t, y=None, low_res=None, *, channels=6):
    """The graph of ``unet``: x / 2 + t / 1000 (+ y / 100) (+ mean of low_res), repeated."""
    out = x * np.float32(0.5) + (t / np.float32(1000))[:, None, None, None]
    if y is not None:
        out = out + np.float32(0.01) * y.astype(np.float32)[:, None, None, None]
    if low_res is not None:
        out = out + low_res.mean((1, 2, 3), keepdims=True)
    return np.concatenate([out] * (channels // 3), axis=1).astype(np.float32)


def gradient(x, t, y):
    """The graph of ``classifier_gradient``: -0.1 x + 0.01 y + t / 1e5."""
    slope = np.float32(0.01) * y.astype(np.float32) + t / np.float32(1e5)
    return x * np.float32(-0.1) + slope[:, None, None, None]


def _graph(name, cfg, external=False):
    inputs, outputs = interface(name, cfg)
    values = [
        [helper.make_tensor_value_info(n, _TYPES[kind], dims) for n, (kind, dims) in side.items()]
        for side in (inputs, outputs)
    ]
    constants = {"axes": np.array([1, 2, 3], np.int64)}
    nodes = []

    def add(op, *names, out, **attributes):
        nodes.append(helper.make_node(op, list(names), [out], **attributes))
        return out

    def number(value):
        key = f"number_{len(constants)}"
        constants[key] = np.array(value, np.float32)
        return key

    def per_image(value, factor):
        add("Mul", value, number(factor), out=value + "_scaled")
        return add("Unsqueeze", value + "_scaled", "axes", out=value + "_column")

    is_unet = name == "unet"
    total = add("Mul", "x", number(0.5 if is_unet else -0.1), out="x_scaled")
    total = add("Add", total, per_image("t", 1e-3 if is_unet else 1e-5), out="with_t")
    if "y" in inputs:
        add("Cast", "y", out="y_float", to=TensorProto.FLOAT)
        total = add("Add", total, per_image("y_float", 0.01), out="with_y")
    if "low_res" in inputs:
        mean = add("ReduceMean", "low_res", "axes", out="low_mean")
        total = add("Add", total, mean, out="with_low")
    (last,) = outputs
    if is_unet:
        add("Concat", *[total] * (cfg.out_channels // 3), out=last, axis=1)
    else:
        add("Identity", total, out=last)
    graph = helper.make_graph(
        nodes,
        name,
        *values,
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def exported(folder, kind="diffusion", classifier=True, dtype="float32", metadata=None, **flags):
    """Write an exported folder; returns its path. flags: of the denoiser's ModelConfig."""
    folder.mkdir(parents=True)
    cfg = tiny_config(kind, **flags)
    guide = tiny_config("classifier") if classifier and kind == "diffusion" else None
    networks = {}
    for name, own in (("unet", cfg), ("classifier_gradient", guide)):
        if own is None:
            continue
        model = _graph(name, own)
        onnx.checker.check_model(model, full_check=True)
        data = model.SerializeToString()
        (folder / f"{name}.onnx").write_bytes(data)
        networks[name] = {
            "file": f"{name}.onnx",
            "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
            "nodes": {"Mul": sum(node.op_type == "Mul" for node in model.graph.node)},
        }
    if metadata is None:
        metadata = {"class_names": list(TINY_CLASSES), "guidance_scale": 2.0, "sampler": "ddim"}
    write_manifest(
        folder,
        dtype=dtype,
        opset=OPSET,
        cfg=cfg,
        classifier_cfg=guide,
        networks=networks,
        metadata=metadata,
        versions={"torch": "none", "onnx": onnx.__version__},
    )
    return folder
