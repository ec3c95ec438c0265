"""Finding a model by what the user typed: a zoo name, a folder, or a released weight file."""

from __future__ import annotations

import os
from pathlib import Path

from adm_rt.errors import CheckpointError
from adm_rt.models.config import nearest
from adm_rt.models.presets import list_presets, preset_name
from adm_rt.models.weight_folder import is_model_folder, read_info

ZOO = Path(__file__).parent / "zoo"
# what config.json's metadata may say about sampling
SETTINGS = ("class_names", "guidance_scale", "guidance_interval", "sampler")
SETTINGS += ("classifier", "upsampler")


def zoo_models(kind=None):
    """Names of the models that ship in the package, or of those of one kind, sorted."""
    if not ZOO.is_dir():
        return []
    folders = [p.name for p in sorted(ZOO.iterdir()) if is_model_folder(p)]
    return [name for name in folders if kind is None or _kind(ZOO / name) == kind]


def locate(model, argument="model", kind=None):
    """Path of the weights named ``model``: an existing path, or a zoo name.

    kind: what models the error lists; None for those that make images. Raises ValueError naming
    the nearest models.
    """
    if not isinstance(model, (str, os.PathLike)):
        shown = type(model).__name__ if hasattr(model, "cfg") else repr(model)[:80]
        raise TypeError(
            f"{argument}={shown} must be a zoo name or a path; a network that is already loaded "
            "goes into Pipeline(unet, classifier, upsampler)"
        )
    if not os.fspath(model):
        raise ValueError(f"{argument}='' is empty; give {_choices(kind)}")
    path = Path(os.path.expanduser(model))
    name = os.fspath(model)
    if name in zoo_models():
        return ZOO / name
    if os.path.exists(path):  # False for a name that no file can have, where Path raises
        return path
    name = name if len(name) < 200 else name[:200] + "..."
    found = preset_name(model)
    if found is not None:
        raise ValueError(
            f"{argument}={name!r}: the weights of {found!r} do not ship and there is no such file; "
            f"download {found}.pt (guided-diffusion's README has the links) and give its path, "
            f"or use {_choices(kind)}"
        )
    raise ValueError(
        f"{argument}={name!r} is neither a shipped model nor an existing file or folder; "
        f"give {_choices(kind)}.{nearest(path.name, [*zoo_models(), *list_presets()])}"
    )


def read_settings(path):
    """The sampling settings that a model folder's config.json carries; {} for a ``.pt``.

    Keys, all optional: ``class_names``, ``guidance_scale``, ``guidance_interval``, ``sampler``, and
    ``classifier`` and ``upsampler`` (zoo names, or folders inside this one). Raises CheckpointError
    for a damaged folder.
    """
    if not is_model_folder(path):
        return {}
    info = read_info(path)
    settings = {name: info.metadata[name] for name in SETTINGS if name in info.metadata}
    if info.class_names is not None:
        settings["class_names"] = list(info.class_names)
    return settings


def display_name(path):
    """A short name for messages and file names: the folder or file name without suffix."""
    name = Path(path).name or Path(path).resolve().name
    for suffix in (".pt", ".safetensors"):
        name = name.removesuffix(suffix)
    return name or "model"


def _choices(kind):
    kinds = ("diffusion", "upsampler") if kind is None else (kind,)
    shipped = ", ".join(n for k in kinds for n in zoo_models(k)) or "none in this build"
    presets = ", ".join(n for k in kinds for n in list_presets(k))
    return f"a shipped model ({shipped}), or the path of a folder or released .pt ({presets})"


def _kind(folder):
    try:
        return read_info(folder, verify=False).config.kind
    except CheckpointError:
        return None
