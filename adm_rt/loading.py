"""What ``Pipeline.from_pretrained`` loads: the parts of a pipeline and its settings, from paths."""

from __future__ import annotations

import os
from pathlib import Path

from adm_rt import engines, request
from adm_rt.export.manifest import is_exported_folder, read_manifest
from adm_rt.locate import display_name, locate, read_settings

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_parts(model, classifier, upsampler, engine, device, dtype, preset, flags):
    """Keyword arguments of ``Pipeline``: unet, classifier, upsampler, name, settings, sources.

    Arguments and errors as in ``Pipeline.from_pretrained``.
    """
    load = _loader(engines.choose(engine, device)[0])
    request.check_choice("dtype", dtype, _DTYPES)
    path = locate(model, "model")
    if is_exported_folder(path):
        engines.choose(engine, device, exported=True)
        return _exported_parts(path, classifier, upsampler, load, {"preset": preset, **flags})
    _refuse_lone_graph("model", path)
    settings = read_settings(path)
    classifier = _default_part(classifier, settings, "classifier", path)
    upsampler = _default_part(upsampler, settings, "upsampler", path)
    paths = {"model": path}
    for part, given in (("classifier", classifier), ("upsampler", upsampler)):
        if given is not None:
            paths[part] = locate(given, part, kind=part)
            _refuse_lone_graph(part, paths[part])
    if "classifier" in paths and is_exported_folder(paths["classifier"]):
        raise ValueError(
            f"classifier={os.fspath(classifier)!r} is an exported folder and the model is not; "
            "give the classifier that was exported, or an exported folder that holds both as model"
        )
    guide_flags = {k: v for k, v in flags.items() if k.startswith("classifier_")}
    flags = {k: v for k, v in flags.items() if k not in guide_flags}
    if guide_flags and "classifier" not in paths:
        raise ValueError(f"{', '.join(guide_flags)}: there is no classifier to apply this to")
    if "image_size" in flags:  # as in guided-diffusion, of both
        guide_flags["image_size"] = flags["image_size"]
    unet = load(path, preset=preset, **flags)
    parts = {
        "classifier": load(paths["classifier"], **guide_flags) if "classifier" in paths else None,
        "upsampler": _upsampler(paths["upsampler"], load) if "upsampler" in paths else None,
    }
    if unet.cfg.kind == "upsampler" and parts["upsampler"] is None:
        unet, parts["upsampler"] = None, unet
    elif unet.cfg.kind == "classifier":
        raise ValueError(
            f"model={os.fspath(model)!r} is a classifier; give a diffusion model as model and "
            "this one as classifier"
        )
    guide = parts["classifier"]
    if guide is not None and guide.cfg.kind != "classifier":
        raise ValueError(
            f"classifier={os.fspath(classifier)!r} is of kind {guide.cfg.kind!r}, not a "
            "classifier; give a noisy classifier, or 'none' for no guidance"
        )
    return {
        "unet": unet,
        **parts,
        "name": display_name(path),
        "settings": {**_published_settings(path, preset), **settings},
        "sources": {part: display_name(p) for part, p in paths.items()},
    }


def _exported_parts(path, classifier, upsampler, load, flags):
    """The same of an exported folder, whose graphs need no flags and have their own classifier."""
    given = [name for name, value in flags.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: {path} is an exported folder, which knows its configuration; "
            "leave this out"
        )
    exported = read_manifest(path)
    guide = exported.classifier_gradient
    if _is_none(classifier):
        guide = None
    elif classifier is not None:
        raise ValueError(
            f"classifier={os.fspath(classifier)!r}: {path} is an exported folder, which a "
            "classifier cannot be added to; export both together (adm-rt export MODEL "
            "--classifier C --out FOLDER)"
        )
    name = display_name(path)
    sources = {"model": name}
    if guide is not None:
        sources["classifier"] = f"{name}/{guide.file}"
    unet = exported.unet
    if upsampler is not None and not _is_none(upsampler):
        where = locate(upsampler, "upsampler", kind="upsampler")
        sources["upsampler"] = display_name(where)
        upsampler = _upsampler(where, load)
    else:
        upsampler = None
        if unet.cfg.kind == "upsampler":
            unet, upsampler = None, unet
    return {
        "unet": unet,
        "classifier": guide,
        "upsampler": upsampler,
        "name": name,
        "settings": exported.metadata,
        "sources": sources,
    }


def _loader(engine):
    from adm_rt.models import load_checkpoint, load_weights

    # Only the torch engine runs modules; the others read weights, and need no torch.
    return load_checkpoint if engine == "torch" else load_weights


def _upsampler(path, load):
    return read_manifest(path).unet if is_exported_folder(path) else load(path)


def _refuse_lone_graph(argument, path):
    if Path(path).suffix == ".onnx":
        raise ValueError(
            f"{argument}={os.fspath(path)!r} is one graph of an exported folder; give the folder, "
            "which has the manifest beside it"
        )


def _is_none(part):
    return isinstance(part, str) and part.lower() == "none"


def _default_part(given, settings, part, path):
    """The path or name of a part: as given, else the model's own default; None for "none"."""
    if _is_none(given):
        return None
    if given is not None:
        return given
    default = settings.get(part)
    if default is None:
        return None
    beside = Path(path) / default
    return beside if beside.is_dir() else default


def _published_settings(path, preset):
    from adm_rt.models.presets import SAMPLING, preset_name

    published = SAMPLING.get(preset or preset_name(path))
    if published is None or published.guidance_scale is None:
        return {}
    return {
        "guidance_scale": published.guidance_scale,
        "few_step_guidance_scale": published.ddim_guidance_scale,
    }
