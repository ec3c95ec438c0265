"""Exported graphs of whole models in ONNX Runtime against the torch modules they were made of.

Outputs are compared at every batch size, and a difference beyond ``LIMITS`` ends the run; then both
are timed. ONNX Runtime computes float16 graphs in float32 on a CPU, with the rounded weights.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import torch

from adm_rt.benchmarking.pair import heading, timed_row, torch_threads
from adm_rt.benchmarking.sampling_cases import MODELS, configs, random_weights
from adm_rt.export.exporter import export_model
from adm_rt.export.manifest import read_manifest
from adm_rt.models.checkpoint import module_of
from adm_rt.models.classifier_gradient import ClassifierGradient
from adm_rt.models.model_weights import ModelWeights
from adm_rt.models.weight_folder import ModelInfo

# Of the largest value. The gradient goes through twice as many layers.
LIMITS = {"float32": 2e-5, "float16": 2e-2}


def rows(args):
    """Export, compare and time, printing as it goes."""
    import onnxruntime

    cfgs = configs(MODELS[args.model])
    parts = {part: _weights(cfg) for part, cfg in cfgs.items()}
    modules = {part: module_of(weights).requires_grad_(False) for part, weights in parts.items()}
    result = []
    with torch_threads(args.threads), tempfile.TemporaryDirectory(prefix="adm_rt_") as place:
        print(f"{heading(args)}, ONNX Runtime {onnxruntime.__version__}")
        for dtype in args.dtypes:
            begin = time.perf_counter()
            folder = export_model(
                parts["diffusion"], f"{place}/{dtype}", parts.get("classifier"), dtype
            )
            seconds = time.perf_counter() - begin
            for network in read_manifest(folder).networks:
                if args.only in network.name:
                    session = _session(network.path, args.threads)
                    for batch in args.batches:
                        row = _row(network, session, modules, batch, args)
                        result.append({**row, "export_s": seconds})
                        print(_line(result[-1]), flush=True)
                    del session
    return result


def _weights(cfg):
    state = random_weights(cfg)
    return ModelWeights(ModelInfo(cfg), lambda: state, "random")


def _session(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _row(network, session, modules, batch, args):
    cfg = network.cfg
    given = _inputs(cfg, batch)
    module = modules["diffusion" if network.name == "unet" else "classifier"]
    module = module if network.name == "unet" else ClassifierGradient(module)
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}

    def baseline():
        with torch.no_grad():
            return module(**tensors).numpy()

    def ours():
        return session.run(None, given)[0]

    expected = baseline()
    error = float(np.abs(ours() - expected).max() / np.abs(expected).max())
    if not error <= LIMITS[network.dtype]:
        raise ValueError(
            f"{network.name} {network.dtype} batch {batch}: ONNX Runtime's output differs by "
            f"{error:.3g} of the largest value, allowed {LIMITS[network.dtype]:.0e}"
        )
    return timed_row(
        f"onnx {network.name}",
        f"{args.model} batch {batch} {cfg.image_size}x{cfg.image_size} {network.dtype}",
        {"ours": ours, "baseline": baseline},
        error,
        args,
        baseline="torch module, float32",
        megabytes=(network.bytes + (network.data_bytes or 0)) / 1e6,
        nodes=sum(network.nodes.values()),
    )


def _inputs(cfg, batch):
    rng = np.random.Generator(np.random.Philox(key=[2, batch]))
    shape = (batch, cfg.in_channels, cfg.image_size, cfg.image_size)
    given = {
        "x": rng.standard_normal(shape, dtype=np.float32),
        "t": (rng.random(batch) * (cfg.diffusion_steps - 1)).astype(np.float32),
    }
    if cfg.class_cond or cfg.kind == "classifier":
        given["y"] = rng.integers(0, cfg.num_classes, batch)
    return given


def _line(row):
    return (
        f"{row['name']} {row['sizes']}: {row['ours_ms']:9.1f} ms, torch {row['baseline_ms']:9.1f} "
        f"ms  {row['ratio']:5.2f}x  error {row['max_error']:.1e}  {row['megabytes']:.0f} MB"
    )
