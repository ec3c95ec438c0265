"""``adm-rt evaluate``: numbers for a model, each by a sub-command of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

from adm_rt.commands import flags


def add_arguments(parser):
    commands = parser.add_subparsers(dest="what", required=True, metavar="nll|digits")
    _add_nll(commands)
    _add_digits(commands)


def run(args):
    return {"nll": _nll, "digits": _digits}[args.what](args)


def _add_nll(commands):
    nll = commands.add_parser(
        "nll",
        help="bits per dimension: the variational bound on images",
        description="Bits per dimension: the prior's term and one term for every step of the "
        "process, so that many passes of the network for every image.",
        allow_abbrev=False,
    )
    nll.usage = f"{nll.prog} MODEL --data SPEC [options]"
    flags.add_model(nll)
    add = flags.add
    add(
        nll,
        "--data",
        "--data-dir",
        required=True,
        metavar="SPEC",
        help="a folder, an .npz file, an LSUN folder, glyphs or digits (digits:test, ...)",
    )
    add(nll, "--num-samples", type=int, default=1000, metavar="N", help="first N images (1000)")
    add(
        nll,
        "--timestep-respacing",
        "--steps",
        default="",
        metavar="STEPS",
        help="the bound of a shorter chain, such as 100 (all steps)",
    )
    add(
        nll,
        "--clip-denoised",
        type=flags.boolean,
        default=True,
        metavar="BOOL",
        help="clip the predicted x_0 to [-1, 1] (true, as published)",
    )
    add(nll, "--data-seed", type=int, default=0, metavar="N", help="which stream of glyphs (0)")
    add(nll, "--batch-size", type=int, default=16, metavar="N", help="images at a time (16)")
    _add_running(nll)
    flags.add_structure(nll)


def _add_digits(commands):
    digits = commands.add_parser(
        "digits",
        help="FD-digits, precision, recall and classes of a model of 8x8 digits",
        description="Compare samples of a model of digits (8x8, 10 classes) with real ones, in the "
        "features of a small network that is trained now, and with a Gaussian of each class.",
        allow_abbrev=False,
    )
    digits.usage = f"{digits.prog} MODEL [options]"
    flags.add_model(digits)
    add = flags.add
    add(digits, "--steps", type=flags.steps, default=100, help="sampling steps (100)")
    add(digits, "--sampler", default="ddpm", help="(ddpm)")
    add(digits, "--seeds", type=int, default=5, metavar="N", help="sets of samples (5)")
    _add_running(digits)


def _add_running(parser):
    add = flags.add
    add(parser, "--device", default="auto", help="auto, cpu, cuda, cuda:N (auto)")
    add(parser, "--threads", type=int, metavar="N", help="CPU threads (torch's own number)")
    add(parser, "--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    add(parser, "--quiet", action="store_true", help="no progress bar")
    add(parser, "--json", metavar="FILE", help="write the numbers there too")


def _nll(args):
    from adm_rt.data import open_dataset
    from adm_rt.diffusion import Diffusion
    from adm_rt.engines.torch_gpu import resolve_device
    from adm_rt.evaluation.nll import bits_per_dim, summary
    from adm_rt.locate import locate
    from adm_rt.models import load_checkpoint
    from adm_rt.request import check_count

    _check_json(args.json)
    count = check_count("num_samples", args.num_samples)
    flags.set_threads(args.threads)
    device = resolve_device(args.device)
    given = flags.structure(args)
    network = load_checkpoint(locate(args.model, "MODEL"), args.preset, **given).to(device)
    cfg = network.cfg
    if cfg.kind == "classifier":
        raise ValueError(f"MODEL={args.model!r} is a classifier, which has no likelihood of images")
    diffusion = Diffusion.from_config(cfg.diffusion_config()).respaced(args.timestep_respacing)
    dataset = open_dataset(
        args.data,
        cfg.image_size,
        class_cond=cfg.class_cond or None,
        num_classes=cfg.num_classes if cfg.class_cond else None,
        class_names=network.info.class_names if cfg.class_cond else None,
        seed=args.data_seed,
    )
    count = count if dataset.num_images is None else min(count, dataset.num_images)
    images, labels = dataset.get_many(range(count), range(count))
    result = bits_per_dim(
        network,
        diffusion,
        images,
        labels if cfg.class_cond else None,
        clip_denoised=args.clip_denoised,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    numbers = summary(result)
    error = numbers["bits_per_dim_stderr"]
    print(
        f"{numbers['bits_per_dim']:.4f} bits per dim"
        + (f" +- {error:.4f}" if error is not None else "")
        + f" ({count:,} images of {args.data}, {diffusion.num_timesteps} steps, "
        f"prior {numbers['prior_bpd']:.2g})"
    )
    facts = {"model": args.model, "data": args.data, "seed": args.seed}
    facts |= {"timestep_respacing": args.timestep_respacing, "clip_denoised": args.clip_denoised}
    _write_json(args.json, {**facts, "timesteps": diffusion.timestep_map.tolist(), **numbers})


def _digits(args):
    import adm_rt
    from adm_rt.evaluation.digits import DigitScores, compare, markdown_table
    from adm_rt.request import check_count

    _check_json(args.json)
    check_count("seeds", args.seeds)
    flags.set_threads(args.threads)
    pipeline = adm_rt.Pipeline.from_pretrained(args.model, device=args.device)
    if pipeline.num_classes != 10 or pipeline.unet.cfg.image_size != 8:
        raise ValueError(f"MODEL={args.model!r} is not a model of 8x8 digits with 10 classes")

    def sample(labels, seed):
        return pipeline(
            len(labels),
            labels.tolist(),
            steps=args.steps,
            sampler=args.sampler,
            seed=args.seed + seed,
            progress=not args.quiet,
        ).images

    scores = DigitScores()
    rows = compare(scores, sample, range(args.seeds))
    print(markdown_table(rows))
    facts = {"model": args.model, "steps": args.steps, "sampler": args.sampler, "seed": args.seed}
    accuracies = {
        "features_accuracy": scores.features_accuracy,
        "judge_accuracy": scores.judge_accuracy,
    }
    _write_json(args.json, {**facts, "seeds": args.seeds, **accuracies, "rows": rows})


def _check_json(path):
    """Before the work, not after it."""
    if not path:
        return
    if Path(path).is_dir():
        raise ValueError(f"--json {path}: this is a folder; name a file")
    folder = Path(path).absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"--json {path}: the folder {folder} is not there or cannot be written")


def _write_json(path, record):
    if path is None:
        return
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
