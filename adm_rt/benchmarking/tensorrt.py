"""The TensorRT engine on a GPU: built, compared with the torch engine, timed, and a report.

Both paths of our nodes are measured: plugins (our kernels) and functions (operations that TensorRT
fuses itself), which is the control that the plugins have to beat. The torch engine with the same
weights, in float32 for the comparison and in the same dtype for the times, is the baseline.
"""

from __future__ import annotations

import platform
import time

import numpy as np
import torch

from adm_rt import __version__, testing
from adm_rt.benchmarking import machine
from adm_rt.benchmarking.sampling_cases import ALL_MODELS, configs, random_weights
from adm_rt.models.model_weights import ModelWeights, content_digest
from adm_rt.models.weight_folder import ModelInfo

# Of the largest value, against float32; as those of the exported graphs in ONNX Runtime.
LIMITS = {"float32": 2e-5, "float16": 2e-2, "bfloat16": 2e-1}
SAMPLER = "dpmpp_2m"
_SEEDS = 7


def rows(args):
    """Build, compare and time, printing a report as it goes.

    ``args.failures`` takes what went wrong: a wrong result of one path does not end the run.
    """
    from adm_rt.engines import tensorrt_adapter
    from adm_rt.engines.torch_gpu import TorchGpu

    library, gpu = tensorrt_adapter.library(), TorchGpu(args.device)
    args.failures = []
    print(_heading(library, gpu))
    result = []
    # torch's float32 convolutions are TF32 by default, TensorRT's here are not.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for ops in sorted(args.ops):  # functions first: a plugin library stays in the process
            for model in args.models:
                networks = _networks(model)
                for batch in args.batches:
                    result += _compare(args, library, gpu, model, networks, batch, ops)
    return result


def _networks(model):
    """part -> ModelWeights, random ones."""
    cfgs = configs(ALL_MODELS[model])
    made = {}
    for part, cfg in cfgs.items():
        state = random_weights(cfg)
        made[part] = ModelWeights(ModelInfo(cfg), lambda state=state: state, content_digest(state))
    return made


def _compare(args, library, gpu, model, networks, batch, ops):
    """Rows of one model, batch and path against the torch engine."""
    from adm_rt.engines.torch_engine import TorchEngine

    pair = networks["diffusion"], networks.get("classifier")
    exact = TorchEngine(*pair, device=gpu.device, dtype="float32")
    work = _Work(networks, batch, args.steps, gpu)
    expected = {name: exact.to_numpy(call(exact)) for name, call in work.calls().items()}
    del exact
    begin = time.perf_counter()
    try:
        engine = _engine(args, library, gpu, pair, batch, ops)
        errors = {
            name: _error(engine.to_numpy(call(engine)), expected[name])
            for name, call in work.calls().items()
        }
    except (ImportError, RuntimeError, ValueError) as error:
        args.failures.append(f"{model} batch {batch} {ops}: {error}")
        return []
    prepared = time.perf_counter() - begin
    limit = LIMITS[args.dtype]
    bad = [f"{name} {error:.2g}" for name, error in errors.items() if not error <= limit]
    if bad:
        args.failures.append(
            f"{model} batch {batch} {ops}: differs from torch in float32 by {', '.join(bad)} of "
            f"the largest value, allowed {limit:.0e}"
        )
    baseline = TorchEngine(*pair, device=gpu.device, dtype=args.dtype)
    found = []
    for name, call in {**work.calls(), "sample": work.sample}.items():
        row = _row(args, library, gpu, model, batch, ops, name, prepared, errors.get(name))
        functions = {"ours": _synced(gpu, call, engine), "baseline": _synced(gpu, call, baseline)}
        for function in functions.values():
            function()  # loads, records
        timings = testing.interleaved_timings(functions, args.rounds)
        row["ours_ms"], row["baseline_ms"] = (timings[k].median for k in functions)
        row["ratio"] = row["baseline_ms"] / row["ours_ms"]
        found.append(row)
        print(_line(row), flush=True)
    return found


def _engine(args, library, gpu, pair, batch, ops):
    from adm_rt.engines.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(*pair, dtype=args.dtype, batch=batch, ops=ops, library=library, gpu=gpu)


class _Work:
    """One batch of inputs, and what an engine is asked to do with it."""

    def __init__(self, networks, batch, steps, gpu):
        from adm_rt.request import respaced_diffusion

        cfg = networks["diffusion"].cfg
        self._guide = networks.get("classifier")
        classes = (self._guide or networks["diffusion"]).cfg.num_classes
        rng = np.random.Generator(np.random.Philox(key=[3, batch]))
        shape = (batch, cfg.in_channels, cfg.image_size, cfg.image_size)
        self._x = gpu.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        self._y = gpu.from_numpy(rng.integers(0, classes, batch))
        self._low = None
        if cfg.kind == "upsampler":
            small = (*shape[:2], cfg.small_size, cfg.small_size)
            self._low = gpu.from_numpy(rng.standard_normal(small, dtype=np.float32))
        self._seeds = np.arange(_SEEDS, _SEEDS + batch)
        self._diffusion = respaced_diffusion(cfg, steps)

    def calls(self):
        """name -> call of one network at one step."""
        t = self._diffusion.model_timestep(self._diffusion.num_timesteps // 2)
        made = {"denoise": lambda engine: engine.denoise(self._x, t, self._y, self._low)}
        if self._guide is not None:
            made["classifier_gradient"] = lambda engine: engine.classifier_gradient(
                self._x, t, self._y
            )
        return made

    def sample(self, engine):
        """All steps of one batch, guided where there is a classifier."""
        from adm_rt.samplers import SAMPLERS

        scale = 1.0 if self._guide is not None else 0.0
        arguments = (self._x, self._diffusion, self._y, scale)
        options = {"noise": self._seeds, "low_res": self._low}
        if hasattr(engine, "run_captured"):
            run = engine.run_captured(SAMPLERS[SAMPLER], *arguments, **options)
            if run is not None:
                return run.x
        return SAMPLERS[SAMPLER](engine, *arguments, **options)


def _error(ours, expected):
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def _synced(gpu, call, engine):
    def run():
        call(engine)
        gpu.synchronize()

    return run


def _row(args, library, gpu, model, batch, ops, name, prepared, error):
    return {
        "name": f"tensorrt {name} {ops}",
        "sizes": f"{model} batch {batch} {args.dtype}"
        + (f" {args.steps} steps" if name == "sample" else ""),
        "baseline": f"torch engine, {args.dtype}",
        "device": gpu.identity,
        "max_error": error,
        "images": batch,
        "prepared_s": prepared,
        "rounds": args.rounds,
        "library": str(library),
        "version": __version__,
        "commit": machine.commit(),
    }


def _heading(library, gpu):
    parts = [gpu.identity, str(library), f"torch {torch.__version__}", f"adm_rt {__version__}"]
    return ", ".join([*parts, f"Python {platform.python_version()}, commit {machine.commit()}"])


def _line(row):
    error = "" if row["max_error"] is None else f", error {row['max_error']:.1e}"
    rate = 1e3 * row["images"] / row["ours_ms"]
    return (
        f"{row['name']}, {row['sizes']}: {row['ours_ms']:.2f} ms, torch {row['baseline_ms']:.2f} "
        f"ms, {row['ratio']:.2f}x, {rate:.1f} images/s{error}"
    )
