"""The command lines of the benchmarks, and the checks that need no model. Nothing imports torch."""

from __future__ import annotations

import os

from adm_rt.benchmarking.machine import free_cores

DEVICES = ("cpu", "cuda")
_BOTH = "for torch and us"


def add_output(parser):
    """What every benchmark has."""
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT")
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="where (default: cpu; cuda: bench sample)"
    )


def add_ops(parser):
    """``adm-rt bench ops``."""
    add_output(parser)
    parser.add_argument("--batch", default="1,4", metavar="N,N", help="batch sizes (default: 1,4)")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help=f"{_BOTH} (default: 1)")
    _add_clock(parser)
    parser.add_argument(
        "--model",
        default="glyphs32",
        metavar="MODEL",
        help="whose native plan is taken apart, op by op: a shipped model, a folder, or a released "
        "model's name for random weights, such as 64x64_diffusion (default: glyphs32); none: no "
        "plan",
    )


def check_ops(args):
    """Raises ValueError; sets ``args.batches``."""
    _check_batches(args)


def _check_batches(args):
    try:
        args.batches = [int(part) for part in str(args.batch).split(",")]
    except ValueError:
        args.batches = []
    if not args.batches or min(args.batches) < 1:
        raise ValueError(f"--batch {args.batch}: give whole numbers from 1, such as 1,4")
    if args.threads < 1:
        raise ValueError(f"--threads {args.threads}: give at least 1")
    _check_clock(args.clock, args.threads)
    _check_output(args)


def add_sample(parser):
    """``adm-rt bench sample``."""
    add_output(parser)
    parser.add_argument("--list", action="store_true", help="print the cases and what they need")
    parser.add_argument(
        "--all", action="store_true", help="the long cases too (batch 4, 256x256, whole runs)"
    )
    parser.add_argument(
        "--contenders",
        default="",
        metavar="NAME,NAME",
        help="who runs beside eager PyTorch: native, torch (our engines), onnxruntime, openvino, "
        "compile, native_1 (native on one thread, beside several) (default: all that are here "
        "but the last two; compile's start takes minutes). On cuda, beside our torch engine: "
        "released, float16, channels_last, compile, ours_in_turn, ours_by_step",
    )
    parser.add_argument(
        "--rounds", type=int, help="samples of each (default: 5; on cuda 10, whole runs)"
    )
    parser.add_argument(
        "--dtype", default="float16", help="of ours, on cuda: float16 (default), bfloat16, float32"
    )
    parser.add_argument("--short", action="store_true", help="on cuda: a few cases, one rival")
    parser.add_argument(
        "--threads", default="1", metavar="N|all", help="of every contender (default: 1)"
    )
    _add_clock(parser)
    parser.add_argument(
        "--cores", default="", metavar="N,N", help="pin to these (default: the first allowed ones)"
    )
    parser.add_argument(
        "--isa",
        choices=("auto", "avx2"),
        default="auto",
        help="avx2: nobody uses more (ONNX Runtime has no setting; it is kept from it where the "
        "system can hide AVX-512 from a process)",
    )
    parser.add_argument(
        "--float64", action="store_true", help="also compare everybody with float64"
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="keep the models and graphs there for the next time"
    )
    parser.add_argument("--chart", metavar="FILE", help="draw the rows as a PNG (matplotlib)")


def check_sample(args):
    """Raises ValueError; sets ``args.rounds``, ``args.core_list`` and ``args.thread_count``."""
    if args.device == "cuda":
        return _check_cuda_sample(args)
    args.rounds = 5 if args.rounds is None else args.rounds
    allowed = free_cores()
    try:
        cores = [int(part) for part in args.cores.split(",")] if args.cores else allowed
        threads = len(cores) if args.threads == "all" else int(args.threads)
    except ValueError:
        raise ValueError(
            f"--cores {args.cores!r}, --threads {args.threads!r}: give numbers, such as "
            "--cores 0,1 --threads 2, or --threads all"
        ) from None
    if not set(cores) <= set(allowed) or len(set(cores)) != len(cores):
        raise ValueError(f"--cores {args.cores}: allowed here are {_joined(allowed)}, each once")
    if not 1 <= threads <= len(cores):
        raise ValueError(
            f"--threads {args.threads}: there are {len(cores)} cores ({_joined(cores)}); more "
            "threads than cores would only wait for each other"
        )
    _check_clock(args.clock, threads)
    args.core_list, args.thread_count = cores[:threads], threads
    for name in ("json", "chart"):
        _check_file(f"--{name}", getattr(args, name))
    _check_output(args)


def _check_cuda_sample(args):
    from adm_rt.engines.base import DTYPES

    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype} is unknown; allowed: {', '.join(DTYPES)}")
    own = {"all": False, "threads": "1", "clock": "wall", "cores": "", "isa": "auto"}
    own |= {"float64": False, "folder": None, "chart": None}
    for name, default in own.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name} is for --device cpu; leave it out")
    args.rounds = 10 if args.rounds is None else args.rounds
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: give at least 1")
    _check_file("--json", args.json)


