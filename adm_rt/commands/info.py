"""``adm-rt info``: what was built, what will be used and why; or the facts of one model.

Nothing here may raise: every probe is guarded and a failure becomes a value in the report.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import sys

_ENVIRONMENT = ("ADM_RT_", "OMP_", "MKL_", "CUDA_", "NVIDIA_VISIBLE")


def add_arguments(parser):
    parser.description = (
        "Without MODEL: versions, build facts, what will be used and why, and a one-step "
        "self-test. With MODEL (zoo name, folder, exported folder, .pt or preset name): its "
        "configuration and sizes."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args):
    if args.model is not None:
        from adm_rt.commands.model_info import model_report

        report = model_report(args.model)
    else:
        report = build_report()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_lines(report)))


def build_report():
    """The whole report as a JSON-ready dict; a probe that fails gives {"error": "why"}."""
    probes = {
        "adm_rt": _package,
        "system": _system,
        "build": _build,
        "cpu_kernels": _cpu_kernels,
        "torch": _torch,
        "cuda": _cuda,
        "engines": _engines,
        "packed_weights": _packed_weights,
        "zoo": _zoo,
        "dependencies": _dependencies,
        "environment": _environment,
        "self_test": self_test,
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def _guarded(probe):
    try:
        return probe()
    except Exception as error:  # the report must come whatever is broken
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _package():
    import adm_rt

    return {
        "version": adm_rt.__version__,
        "folder": os.path.dirname(adm_rt.__file__),
        "python": platform.python_version(),
        "executable": sys.executable,
    }


def _system():
    affinity = getattr(os, "sched_getaffinity", None)
    memory = _guarded(_memory)
    return {
        "platform": platform.platform(),
        "cpu": _guarded(_cpu_name),
        "cores_allowed": len(affinity(0)) if affinity else os.cpu_count(),
        "cores": os.cpu_count(),
        "memory": memory,
    }


def _cpu_name():
    with open("/proc/cpuinfo") as lines:
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))


def _memory():
    with open("/proc/meminfo") as lines:
        values = {k: int(v.split()[0]) for k, v in (line.split(":") for line in lines)}
    return {
        "total_GiB": round(values["MemTotal"] / 2**20, 1),
        "available_GiB": round(values["MemAvailable"] / 2**20, 1),
    }


def _build():
    from adm_rt._build_info import build_info

    return build_info()


def _cpu_kernels():
    from adm_rt import _C

    return {
        "module": _C.__file__,
        "isa": _C.cpu_isa(),
        "isas_available": list(_C.available_cpu_isas()),
        "why": "ADM_RT_CPU_ISA is set"
        if os.environ.get("ADM_RT_CPU_ISA")
        else "the best this CPU has",
        "bf16_instructions": _C.cpu_has_bf16(),
        "threads": _C.num_threads(),
    }


def _torch():
    import torch

    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "built_for_cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
    }


def _cuda():
    return {"module": _guarded(_cuda_module), "driver": _guarded(_cuda_driver)}


def _cuda_module():
    from adm_rt._build_info import build_info

    try:
        module = importlib.import_module("adm_rt._cuda")
    except ImportError as error:
        reason = build_info().get("cuda", {}).get("reason", str(error))
        return {"present": False, "reason": reason}
    return {"present": True, "file": module.__file__}


def _cuda_driver():
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"present": False, "reason": f"no NVIDIA driver: {error}"}
    version, count = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0)
    if status != 0:
        return {"present": False, "reason": f"cuInit failed with CUDA error {status}"}
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    return {
        "present": True,
        "cuda_version": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "devices": count.value,
    }


def _engines():
    from adm_rt import engines

    chosen, why = engines.choose("auto")
    return {
        "available": list(engines.ENGINES),
        "auto": chosen,
        "why": why,
        "device_auto": _guarded(_device_auto),
    }


def _packed_weights():
    from adm_rt.engines.packed_cache import cache_report

    return cache_report()


def _device_auto():
    from adm_rt.engines.torch_gpu import resolve_device

    return str(resolve_device("auto"))


def _zoo():
    from adm_rt.locate import zoo_models

    return {kind: zoo_models(kind) for kind in ("diffusion", "upsampler", "classifier")}


def _dependencies():
    names = (
        "numpy",
        "torch",
        "safetensors",
        "pillow",
        "tqdm",
        "matplotlib",
        "onnxruntime",
        "tensorrt",
        "tensorrt-rtx",
    )
    return {name: _version(name) for name in names}


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _environment():
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)}


def self_test():
    """One guided DDPM step of a tiny random model against reference.py in float64, part by part."""
    import numpy as np
    import torch

    from adm_rt import engines, ops
    from adm_rt.diffusion import Diffusion
    from adm_rt.samplers.ddpm import coefficients

    unet, classifier = _tiny_networks()
    engine = engines.create("auto", unet, classifier)
    noise = ops.philox_normal(np.arange(4), (3, 16, 16))
    noise, x = torch.from_numpy(noise[:2]), torch.from_numpy(noise[2:])
    y, i = torch.tensor([1, 3]), 500
    row = coefficients(Diffusion(), i, 1.0)

    def step(out, gradient, dtype):
        x_next, _, _ = ops.guided_mean_update(
            x.to(dtype),
            out.to(dtype),
            row,
            gradient=gradient.to(dtype),
            noise=noise.to(dtype),
            learned_variance=True,
        )
        return x_next

    x_own, y_own = engine.from_numpy(x.numpy()), engine.from_numpy(y.numpy())
    out, gradient = (
        torch.from_numpy(engine.to_numpy(values))
        for values in (
            engine.denoise(x_own, i, y_own),
            engine.classifier_gradient(x_own, i, y_own),
        )
    )
    ours = {
        "denoise": out,
        "classifier_gradient": gradient,
        "guided_mean_update": step(out, gradient, torch.float32),
    }
    with ops.use_reference():
        unet, classifier = unet.double(), classifier.double()
        x64, t = x.double().requires_grad_(True), torch.full((2,), float(i))
        chosen = torch.log_softmax(classifier(x64, t), dim=-1)[range(2), y]
        (gradient,) = torch.autograd.grad(chosen.sum(), x64)
        with torch.no_grad():
            out = unet(x.double(), t, y)
        expected = {
            "denoise": out,
            "classifier_gradient": gradient,
            "guided_mean_update": step(out, gradient, torch.float64),
        }
    errors = {
        name: float((ours[name].double() - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    }
    error, limit = max(errors.values()), 1e-4
    return {
        "max_error": error,
        "limit": limit,
        "passed": error <= limit,
        "relative_errors_against_float64_reference": errors,
    }


def _tiny_networks():
    import torch

    from adm_rt.models import ModelConfig, NoisyClassifier, UNet

    flags = {
        "image_size": 16,
        "num_channels": 64,
        "num_res_blocks": 1,
        "channel_mult": "1,2",
        "attention_resolutions": "8",
        "num_head_channels": 64,
        "resblock_updown": True,
        "num_classes": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = (
            UNet(ModelConfig(class_cond=True, learn_sigma=True, **flags)),
            NoisyClassifier(ModelConfig(kind="classifier", **flags)),
        )
        for network in networks:
            for parameter in network.parameters():
                if not parameter.any():  # the published zero initialisation would test nothing
                    torch.nn.init.normal_(parameter, std=0.05)
    return networks


def _lines(report, indent=""):
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{name}:")
            lines += _lines(value, indent + "  ") or [f"{indent}  (nothing)"]
        elif isinstance(value, list):
            lines.append(f"{indent}{name}: {', '.join(map(str, value)) or '(none)'}")
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
