"""``adm-rt upscale``: enlarge the images of an ``.npz`` with an upsampling model."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from adm_rt.commands import flags
from adm_rt.commands.sample import MAX_DEFAULT_GRID, parse_classes, save


def add_arguments(parser):
    parser.usage = "adm-rt upscale --model MODEL --input FILE [options]"
    parser.description = (
        "Enlarge the images of an .npz (arr_0 uint8 [N, H, W, 3], arr_1 labels if any) with an "
        "upsampler. Without --output, samples/NAME.png (a grid) and samples/NAME.npz are written."
    )
    add = flags.add
    add(parser, "--model", "--model-path", required=True, help="folder or .pt of an upsampler")
    add(parser, "--input", "--base-samples", required=True, help="the .npz with the small images")
    add(parser, "--num-images", "--num-samples", "-n", type=int, help="only the first N images")
    add(parser, "--classes", help="labels separated by commas, instead of those in the .npz")
    add(parser, "--steps", "--timestep-respacing", type=flags.steps, default=25)
    add(parser, "--sampler", default="dpmpp_2m", help="dpmpp_2m (default), ddpm, ddim, unipc")
    add(parser, "--output", "-o", help=".npz, .png (a grid) or a folder of PNGs")
    flags.add_running(parser)
    parser.set_defaults(seed=None)  # without --seed the images' own seeds are used
    flags.add_structure(parser)


def run(args):
    from adm_rt.pipeline import Pipeline, check_early
    from adm_rt.request import check_count
    from adm_rt.result import SampleResult, check_output

    base = SampleResult.load(args.input)
    count = len(base)
    if args.num_images is not None:
        count = check_count("num_images", args.num_images, 1, len(base))
    rows = slice(count)
    outputs = [args.output] if args.output is not None else default_outputs(args.input, count)
    for output in outputs:
        check_output(output, count)
    check_early(
        args.steps, args.sampler, None, args.batch_size, args.seed or 0, None, args.num_images, {}
    )
    flags.set_threads(args.threads)
    pipeline = Pipeline.from_pretrained(
        args.model,
        engine=args.engine,
        device=args.device,
        dtype=args.dtype,
        preset=args.preset,
        **flags.structure(args),
    )
    if not args.quiet:
        for note in pipeline.notes:
            print(f"adm-rt: note: {note}", file=sys.stderr)
    labels = base.labels
    if args.classes is not None:
        labels = parse_classes(args.classes, pipeline.class_names)
    start = time.perf_counter()
    result = pipeline.upscale(
        base.images[rows],
        labels if labels is None or args.classes is not None else labels[rows],
        steps=args.steps,
        sampler=args.sampler,
        seed=args.seed or 0,
        seeds=base.seeds[rows] if args.seed is None else None,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    save(result, outputs, time.perf_counter() - start)


def default_outputs(source, count):
    """samples/<source>_upscaled.png (unless there are too many images) and .npz."""
    stem = f"{Path(source).stem}_upscaled"
    suffixes = (".png", ".npz") if count <= MAX_DEFAULT_GRID else (".npz",)
    return [Path("samples") / (stem + suffix) for suffix in suffixes]
