"""``adm-rt train diffusion|classifier|upsampler``: flags, guided-diffusion's names among them."""

import argparse
import dataclasses

from adm_rt.commands.flags import add, boolean, set_threads
from adm_rt.models.config import CLASSIFIER_ALIASES, ModelConfig
from adm_rt.training.config import TrainConfig

_SHARED = (
    "num_channels",
    "num_res_blocks",
    "channel_mult",
    "attention_resolutions",
    "num_heads",
    "num_head_channels",
    "dropout",
    "use_checkpoint",
    "use_scale_shift_norm",
    "resblock_updown",
    "rescale_residual",
    "norm_groups",
    "use_new_attention_order",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
)
_DENOISER = (
    "num_heads_upsample",
    "learn_sigma",
    "sigma_small",
    "predict_xstart",
    "rescale_learned_sigmas",
    "use_kl",
)
_MODEL_FLAGS = {
    "diffusion": ("image_size", *_SHARED, *_DENOISER),
    "classifier": ("image_size", *_SHARED, "pool"),
    "upsampler": ("large_size", "small_size", *_SHARED, *_DENOISER),
}
_WORDS = {
    "diffusion": "a denoiser",
    "classifier": "the noisy classifier that guides one",
    "upsampler": "a model that enlarges images",
}


def add_arguments(parser):
    """Add ``diffusion``, ``classifier`` and ``upsampler`` below the ``train`` command."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(_WORDS))
    for what, words in _WORDS.items():
        command = commands.add_parser(
            what,
            help=f"train {words}",
            description=f"Train {words}. A run that is in --out is continued.",
            argument_default=argparse.SUPPRESS,  # run.train knows the defaults
            allow_abbrev=False,
        )
        command.usage = f"{command.prog} --iterations N --out FOLDER [options]"
        _add_data(command, what)
        _add_training(command, what)
        _add_model(command, what)


def _add_data(command, what):
    add(
        command,
        "--data",
        "--data-dir",
        metavar="SPEC",
        help="a folder, an .npz file, an LSUN folder, glyphs or digits (glyphs)",
    )
    add(command, "--data-seed", type=int, metavar="N", help="of the order, and of glyphs (1)")
    add(
        command,
        "--random-crop",
        type=boolean,
        metavar="BOOL",
        help=f"({'yes' if what == 'classifier' else 'no'}, as published; not for glyphs, digits)",
    )
    add(
        command,
        "--random-flip",
        type=boolean,
        metavar="BOOL",
        help="(yes, as published; not for glyphs, digits)",
    )
    add(command, "--on-bad", choices=("error", "skip"), help="what a damaged image does (error)")
    add(
        command,
        "--class-from",
        choices=("folder", "prefix"),
        help="where a folder's classes are: sub-folders, or the file names up to the first _",
    )
    add(command, "--exif-rotation", type=boolean, metavar="BOOL", help="of a folder's images (no)")
    add(command, "--workers", type=int, metavar="N", help="threads that read ahead (0)")
    add(command, "--num-classes", type=int, metavar="N", help="(as many as the data have)")
    if what == "classifier":
        add(command, "--val-data", "--val-data-dir", metavar="SPEC", help="held-out images")
        add(command, "--val-images", type=int, metavar="N", help="so many of them (1000)")
        return
    add(command, "--class-cond", type=boolean, metavar="BOOL", help="(yes, if there are labels)")
    add(
        command,
        "--class-dropout",
        type=float,
        metavar="P",
        help="share of labels left out, for classifier-free guidance (0)",
    )
    add(
        command,
        "--noise-jitter",
        type=float,
        metavar="J",
        help="vary the noise's amplitude from image to image, for narrow networks (0)",
    )
    add(
        command,
        "--snr-weight",
        type=boolean,
        metavar="BOOL",
        help="weigh the error of x0 by its signal-to-noise ratio, with --predict-xstart (no)",
    )
    count = "8" if what == "upsampler" else "16"
    words = f"images in a grid of samples ({count})"
    add(command, "--sample-count", type=int, metavar="N", help=words)
    add(command, "--sample-steps", type=int, metavar="N", help="steps they are made in (25)")


def _add_training(command, what):
    group = command.add_argument_group("training")
    add(group, "--init", metavar="MODEL", help="fine-tune: zoo name, folder or .pt")
    add(
        group,
        "--export-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the final weights (float16)",
    )
    add(group, "--threads", type=int, metavar="N", help="CPU threads (torch's own number)")
    for field in dataclasses.fields(TrainConfig):
        required = field.default is dataclasses.MISSING
        names = [field.name]
        if field.name == "sample_interval":
            if what == "classifier":
                names.append("eval_interval")
            shown = "save_interval; 0: none"
        else:
            shown = None if required else field.default
        kind = {"iterations": int, "out": str}.get(field.name) or type(field.default)
        help_line = (
            field.metadata["help"]
            if field.name != "sample_interval"
            else ("updates between looks at the EMA model: samples, or accuracy on --val-data")
        )
        _add_field(group, names, kind, help_line, shown, required)
    # guided-diffusion's names for what has another one here
    names = ["--use-fp16"] + ["--classifier-use-fp16"] * (what == "classifier")
    add(group, *names, type=boolean, metavar="BOOL", help="the same as --precision fp16")
    if what == "classifier":
        add(
            group,
            "--anneal-lr",
            type=boolean,
            metavar="BOOL",
            help="the same as --lr-anneal-steps with the number of iterations",
        )
    add(group, "--resume-checkpoint", action=_Refused, help=argparse.SUPPRESS)


def _add_model(command, what):
    group = command.add_argument_group("model and diffusion (guided-diffusion's flags)")
    add(group, "--preset", metavar="NAME", help="the flags of a released model")
    published = ModelConfig.classifier() if what == "classifier" else ModelConfig()
    for name in _MODEL_FLAGS[what]:
        names = [name]
        if what == "classifier" and name in CLASSIFIER_ALIASES:
            names.append(CLASSIFIER_ALIASES[name])
        default = getattr(published, name)
        shown = None if name in ("large_size", "small_size") else default
        _add_field(group, names, type(default), "", shown)


def _add_field(group, names, kind, words, shown, required=False):
    text = words if shown is None else f"{words} ({shown})".strip()
    add(
        group,
        *(f"--{name.replace('_', '-')}" for name in names),
        dest=names[0],
        type=boolean if kind is bool else kind,
        metavar={bool: "BOOL", str: "TEXT"}.get(kind, "N"),
        help=text.replace("%", "%%"),
        **({"required": True} if required else {}),
    )


class _Refused(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(
            f"argument {option_string}: a run is continued by giving its --out again; --init MODEL "
            "starts a new one from trained weights"
        )


def run(args):
    """Train what ``args`` (parsed by ``add_arguments``) says; writes ``<out>/final``."""
    from adm_rt.training.run import train

    values = {k: v for k, v in vars(args).items() if k not in ("command", "run")}
    set_threads(values.pop("threads", None))
    if values.pop("use_fp16", False):
        if values.setdefault("precision", "fp16") != "fp16":
            raise ValueError(f"--use-fp16 and --precision {values['precision']} disagree")
    if values.pop("anneal_lr", False):
        values.setdefault("lr_anneal_steps", values["iterations"])
    if values.get("microbatch") == -1:  # guided-diffusion's "none"
        values["microbatch"] = 0
    train(**values)
