"""``adm-rt info MODEL``: configuration, sizes and default settings of one model."""

from __future__ import annotations

import os

from adm_rt.engines.memory import activation_bytes
from adm_rt.export.manifest import OPS_VERSION, is_exported_folder, read_manifest
from adm_rt.locate import display_name, locate, read_settings
from adm_rt.models.parameter_shapes import count_parameters, parameter_shapes
from adm_rt.models.presets import SAMPLING, preset, preset_name


def model_report(model):
    """JSON-ready facts of a zoo model, folder, exported folder, ``.pt``, or of a preset that has no
    weights here."""
    try:
        path = locate(model)
    except ValueError:
        if preset_name(model) is None or os.sep in os.fspath(model):
            raise
        return _report(preset_name(model), preset(model), None, {})
    if is_exported_folder(path):
        return _exported_report(path)
    from adm_rt.models import load_weights

    cfg = load_weights(path).cfg
    return _report(display_name(path), cfg, path, read_settings(path))


def _report(name, cfg, path, settings):
    shapes = parameter_shapes(cfg)
    parameters = count_parameters(shapes)
    published = SAMPLING.get(preset_name(name))
    return {
        "model": name,
        "weights": "not here: this is a preset without its file" if path is None else str(path),
        "size_on_disk_MB": None if path is None else round(_disk_bytes(path) / 1e6, 2),
        "kind": cfg.kind,
        "parameters": parameters,
        "keys": len(shapes),
        "float32_weights_MB": round(parameters * 4 / 1e6, 2),
        "native_engine_memory_MB": _planned(cfg),
        "torch_engine_activations_per_image_MB_estimate": {
            "forward": round(activation_bytes(cfg) / 1e6, 1),
            "with_gradient": round(activation_bytes(cfg, gradient=True) / 1e6, 1),
        },
        "config": cfg.to_dict(),
        "default_settings": settings,
        "published_settings": None if published is None else vars(published),
    }


def _exported_report(path):
    """Of an exported folder; its files' sizes are checked, not their sha256."""
    exported = read_manifest(path)
    return {
        "model": display_name(path),
        "exported": True,
        "folder": str(path),
        "size_on_disk_MB": round(_disk_bytes(path) / 1e6, 2),
        "kind": exported.cfg.kind,
        "dtype": exported.dtype,
        "opset": exported.opset,
        "ops_version": OPS_VERSION,
        "versions": exported.versions,
        "networks": {
            network.name: {
                "file": network.file,
                "inputs": {k: f"{kind} {list(dims)}" for k, (kind, dims) in network.inputs.items()},
                "outputs": {
                    k: f"{kind} {list(dims)}" for k, (kind, dims) in network.outputs.items()
                },
                "nodes": network.nodes,
            }
            for network in exported.networks
        },
        "config": exported.cfg.to_dict(),
        "default_settings": exported.metadata,
    }


def _planned(cfg):
    """What the native engine's plans need: a classifier's are those of its gradient."""
    from adm_rt.engines.native_engine import planned_bytes

    try:
        planned = planned_bytes(cfg)
    except ImportError as error:  # no compiled extension
        return {"error": str(error)}
    return {what: round(count / 1e6, 1) for what, count in planned.items()}


def _disk_bytes(path):
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
