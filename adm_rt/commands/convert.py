"""``adm-rt convert``: a released ``.pt`` into a checked folder of safetensors, and back."""

from __future__ import annotations

from pathlib import Path

from adm_rt.commands import flags


def add_arguments(parser):
    parser.usage = "adm-rt convert SRC DST [options]"
    parser.description = (
        "Convert weights: a released .pt (or a folder) into a folder of config.json, "
        "model.safetensors and a sha256 manifest, or, when DST ends in .pt, into a state_dict that "
        "guided-diffusion loads. DST must not exist."
    )
    parser.add_argument("source", metavar="SRC", help="zoo name, folder or .pt")
    parser.add_argument("destination", metavar="DST", help="new folder, or a new .pt file")
    flags.add(parser, "--dtype", help="float32, float16 or bfloat16 on disk (default: as SRC)")
    flags.add_structure(parser, classifier=True)


def run(args):
    from adm_rt.locate import locate
    from adm_rt.models.checkpoint import convert

    suffix = Path(args.destination).suffix
    if not args.destination or suffix in (".safetensors", ".pth", ".ckpt", ".npz"):
        raise ValueError(
            f"DST={args.destination!r}: give a new folder, or a name that ends in .pt; the weights "
            "in a folder are model.safetensors"
        )
    source = locate(args.source, "SRC")
    convert(source, args.destination, args.dtype, preset=args.preset, **flags.structure(args))
    print(f"adm-rt: {args.source} -> {args.destination}")
