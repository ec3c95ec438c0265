"""adm_rt: ADM diffusion models (Dhariwal & Nichol 2021): fast guided sampling and training.

>>> import adm_rt
>>> adm_rt.sample("glyphs32", classes=["A", "B"], steps=25).save("ab.png")

Importing this package is cheap: torch and the compiled extension load on first use.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "Pipeline": "pipeline",
    "SampleResult": "result",
    "load": "pipeline",
    "sample": "pipeline",
}
_MODULES = (
    "data",
    "diffusion",
    "engines",
    "errors",
    "evaluation",
    "export",
    "models",
    "ops",
    "samplers",
    "testing",
    "training",
)
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"adm_rt.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"adm_rt.{name}")
    raise AttributeError(f"module 'adm_rt' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_EXPORTS, *_MODULES})
