"""ONNX graphs of the networks, for runtimes other than ours.

``export_model(unet, folder, classifier=None, dtype="float32")`` writes them; importing this package
imports neither onnx nor torch.
"""

import importlib

__all__ = ["export_model"]


def __getattr__(name):
    if name == "export_model":
        return importlib.import_module("adm_rt.export.exporter").export_model
    raise AttributeError(f"module 'adm_rt.export' has no attribute {name!r}")
