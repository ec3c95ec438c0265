"""Flags shared by the sub-commands, with guided-diffusion's names as aliases."""

from __future__ import annotations

import argparse
import dataclasses

from adm_rt.engines import ENGINES
from adm_rt.models.config import CLASSIFIER_ALIASES, ModelConfig, normalize_flags

_TRUE = ("1", "true", "yes", "t", "y", "on")
_FALSE = ("0", "false", "no", "f", "n", "off")
# decided by the sampling flags or by the file itself
_NOT_STRUCTURE = ("kind", "image_size", "timestep_respacing")
_MAX_THREADS = 1024
CLASSIFIER_FLAGS = tuple(CLASSIFIER_ALIASES.values())


def boolean(text):
    """argparse type: yes/true/t/y/1/on and their opposites."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not a boolean; use True or False")


def add(parser, *names, **options):
    """``add_argument`` with every ``--a-b`` also spelled ``--a_b``."""
    spelled = []
    for name in names:
        spelled.append(name)
        if name.startswith("--") and "-" in name[2:]:
            spelled.append("--" + name[2:].replace("-", "_"))
    parser.add_argument(*dict.fromkeys(spelled), **options)


def add_model(parser, classifier=False):
    """MODEL; with ``classifier`` also --classifier."""
    parser.add_argument("model", metavar="MODEL", help="zoo name, folder or .pt")
    if classifier:
        add_classifier(parser)


def add_classifier(parser):
    """--classifier, after a flag or argument that names the model."""
    add(
        parser,
        "--classifier",
        "--classifier-path",
        help="the same for the guiding classifier; 'none' does without the model's default",
    )


def add_structure(parser, classifier=False):
    """guided-diffusion's model flags, for weights that neither a folder nor a preset describes."""
    group = parser.add_argument_group(
        "model structure (guided-diffusion's flags; only for a .pt that is no released file)"
    )
    add(group, "--preset", help="take the flags of this released model, e.g. 256x256_diffusion")
    add(group, "--image-size", type=int, dest="flag_image_size", metavar="INT")
    for field in dataclasses.fields(ModelConfig):
        if field.name in _NOT_STRUCTURE:
            continue
        kind = {"bool": boolean, "int": int, "float": float}.get(str(field.type), str)
        add(
            group,
            "--" + field.name.replace("_", "-"),
            type=kind,
            dest="flag_" + field.name,
            metavar=str(field.type).upper(),
        )
    if classifier:
        for name in CLASSIFIER_FLAGS:
            kind = int if name in ("classifier_width", "classifier_depth") else str
            metavar = "INT" if kind is int else "VALUE"
            flag = "--" + name.replace("_", "-")
            add(group, flag, type=kind, dest="flag_" + name, metavar=metavar)


def structure(args):
    """The structure flags that were given, in ModelConfig's forms."""
    given = {
        name.removeprefix("flag_"): value
        for name, value in vars(args).items()
        if name.startswith("flag_") and value is not None
    }
    normalize_flags({k: v for k, v in given.items() if not k.startswith("classifier_")})
    return given


def add_running(parser):
    """Where and how it runs."""
    group = parser.add_argument_group("running")
    names = ", ".join(("auto", *ENGINES))
    add(group, "--engine", default="auto", help=f"{names} (default auto)")
    add(group, "--device", default="auto", help="auto, cpu, cuda, cuda:N (default auto)")
    add(group, "--dtype", default="auto", help="auto, float32, bfloat16, float16 (default auto)")
    add(group, "--threads", type=int, help="CPU threads (default: all that are allowed)")
    add(group, "--batch-size", default="auto", type=batch_size, help="images at a time, or auto")
    add(group, "--seed", type=int, default=0, help="image i depends on (seed, i) only")
    add(group, "--quiet", action="store_true", help="no progress bar, no remarks")


def batch_size(text):
    """argparse type: "auto" or an int."""
    return text if text == "auto" else int(text)


def steps(text):
    """argparse type: an int when it is one, else a respacing string."""
    try:
        return int(text)
    except ValueError:
        return text


def set_threads(count):
    """Use ``count`` threads in torch and in our own kernels; None leaves both alone."""
    if count is None:
        return
    if not 1 <= count <= _MAX_THREADS:  # torch takes any number, and crashes later
        raise ValueError(f"threads={count} is out of range; allowed: 1..{_MAX_THREADS}")
    try:
        import torch

        torch.set_num_threads(count)
    except ModuleNotFoundError:  # an exported folder is run without it
        pass
    try:
        from adm_rt import _C
    except ImportError:
        return
    _C.set_num_threads(count)