def add_gradient(parser):
    """``adm-rt bench gradient``."""
    add_output(parser)
    parser.add_argument(
        "--model",
        default="64x64_classifier",
        metavar="NAME",
        help="a released classifier, with random weights (default: 64x64_classifier)",
    )
    parser.add_argument("--batch", default="1,4", metavar="N,N", help="batch sizes (default: 1,4)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help=f"{_BOTH} (default: 1)")
    _add_clock(parser)


def check_gradient(args):
    """Raises ValueError; sets ``args.batches``."""
    from adm_rt.models.presets import preset

    if preset(args.model).kind != "classifier":
        raise ValueError(
            f"--model {args.model} is no classifier; use 64x64_classifier, for example"
        )
    _check_batches(args)


def add_export(parser):
    """``adm-rt bench export``."""
    add_output(parser)
    parser.add_argument(
        "--model",
        default="64x64_diffusion",
        metavar="NAME",
        help="one of bench sample's models (default: 64x64_diffusion, with random weights)",
    )
    parser.add_argument(
        "--batch", default="1,2,5", metavar="N,N", help="batch sizes (default: 1,2,5)"
    )
    parser.add_argument("--dtype", default="float32", metavar="T,T", help="float32, float16")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each (default: 3)")
    parser.add_argument(
        "--threads", type=int, default=1, help="for torch and ONNX Runtime (default: 1)"
    )
    _add_clock(parser)


def check_export(args):
    """Raises ValueError; sets ``args.batches`` and ``args.dtypes``."""
    from adm_rt.benchmarking.sampling_cases import MODELS

    known = [name for name, model in MODELS.items() if model.zoo is None]
    if args.model not in known:
        raise ValueError(f"--model {args.model} is unknown; allowed: {', '.join(known)}")
    args.dtypes = args.dtype.split(",")
    if not set(args.dtypes) <= {"float32", "float16"}:
        raise ValueError(
            f"--dtype {args.dtype}: allowed are float32 and float16 (ONNX Runtime has no bfloat16 "
            "convolution on a CPU)"
        )
    _check_batches(args)


def add_tensorrt(parser):
    """``adm-rt bench tensorrt``."""
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument(
        "--models",
        default="64x64_diffusion",
        metavar="NAME,NAME",
        help="bench sample's or released ones, with random weights (default: 64x64_diffusion)",
    )
    parser.add_argument("--batch", default="1,8", metavar="N,N", help="batch sizes (default: 1,8)")
    parser.add_argument("--dtype", default="float16", help="float16 (default), bfloat16, float32")
    parser.add_argument(
        "--ops",
        default="plugins,functions",
        metavar="WHICH,WHICH",
        help="our nodes as our kernels, as TensorRT's own operations (default: both)",
    )
    parser.add_argument("--steps", type=int, default=25, help="of a sample (default: 25)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each (default: 9)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N (default: the current one)")


def check_tensorrt(args):
    """Raises ValueError; sets ``args.batches``, and makes lists of ``models`` and ``ops``."""
    from adm_rt.benchmarking.sampling_cases import ALL_MODELS
    from adm_rt.engines.base import DTYPES

    args.models, args.ops = args.models.split(","), args.ops.split(",")
    for name in args.models:
        if name not in ALL_MODELS:
            raise ValueError(f"--models {name} is unknown; allowed: {', '.join(ALL_MODELS)}")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype} is unknown; allowed: {', '.join(DTYPES)}")
    if not set(args.ops) <= {"plugins", "functions"}:
        raise ValueError(f"--ops {','.join(args.ops)}: allowed are plugins and functions")
    if args.steps < 1 or args.rounds < 1:
        raise ValueError(f"--steps {args.steps} and --rounds {args.rounds} must be at least 1")
    parts = args.batch.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--batch {args.batch}: give whole numbers from 1, such as 1,8")
    args.batches = [int(part) for part in parts]
    _check_file("--json", args.json)


def add_train(parser):
    """``adm-rt bench train``."""
    add_output(parser)
    parser.add_argument(
        "--model",
        default="64x64_diffusion",
        metavar="NAME",
        help="a released denoiser, with random weights (default: 64x64_diffusion)",
    )
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help=f"{_BOTH} (default: 1)")
    _add_clock(parser)


def check_train(args):
    """Raises ValueError."""
    from adm_rt.models.presets import preset

    if preset(args.model).kind != "diffusion":
        raise ValueError(f"--model {args.model} is no denoiser; use 64x64_diffusion, for example")
    for name in ("batch", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give at least 1")
    _check_clock(args.clock, args.threads)
    _check_output(args)


def _add_clock(parser):
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the processor time of the one thread, for a machine that others use too",
    )


def _check_clock(clock, threads):
    if clock == "cpu" and threads > 1:
        raise ValueError("--clock cpu sees one thread only; use --threads 1 or --clock wall")


def _check_output(args):
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: give at least 1")
    if args.device != "cpu":
        raise ValueError(
            f"--device {args.device}: this benchmark runs on the CPU; on a GPU there are `adm-rt "
            "bench sample --device cuda` and benchmarks/bench_cuda_ops.py"
        )
    _check_file("--json", args.json)


def _check_file(flag, path):
    if path:  # before minutes of work, not after
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ValueError(f"{flag} {path}: cannot write into the folder {folder}")


def _joined(numbers):
    return ",".join(map(str, numbers))
