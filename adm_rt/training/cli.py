"""``adm-rt train diffusion|classifier``: flags, the plan that is printed, the run, the export."""

import argparse
import dataclasses

from adm_rt.models.config import ModelConfig

_HELP = {
    "iterations": "updates to make (required: training never runs without an end)",
    "out": "folder for checkpoints, log.csv and the final model",
    "precision": "float32 or bf16 (autocast, float32 master weights)",
    "cooldown_steps": "linear decay of the learning rate to zero over the last steps",
}


def add_arguments(parser):
    """Add ``diffusion`` and ``classifier`` below the ``train`` command."""
    from adm_rt.training.trainer import TrainConfig

    commands = parser.add_subparsers(dest="what", required=True, metavar="diffusion|classifier")
    for what in ("diffusion", "classifier"):
        command = commands.add_parser(
            what,
            help=f"train a {'noisy ' * (what == 'classifier')}{what} model",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("--data", default="glyphs", choices=["glyphs"], help="data set")
        command.add_argument("--data-seed", type=int, default=1, help="seed of the data stream")
        command.add_argument("--threads", type=int, default=0, help="torch threads, 0: torch's own")
        command.add_argument(
            "--export-dtype",
            default="float16",
            choices=("float32", "float16", "bfloat16"),
            help="dtype of the final weights",
        )
        for field in dataclasses.fields(TrainConfig):
            _add_field(command, field, required=field.default is dataclasses.MISSING)
        for field in dataclasses.fields(ModelConfig):
            if field.name not in ("kind", "in_channels", "num_classes", "class_cond"):
                _add_field(command, field)
        if what == "classifier":
            command.set_defaults(num_head_channels=64)  # as published; its pooling needs a number


def _add_field(command, field, required=False):
    kind = type(field.default) if not required else {"int": int}.get(str(field.type), str)
    kind = int if required and field.name == "iterations" else kind
    options = {"required": True} if required else {"default": field.default}
    if kind is bool:
        options |= {"type": _boolean, "metavar": "BOOL"}
    else:
        options["type"] = kind
    names = [f"--{field.name.replace('_', '-')}"]
    if "_" in field.name:
        names.append(f"--{field.name}")
    command.add_argument(*names, dest=field.name, help=_HELP.get(field.name, "-"), **options)


def _boolean(text):
    if text.lower() in ("1", "true", "yes", "t", "y"):
        return True
    if text.lower() in ("0", "false", "no", "f", "n"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false")


def run(args):
    """Train what ``args`` (parsed by ``add_arguments``) says; writes ``<out>/final``."""
    import torch

    from adm_rt import models
    from adm_rt.commands.flags import set_threads
    from adm_rt.data import GLYPH_CLASSES
    from adm_rt.diffusion import Diffusion
    from adm_rt.training.tasks import ClassifierTask, DiffusionTask, GlyphStream
    from adm_rt.training.trainer import TrainConfig, Trainer

    values = vars(args)
    flags = {f.name: values[f.name] for f in dataclasses.fields(ModelConfig) if f.name in values}
    classes = list(GLYPH_CLASSES)
    flags |= {"kind": args.what, "num_classes": len(classes)}
    flags["class_cond"] = args.what == "diffusion"
    cfg = ModelConfig(**flags)
    config = TrainConfig(**{f.name: values[f.name] for f in dataclasses.fields(TrainConfig)})
    set_threads(args.threads or None)
    torch.manual_seed(config.seed)
    model = models.build(cfg)
    diffusion = Diffusion.from_config(cfg.diffusion_config())
    data = GlyphStream(cfg.image_size, config.batch_size, args.data_seed)
    if args.what == "diffusion":
        task = DiffusionTask(diffusion, data, cfg.class_cond)
    else:
        task = ClassifierTask(diffusion, data)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"adm-rt train: {args.what} {cfg.image_size}x{cfg.image_size}, {parameters:,} parameters, "
        f"{config.iterations:,} updates of {config.batch_size} images from {args.data}, "
        f"{config.precision}, {torch.get_num_threads()} threads, into {config.out}",
        flush=True,
    )
    trainer = Trainer(model, task, config)
    weights = trainer.run()
    models.save_model(
        trainer.out / "final",
        (cfg, weights),
        dtype=args.export_dtype,
        class_names=classes,
        overwrite=True,
    )
    print(f"adm-rt train: wrote {trainer.out / 'final'} after {trainer.seconds:.0f} s of training")
