"""``adm-rt bench sample --device cuda``: guided 25-step DDIM samples of the released models.

Random weights, the same noise for all. Before anything is timed, each network is compared with the
published one in float32 at one step, and the samples with each other. Then whole samples are timed
between CUDA events, contenders in turns, and the median is reported. Not measured yet.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import numpy as np
import torch

from adm_rt import benchmarking
from adm_rt.benchmarking import machine
from adm_rt.benchmarking.cuda_contenders import CONTENDERS, Released, Work
from adm_rt.benchmarking.cuda_ops import milliseconds
from adm_rt.benchmarking.sampling_cases import random_weights
from adm_rt.benchmarking.tensorrt import LIMITS
from adm_rt.diffusion import Diffusion
from adm_rt.models import preset
from adm_rt.models.model_weights import ModelWeights
from adm_rt.models.presets import sampling_settings
from adm_rt.models.weight_folder import ModelInfo

STEPS = 25
# Of the root mean square of the baseline's sample: rounding grows along a run, mistakes more so.
SAMPLE_LIMIT = 0.1


class Case(NamedTuple):
    """A released model, whose classifier guides, and a batch size. short: part of --short."""

    model: str
    batch: int
    short: bool = False

    @property
    def name(self):
        return f"{self.model} {self.batch}"


CASES = (
    Case("64x64_diffusion", 1, short=True),
    Case("64x64_diffusion", 64),
    Case("128x128_diffusion", 1),
    Case("128x128_diffusion", 32),
    Case("256x256_diffusion", 1, short=True),
    Case("256x256_diffusion", 4, short=True),
    Case("256x256_diffusion", 16),
    Case("512x512_diffusion", 1),
    Case("512x512_diffusion", 8),
)
SHORT_CONTENDERS = ("ours", "float16")


def rows(args):
    """Compare and time every case, printing as it goes; None after --list.

    ``args.failures`` collects what of ours failed. Raises ValueError without a GPU.
    """
    args.failures = []
    cases, names = selected(args)
    if args.list:
        print("\n".join(f"{c.name}{'  (--short)' * c.short}" for c in cases))
        return None
    if not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no CUDA device; nothing was measured. Use --device cpu, or "
            "a machine with a GPU (docs/run-on-a-gpu-machine.md)"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {args.dtype}")
    torch.backends.cudnn.benchmark = True  # for everybody
    return measured(cases, names, args, device)


def selected(args):
    """(cases, names of contenders) that the command line asks for; ValueError for none."""
    asked = [name for name in args.contenders.split(",") if name]
    unknown = [name for name in asked if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"--contenders {unknown[0]}: known are {', '.join(CONTENDERS)}")
    if not asked:
        asked = [n for n, c in CONTENDERS.items() if c.default and not args.short]
        asked = asked or SHORT_CONTENDERS
    cases = [c for c in CASES if args.only in c.name and (c.short or not args.short)]
    if not cases:
        known = "; ".join(c.name for c in CASES)
        raise ValueError(f"--only {args.only!r} is part of no case; there are: {known}")
    return cases, ["ours", *(name for name in CONTENDERS if name in asked and name != "ours")]


def measured(cases, names, args, device, gpu=None):
    """Rows of all cases. args: rounds, dtype, json, failures; gpu: for tests, see TorchEngine."""
    result = []
    for model in dict.fromkeys(case.model for case in cases):
        networks = _networks(model)
        contenders = {}
        for case in (c for c in cases if c.model == model):
            work = _work(case, networks, device)
            try:
                exact = _exact(networks, work, device)
            except RuntimeError as error:  # not enough memory, most likely: other cases need less
                _failed("published code in float32, to compare with", case.name, error, args)
                continue
            for name in names:
                if name not in contenders:
                    contenders[name] = _made(name, networks, device, gpu, args)
            racing = {name: c for name, c in contenders.items() if c is not None}
            result += _case_rows(case, work, exact, racing, args, device)
            if args.json:  # what is measured is kept, whatever comes
                benchmarking.write(args.json, result)
        del contenders
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def _networks(model):
    """part -> ModelWeights with random weights."""
    parts = {"diffusion": model, "classifier": sampling_settings(model).classifier}
    networks = {}
    for part, name in parts.items():
        cfg = preset(name)
        state = random_weights(cfg)
        networks[part] = ModelWeights(ModelInfo(cfg), lambda state=state: state, name)
    return networks


def _work(case, networks, device):
    cfg = networks["diffusion"].cfg
    rng = np.random.Generator(np.random.Philox(key=[5, case.batch]))
    shape = (case.batch, cfg.in_channels, cfg.image_size, cfg.image_size)
    x = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device)
    y = torch.from_numpy(rng.integers(0, networks["classifier"].cfg.num_classes, case.batch))
    settings = sampling_settings(case.model)
    scale = settings.ddim_guidance_scale or settings.guidance_scale
    flags = {**cfg.diffusion_config(), "timestep_respacing": f"ddim{STEPS}"}
    return Work(x, y.to(device), Diffusion(**flags), float(scale))


class _Float32(Released):
    """The published networks in float32, to compare with."""

    def _made(self, weights, half):
        cfg = weights.cfg.replace(use_fp16=False)
        return super()._made(ModelWeights(ModelInfo(cfg), weights.state_dict, "float32"), False)


def _exact(networks, work, device):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = False, False  # it runs once
    try:
        return _Float32(networks, device).networks(work, STEPS // 2)
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


def _made(name, networks, device, gpu, args):
    """The contender, or None where it cannot be made."""
    options = {"dtype": args.dtype, "gpu": gpu}
    try:
        return CONTENDERS[name].make(networks, device, **options)
    except (ImportError, RuntimeError, ValueError) as error:
        _failed(name, "cannot be made", error, args)
        return None


def _failed(name, what, error, args):
    text = f"{name}: {what}: {' '.join(str(error).split())[:300]}"
    if name == "ours":
        args.failures.append(text)
    print(f"  {text}; left out", flush=True)


def _case_rows(case, work, exact, contenders, args, device):
    print(f"{case.name}, {STEPS} steps", flush=True)
    errors, samples, runs = {}, {}, {}
    for name, contender in contenders.items():
        try:
            found = contender.networks(work, STEPS // 2)
            # NumPy's maximum: of a number and NaN it is NaN.
            errors[name] = float(np.max([_error(found[part], exact[part]) for part in exact]))
            limit = LIMITS[args.dtype if name.startswith("ours") else "float16"]
            if not errors[name] <= limit:
                raise ValueError(
                    f"a network differs from float32 by {errors[name]:.2g} of its largest value; "
                    f"{limit:.0e} is allowed"
                )
            sample = contender.sample(work).clone()
            if not sample.isfinite().all():
                raise ValueError("its sample is not finite")
            samples[name] = sample
            runs[name] = lambda contender=contender: contender.sample(work)
        except (ImportError, RuntimeError, ValueError) as error:
            _failed(name, case.name, error, args)
    distances = _distances(samples)
    far = {name: d for name, d in distances.items() if not d <= SAMPLE_LIMIT}
    if far:
        text = ", ".join(f"{name} {d:.2g}" for name, d in far.items())
        _failed("ours", case.name, f"its sample differs from those of {text}", args)
        return []
    if "ours" not in runs or len(runs) == 1:
        return []
    times = _race(runs, args.rounds, device)
    found = [_row(case, name, times, errors, distances, args, device) for name in distances]
    for row in found:
        print(f"  {line(row)}", flush=True)
    return found


def _distances(samples):
    """Of our sample from each other one: root mean square, over that of the other."""
    ours = samples.pop("ours", None)
    if ours is None:
        return {}
    return {
        name: float((ours - other).square().mean().sqrt() / other.square().mean().sqrt())
        for name, other in samples.items()
    }


def _error(found, exact):
    return float((found - exact).abs().max() / exact.abs().max())


def _race(runs, rounds, device):
    """name -> median milliseconds of a sample; all have run before."""
    times = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            times[name].append(milliseconds(runs[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def _row(case, name, times, errors, distances, args, device):
    return {
        "name": "sample",
        "sizes": f"{case.model} batch {case.batch} {args.dtype} {STEPS} steps",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ours": CONTENDERS["ours"].make.title,
        "baseline": name,
        "baseline_title": CONTENDERS[name].make.title,
        "ours_ms": times["ours"],
        "baseline_ms": times[name],
        "ratio": times[name] / times["ours"],
        "max_error": errors["ours"],
        "baseline_max_error": errors[name],
        "sample_distance": distances[name],
        "rate": 1e3 * case.batch / times["ours"],
        "rate_unit": "images/s",
        "rounds": args.rounds,
        "versions": machine.versions(),
        "commit": machine.commit(),
    }


def line(row):
    return (
        f"{row['sizes']}: ours {row['ours_ms']:.1f} ms ({row['rate']:.2f} images/s), "
        f"{row['baseline']} {row['baseline_ms']:.1f} ms, {row['ratio']:.2f}x; error "
        f"{row['max_error']:.1e} and {row['baseline_max_error']:.1e}, samples "
        f"{row['sample_distance']:.1e} apart"
    )
