"""``adm-rt export``: a model into a folder of ONNX graphs that runs without PyTorch."""

from __future__ import annotations

from adm_rt.commands import flags

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_arguments(parser):
    parser.usage = "adm-rt export MODEL --out FOLDER [options]"
    parser.description = (
        "Export a denoiser or an upsampler, and the gradient of the classifier that guides it, as "
        "ONNX graphs with a manifest. FOLDER must not exist or be empty; "
        "adm-rt sample --model FOLDER --engine onnx runs it. Needs pip install 'adm_rt[onnx]'."
    )
    add = flags.add
    flags.add_model(parser, classifier=True)
    add(parser, "--dtype", default="fp32", help="fp32 (default), fp16 or bf16")
    add(parser, "--out", "--output", "-o", required=True, metavar="FOLDER", help="a new folder")
    add(
        parser,
        "--loss-scale",
        type=float,
        help="what the classifier's gradient is multiplied by inside its graph, best a power of "
        "two (default: 128 for fp16, else 1)",
    )
    flags.add_structure(parser, classifier=True)


def run(args):
    from adm_rt.export import manifest
    from adm_rt.export.exporter import export_model, require_onnx
    from adm_rt.loading import load_parts
    from adm_rt.locate import locate

    dtype = DTYPES.get(args.dtype, args.dtype)
    if dtype not in manifest.DTYPES:
        raise ValueError(f"dtype={args.dtype!r} is not known; allowed: {', '.join(DTYPES)}")
    if not args.out:
        raise ValueError("out='' is empty; give a new folder")
    require_onnx()
    if manifest.is_exported_folder(locate(args.model, "MODEL")):
        raise ValueError(
            f"MODEL={args.model!r} is an exported folder already; give the model that it came of"
        )
    structure = flags.structure(args)
    parts = load_parts(
        args.model, args.classifier, "none", "native", "auto", "auto", args.preset, structure
    )
    folder = export_model(
        parts["unet"] or parts["upsampler"],
        args.out,
        parts["classifier"],
        dtype,
        args.loss_scale,
        metadata=parts["settings"],
    )
    networks = manifest.read_manifest(folder).networks
    files = ", ".join(f"{n.file} {_megabytes(n.bytes + (n.data_bytes or 0))}" for n in networks)
    print(f"adm-rt: {args.model} -> {folder}: {files}")


def _megabytes(size):
    return f"{size / 1e6:.1f} MB"
