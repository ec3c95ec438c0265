"""``adm-rt sample``: images from a shipped model, a folder or released weights."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from pathlib import Path

from adm_rt.commands import flags

_COUNT_HELP = "how many (default: one per seed or class of a given list, else 16)"
_LONGEST_WORD = 32  # of a default file name
MAX_DEFAULT_GRID = 100  # more images than this are written as .npz only


def add_arguments(parser):
    parser.usage = "adm-rt sample [options]"
    parser.description = (
        "Make images. guided-diffusion's flag names are accepted where the meaning is the same. "
        "Without --output, samples/NAME.png (a grid) and samples/NAME.npz are written."
    )
    add = flags.add
    add(parser, "--model", "--model-path", default="glyphs32", help="zoo name, folder or .pt")
    flags.add_classifier(parser)
    add(parser, "--upsampler", "--upsampler-path", help="the same for an upsampler that follows")
    add(parser, "--num-images", "--num-samples", "-n", type=int, help=_COUNT_HELP)
    add(
        parser,
        "--classes",
        help="class names or indices separated by commas, repeated as needed (default: random)",
    )
    add(
        parser,
        "--steps",
        "--timestep-respacing",
        type=flags.steps,
        default=25,
        help="number of steps, or a respacing string: ddim25, 90,60,60,20,20 (default 25)",
    )
    add(
        parser,
        "--sampler",
        help="dpmpp_2m, ddpm, ddim, unipc; default: the model's own, else dpmpp_2m",
    )
    add(parser, "--use-ddim", type=flags.boolean, help="True: --sampler ddim, False: ddpm")
    add(
        parser,
        "--guidance-scale",
        "--classifier-scale",
        type=float,
        help="strength of classifier guidance, 0 is off (default: the model's own)",
    )
    add(
        parser,
        "--guidance-interval",
        default="auto",
        help="LOW,HIGH: guide only at these timesteps; all (default: the model's own, else all)",
    )
    add(parser, "--guidance-every", type=int, default=1, help="new gradient every k steps")
    add(parser, "--cfg-scale", type=float, help="classifier-free guidance (needs a null class)")
    add(
        parser,
        "--eta",
        type=float,
        default=0.0,
        help="noise of ddim, 0..1 (default 0); the base model's",
    )
    add(parser, "--thresholding", help="of the base model's x0: static (default), dynamic, none")
    add(parser, "--clip-denoised", type=flags.boolean, help="False: --thresholding none")
    add(parser, "--upsampler-steps", type=flags.steps, help="default: as --steps")
    add(parser, "--upsampler-sampler", help="default: as --sampler")
    add(parser, "--seeds", help="one seed per image, separated by commas, instead of --seed")
    add(parser, "--output", "-o", help=".npz, .png (a grid) or a folder of PNGs")
    flags.add_running(parser)
    flags.add_structure(parser, classifier=True)


def run(args):
    from adm_rt.request import count_images
    from adm_rt.result import check_output

    request = sample_arguments(args)
    count = count_images(request["num_images"], _split(request["classes"]), request["seeds"])
    if args.output is not None:
        outputs = [args.output]
    else:
        outputs = default_outputs(args, request)
        if count > MAX_DEFAULT_GRID:
            outputs = [path for path in outputs if path.suffix == ".npz"]
    for output in outputs:
        check_output(output, count)
    pipeline_arguments = {
        "engine": args.engine,
        "device": args.device,
        "dtype": args.dtype,
        "preset": args.preset,
        **flags.structure(args),
    }
    from adm_rt.pipeline import Pipeline, check_early

    check_early(**{k: request[k] for k in _EARLY}, callback=None, options={})
    flags.set_threads(args.threads)
    pipeline = Pipeline.from_pretrained(
        args.model, args.classifier, args.upsampler, **pipeline_arguments
    )
    if not args.quiet:
        for note in pipeline.notes:
            print(f"adm-rt: note: {note}", file=sys.stderr)
    if request["classes"] is not None:
        request["classes"] = parse_classes(request["classes"], pipeline.class_names)
    start = time.perf_counter()
    result = pipeline(**request, progress=not args.quiet)
    save(result, outputs, time.perf_counter() - start)


def save(result, outputs, seconds):
    """Write ``result`` to all of ``outputs`` and say so; Ctrl-C between two says what is there."""
    written = []
    try:
        for output in outputs:
            result.save(output)
            written.append(str(output))
    except KeyboardInterrupt:
        if not written:
            raise
        raise KeyboardInterrupt(f"interrupted; written: {' and '.join(written)}") from None
    print(f"adm-rt: {len(result)} images in {seconds:.1f} s -> {' and '.join(written)}")


_EARLY = ("steps", "sampler", "guidance_scale", "batch_size", "seed", "num_images")


def sample_arguments(args):
    """Keyword arguments of ``Pipeline.__call__``; conflicting aliases are an error."""
    sampler = args.sampler
    if args.use_ddim is not None:
        alias = "ddim" if args.use_ddim else "ddpm"
        if sampler not in (None, alias):
            raise ValueError(f"--use_ddim {args.use_ddim} and --sampler {sampler} disagree")
        sampler = alias
    thresholding = args.thresholding
    if args.clip_denoised is not None:
        if thresholding is not None and args.clip_denoised == (thresholding == "none"):
            raise ValueError(
                f"--clip_denoised {args.clip_denoised} and --thresholding {thresholding} disagree"
            )
        thresholding = thresholding or ("static" if args.clip_denoised else "none")
    return {
        "num_images": args.num_images,
        "classes": args.classes,
        "steps": args.steps,
        "sampler": sampler or "auto",
        "guidance_scale": args.guidance_scale,
        "eta": args.eta,
        "thresholding": thresholding or "static",
        "guidance_interval": _interval(args.guidance_interval),
        "guidance_every": args.guidance_every,
        "cfg_scale": args.cfg_scale,
        "seed": args.seed,
        "seeds": _numbers("--seeds", args.seeds, int),
        "batch_size": args.batch_size,
        "upsampler_steps": args.upsampler_steps,
        "upsampler_sampler": args.upsampler_sampler,
    }


def default_outputs(args, request):
    """samples/<model>_<what makes it different>.png and .npz.

    Requests that differ in anything but the number of images have different names.
    """
    from adm_rt.locate import display_name

    interval = request["guidance_interval"]
    words = [
        display_name(args.model),
        "" if request["sampler"] == "auto" else request["sampler"],
        _word("steps", request["steps"] or "all"),
        _word("scale", request["guidance_scale"]),
        _word("interval", "all" if interval is None else interval, unless="auto"),
        _word("every", request["guidance_every"], unless=1),
        _word("cfg", request["cfg_scale"]),
        _word("eta", request["eta"], unless=0),
        _word("threshold-", request["thresholding"], unless="static"),
        _word("class", args.classes),
        _word("up-", args.upsampler and display_name(args.upsampler)),
        _word("upsteps", request["upsampler_steps"]),
        _word("up-", request["upsampler_sampler"]),
        f"seed{args.seed}" if args.seeds is None else _word("seeds", args.seeds),
    ]
    stem = "_".join(word for word in words if word)
    return [Path("samples") / f"{stem}.png", Path("samples") / f"{stem}.npz"]


def _word(name, value, unless=None):
    """name and value as a part of a file name, a hash in place of what is long or has other signs
    than a name should have; "" for ``unless`` and None."""
    if value is None or value == unless:
        return ""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    word = name + re.sub(r"[, ()]+", "-", text).strip("-")
    if len(word) > _LONGEST_WORD or re.search(r"[^A-Za-z0-9_., ()]", text):
        word = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return word


def parse_classes(text, class_names):
    """ "A,B,7" -> names where the model has them, else indices."""
    values = []
    for part in text.split(","):
        part = part.strip()
        if class_names and part in class_names:
            values.append(part)
        else:
            values.append(int(part) if part.removeprefix("-").isdecimal() else part)
    return values if len(values) > 1 else values[0]


def _split(classes):
    parts = [] if classes is None else classes.split(",")
    return parts if len(parts) > 1 else None


def _interval(text):
    if text in ("auto", "all"):
        return None if text == "all" else text
    numbers = _numbers("--guidance-interval", text, float)
    if len(numbers) != 2:
        raise ValueError(f"--guidance-interval {text!r}: LOW,HIGH is needed, or all")
    return numbers


def _numbers(flag, text, kind):
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r}: numbers separated by commas are needed") from None
