"""``adm-rt train diffusion|classifier``: flags, the plan that is printed, the run, the export."""

import argparse
import dataclasses

from adm_rt.models.config import ModelConfig

_HELP = {
    "iterations": "updates to make; training never runs without an end",
    "out": "folder for checkpoints, log.csv and the final model; a run in it is continued",
    "batch_size": "images of one update",
    "lr": "learning rate of AdamW",
    "warmup_steps": "linear rise of the learning rate at the start",
    "cooldown_steps": "linear fall of the learning rate to zero at the end",
    "weight_decay": "of AdamW",
    "grad_clip": "largest norm of the gradient, 0: no limit",
    "ema_rate": "decay of the moving average that becomes the final model",
    "precision": "float32 or bf16 (autocast, float32 master weights)",
    "seed": "of the weights, timesteps and noise",
    "log_interval": "updates between rows of log.csv",
    "save_interval": "updates between checkpoints",
    "keep": "newest checkpoints that are kept",
}
_SHARED = {
    "norm_groups",
    "image_size",
    "num_channels",
    "num_res_blocks",
    "num_heads",
    "num_head_channels",
    "attention_resolutions",
    "channel_mult",
    "dropout",
    "use_checkpoint",
    "use_scale_shift_norm",
    "resblock_updown",
    "rescale_residual",
    "use_new_attention_order",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
}
_OWN = {
    "classifier": {"pool"},
    "diffusion": {
        "num_heads_upsample",
        "learn_sigma",
        "sigma_small",
        "predict_xstart",
        "rescale_learned_sigmas",
        "use_kl",
    },
}


def add_arguments(parser):
    """Add ``diffusion`` and ``classifier`` below the ``train`` command."""
    from adm_rt.training.trainer import TrainConfig

    commands = parser.add_subparsers(dest="what", required=True, metavar="diffusion|classifier")
    for what, own in _OWN.items():
        command = commands.add_parser(
            what, help=f"train a {'noisy ' * (what == 'classifier')}{what} model"
        )
        command.usage = f"{command.prog} --iterations N --out FOLDER [options]"
        add = command.add_argument
        add("--data", default="glyphs", choices=["glyphs"], help="data set (glyphs)")
        add("--data-seed", type=int, default=1, help="seed of the data stream (1)")
        add("--threads", type=int, default=0, help="torch threads (torch's own number)")
        add(
            "--export-dtype",
            default="float16",
            choices=("float32", "float16", "bfloat16"),
            help="dtype of the final weights (float16)",
        )
        group = command.add_argument_group("training")
        for field in dataclasses.fields(TrainConfig):
            _add_field(group, field, required=field.default is dataclasses.MISSING)
        group = command.add_argument_group("model and diffusion (guided-diffusion's flags)")
        for field in dataclasses.fields(ModelConfig):
            if field.name in _SHARED | own:
                _add_field(group, field)
        if what == "classifier":
            command.set_defaults(num_head_channels=64)  # as published; its pooling needs a number


def _add_field(group, field, required=False):
    name = field.name
    kind = {"iterations": int, "out": str}[name] if required else type(field.default)
    options = {"required": True} if required else {"default": field.default}
    words = _HELP.get(name, "")
    options["help"] = words if required else f"{words} ({field.default!r})".strip()
    options["metavar"] = {bool: "BOOL", str: "TEXT"}.get(kind, "N")
    options["type"] = _boolean if kind is bool else kind
    names = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
    group.add_argument(*names, dest=name, **options)


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
    data.batch(0)  # what is wrong with the data shows before anything is written
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
