"""``adm-rt build-engine``: TensorRT engines beforehand, for this machine or to take along."""

from __future__ import annotations

import re
import time
from pathlib import Path

from adm_rt.commands import flags
from adm_rt.commands.export import DTYPES

_OPS = ("auto", "plugins", "functions")


def add_arguments(parser):
    parser.usage = "adm-rt build-engine MODEL [options]"
    parser.description = (
        "Build the TensorRT engines of a denoiser, or an upsampler, and of its classifier's "
        "gradient into the cache, where --engine tensorrt finds them. MODEL may be a folder of "
        "adm-rt export. Needs TensorRT: pip install 'adm_rt[tensorrt]'."
    )
    add = flags.add
    flags.add_model(parser, classifier=True)
    add(parser, "--dtype", default="auto", help="fp32, fp16, bf16; auto: fp16, or the folder's")
    add(
        parser,
        "--batch",
        action="append",
        help="batch sizes: one (static) or least,tuned,most; may be repeated (default 1,8,32)",
    )
    add(parser, "--refit", action="store_true", help="weights can be exchanged without a build")
    add(
        parser,
        "--ops",
        default="auto",
        help="plugins: our nodes run our kernels; functions: TensorRT's own; default auto",
    )
    add(parser, "--device", default="auto", help="auto, cuda, cuda:N (default auto)")
    add(
        parser,
        "--compute-capability",
        help="8.9: build for a GPU that is not here (TensorRT-RTX alone)",
    )
    add(parser, "--out", metavar="FOLDER", help="copy the engine files there, to take along")
    add(
        parser,
        "--adopt",
        action="append",
        metavar="FILE",
        help="take an engine file that was built elsewhere into the cache; needs --trust",
    )
    add(parser, "--trust", action="store_true", help="run code from the files of --adopt")
    flags.add_structure(parser, classifier=True)


def run(args):
    from adm_rt.engines import tensorrt_adapter
    from adm_rt.engines.tensorrt_adapter import Profile
    from adm_rt.engines.tensorrt_builder import DEFAULT_PROFILE, EngineBuilder
    from adm_rt.engines.tensorrt_cache import EngineCache, default_folder
    from adm_rt.engines.tensorrt_source import Sources
    from adm_rt.export.manifest import DTYPES as KNOWN
    from adm_rt.loading import load_parts

    dtype = DTYPES.get(args.dtype, args.dtype)
    if dtype not in ("auto", *KNOWN):
        raise ValueError(f"dtype={args.dtype!r} is not known; allowed: auto, {', '.join(DTYPES)}")
    if args.ops not in _OPS:
        raise ValueError(f"ops={args.ops!r} is unknown; allowed: {', '.join(_OPS)}")
    profiles = [Profile.parse(text) for text in args.batch or [str(DEFAULT_PROFILE)]]
    cache = EngineCache(default_folder())
    if cache.folder is None and args.out is None:
        raise ValueError(
            "the cache is off (ADM_RT_CACHE) and --out is missing: nothing would be kept; give one"
        )
    library = tensorrt_adapter.library()
    if args.compute_capability is not None:
        library.compute_capability(args.compute_capability)  # before a model is loaded and exported
    gpu = _gpu_identity(library, args)
    structure = flags.structure(args)
    parts = load_parts(
        args.model, args.classifier, "none", "tensorrt", "auto", "auto", args.preset, structure
    )
    sources = Sources(parts["unet"] or parts["upsampler"], parts["classifier"], dtype)
    builder = EngineBuilder(
        library,
        cache,
        sources,
        gpu,
        refit=args.refit,
        ops=args.ops,
        compute_capability=args.compute_capability,
    )
    for note in builder.notes:
        print(f"adm-rt: note: {note}")
    if args.adopt:
        for file in args.adopt:
            name, profile = builder.adopt(file, args.trust)
            print(f"adm-rt: {file} -> {cache.folder}: {name}, batches of {profile}")
        return
    try:
        for name in sources.names:
            for profile in profiles:
                _build(builder, name, profile, args.out, parts["name"])
    finally:
        sources.close()


def _build(builder, name, profile, out, model):
    begin = time.perf_counter()
    facts = builder.facts(name, profile)
    plan = builder.plan(facts)
    seconds = time.perf_counter() - begin
    where = builder.cache.folder or "nowhere"
    if out is not None:
        where = Path(out) / _file_name(model, facts)
        builder.cache.copy(facts, plan, where)
    print(
        f"adm-rt: {name}, batches of {profile}, {facts['dtype']}, {facts['ops']}: "
        f"{len(plan) / 1e6:.1f} MB in {seconds:.1f} s -> {where}",
        flush=True,
    )


def _file_name(model, facts):
    words = [model, facts["network"], facts["dtype"], f"batch{facts['batch']}", facts["gpu"]]
    return re.sub(r"[^A-Za-z0-9]+", "-", "_".join(words)).strip("-") + ".engine"


def _gpu_identity(library, args):
    """What the engine is for; TensorRT-RTX builds without a GPU."""
    from adm_rt.engines.torch_gpu import TorchGpu

    if library.is_rtx:
        if args.device != "auto":
            raise ValueError(
                f"device={args.device!r}: {library} builds for a range of GPUs and uses none of "
                "them; leave it out, or name another kind of GPU with --compute-capability"
            )
        return "none"
    return TorchGpu(args.device).identity
