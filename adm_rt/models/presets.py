"""The 15 released ADM models by file name: flags and published sampling settings.

Flags are those of guided-diffusion's README; sampling settings are those behind the paper's tables
(Dhariwal & Nichol 2021, Table 14 and appendices I, J). Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os

from adm_rt.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Published settings of one diffusion model.

    ``timestep_respacing`` with ``guidance_scale`` is the many-step DDPM setting;
    ``ddim_guidance_scale`` belongs to 25 DDIM steps ("ddim25"). None: not published, or the model
    is not guided. ``classifier`` and ``base`` (what an upsampler follows) are preset names.
    """

    timestep_respacing: str = "250"
    guidance_scale: float | None = None
    ddim_guidance_scale: float | None = None
    classifier: str | None = None
    base: str | None = None
    note: str = ""


def _adm(image_size, **flags):
    common = dict(
        num_channels=256,
        num_res_blocks=2,
        num_head_channels=64,
        attention_resolutions="32,16,8",
        class_cond=True,
        use_fp16=True,
        learn_sigma=True,
        resblock_updown=True,
        use_scale_shift_norm=True,
    )
    return ModelConfig(image_size=image_size, **{**common, **flags})


def _upsampler(large_size, small_size, **flags):
    return _adm(
        large_size,
        **{
            "kind": "upsampler",
            "large_size": large_size,
            "small_size": small_size,
            "num_channels": 192,
            **flags,
        },
    )


_LSUN = dict(class_cond=False, dropout=0.1)

PRESETS: dict[str, ModelConfig] = {
    "64x64_diffusion": _adm(
        64,
        num_channels=192,
        num_res_blocks=3,
        dropout=0.1,
        noise_schedule="cosine",
        use_new_attention_order=True,
    ),
    # Four heads whatever the width, so heads of 128, 192 and 256 channels.
    "128x128_diffusion": _adm(128, num_heads=4, num_head_channels=-1),
    "256x256_diffusion": _adm(256),
    "256x256_diffusion_uncond": _adm(256, class_cond=False),
    "512x512_diffusion": _adm(512, use_fp16=False),
    "64_256_upsampler": _upsampler(256, 64, num_heads=4, num_head_channels=-1),
    "128_512_upsampler": _upsampler(512, 128, attention_resolutions="32,16"),
    "lsun_bedroom": _adm(256, **_LSUN),
    "lsun_cat": _adm(256, **_LSUN),
    "lsun_horse": _adm(256, **_LSUN),
    "lsun_horse_nodropout": _adm(256, class_cond=False),
    # Trained on the cosine schedule, like its diffusion model.
    "64x64_classifier": ModelConfig.classifier(64, classifier_depth=4, noise_schedule="cosine"),
    "128x128_classifier": ModelConfig.classifier(128),
    "256x256_classifier": ModelConfig.classifier(256),
    "512x512_classifier": ModelConfig.classifier(512),
}

SAMPLING: dict[str, SamplingSettings] = {
    "64x64_diffusion": SamplingSettings(
        guidance_scale=1.0,
        classifier="64x64_classifier",
        note="the published FID of 2.07 is without guidance, which lowers diversity here",
    ),
    "128x128_diffusion": SamplingSettings(
        guidance_scale=0.5, ddim_guidance_scale=1.25, classifier="128x128_classifier"
    ),
    "256x256_diffusion": SamplingSettings(
        guidance_scale=1.0, ddim_guidance_scale=2.5, classifier="256x256_classifier"
    ),
    "256x256_diffusion_uncond": SamplingSettings(
        guidance_scale=10.0, classifier="256x256_classifier"
    ),
    "512x512_diffusion": SamplingSettings(
        guidance_scale=4.0, ddim_guidance_scale=9.0, classifier="512x512_classifier"
    ),
    "64_256_upsampler": SamplingSettings(
        base="64x64_diffusion", note="only the base model is guided"
    ),
    "128_512_upsampler": SamplingSettings(
        base="128x128_diffusion", note="only the base model is guided"
    ),
    **{
        name: SamplingSettings(timestep_respacing="")
        for name in ("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout")
    },
}


def list_presets(kind: str | None = None) -> list[str]:
    """Names of all presets, or of those of one kind."""
    return [name for name, cfg in PRESETS.items() if kind in (None, cfg.kind)]


def preset_name(name: str | os.PathLike) -> str | None:
    """The preset that a name, file name or path stands for, or None."""
    base = os.path.basename(os.fspath(name).rstrip("/\\"))
    for suffix in (".pt", ".safetensors"):
        base = base.removesuffix(suffix)
    return base if base in PRESETS else None


def preset(name: str | os.PathLike) -> ModelConfig:
    """Flags of a released model by name, file name or path ("64x64_diffusion", "a/lsun_cat.pt").

    Raises ValueError with the nearest names and the whole list when there is no such model.
    """
    return PRESETS[_known(name)]


def sampling_settings(name: str | os.PathLike) -> SamplingSettings:
    """Published sampling settings of a released diffusion model or upsampler.

    Raises ValueError for an unknown name and for a classifier, which does not sample.
    """
    known = _known(name)
    if known not in SAMPLING:
        raise ValueError(f"{known!r} is a classifier: it has no sampling settings of its own.")
    return SAMPLING[known]


def _known(name) -> str:
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"preset name {name!r} must be a string.")
    found = preset_name(name)
    if found is None:
        close = difflib.get_close_matches(os.path.basename(os.fspath(name)), PRESETS, n=3)
        hint = f" Nearest: {', '.join(close)}." if close else ""
        raise ValueError(
            f"unknown preset {os.fspath(name)!r}.{hint} Known presets: {', '.join(PRESETS)}."
        )
    return found
