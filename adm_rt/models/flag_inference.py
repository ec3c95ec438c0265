"""What the names and shapes of a checkpoint's weights tell about its flags.

Told: kind, channels, multipliers, depth, attention placement, up/down blocks, scale-shift norm,
classes, learned variance, classifier pool and its size. Not told: head count, attention order,
noise schedule, rescale_timesteps, a UNet's image size, dropout: those come from a preset or the
caller.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from adm_rt.errors import CheckpointError
from adm_rt.models.config import CLASSIFIER_ALIASES, ModelConfig, coerce_flag, normalize_flags
from adm_rt.models.parameter_shapes import Shapes, compare_shapes, parameter_shapes
from adm_rt.models.presets import PRESETS

_INPUT = re.compile(r"input_blocks\.(\d+)\.(\d+)\.(.+)")
_OUTPUT = re.compile(r"output_blocks\.(\d+)\.(\d+)\.(.+)")

# Facts that weights cannot tell and that change the images: never guessed.
_NEEDED = (
    "image_size",
    "num_heads",
    "use_new_attention_order",
    "noise_schedule",
    "rescale_timesteps",
)
# Facts that are told in other words than the flags that decide them.
_SPELT = {
    "attention_ds": ("attention_resolutions",),
    "embedding_rows": ("num_classes", "null_class"),
}
# Flags that do not change what the weights mean; a preset is not rejected for them.
FREE_FLAGS = frozenset(
    {
        "dropout",
        "use_checkpoint",
        "use_fp16",
        "timestep_respacing",
        "sigma_small",
        "use_kl",
        "rescale_learned_sigmas",
    }
)


@dataclasses.dataclass(frozen=True)
class _Block:
    """One input or output block: (out, in) channels of its residual blocks, and what else."""

    res: tuple[tuple[int, int], ...] = ()
    attention: bool = False
    resample_conv: bool = False


def infer_config(
    shapes: Shapes, kind: str | None = None, num_res_blocks: int | None = None
) -> dict[str, Any]:
    """Flags that ``shapes`` (name -> shape) tell, under ModelConfig's names.

    Beside field names the result has ``attention_ds``, the down-sampling factors with attention:
    they become ``attention_resolutions`` once the image size is known. ``channel_mult`` is always
    explicit. ``kind`` decides between a 6-channel diffusion model and an upsampler;
    ``num_res_blocks`` between the depths that fit a classifier whose levels do not show.

    Raises CheckpointError when these are not the weights of an ADM model.
    """
    first = _need(shapes, "input_blocks.0.0.weight", 4)
    time = _need(shapes, "time_embed.0.weight", 2)
    res = _need(shapes, "middle_block.0.emb_layers.1.weight", 2)
    _need(shapes, "middle_block.1.qkv.weight", 3)
    inputs = _blocks(shapes, _INPUT)
    width = time[1]
    if not width or not inputs or sorted(inputs) != list(range(1, len(inputs) + 1)):
        raise _not_adm("input_blocks are not numbered 0, 1, 2, ... without a gap")

    outputs = _blocks(shapes, _OUTPUT)
    if outputs:
        flags = _unet_flags(shapes, first, kind)
        levels = _levels_from_outputs(outputs)
    else:
        flags = _classifier_flags(shapes)
        levels = None
    middle = _need(shapes, "middle_block.0.out_layers.0.weight", 1)[0]
    flags |= {"num_channels": width, "use_scale_shift_norm": res[0] != middle}
    flags |= _levels(inputs, first[0], width, levels, num_res_blocks)
    side = flags.pop("_pool_side", None)
    if side and "channel_mult" in flags:
        flags["image_size"] = side * 2 ** flags["channel_mult"].count(",")
    return flags


def resolve_config(
    shapes: Shapes,
    flags: dict[str, Any],
    preset: str | None = None,
    preset_origin: str = "given",
    source: str = "the weights",
    search: bool = True,
) -> tuple[ModelConfig, str | None]:
    """Complete configuration of the weights in ``shapes``, and the preset that was used.

    ``flags`` come from the caller and win over the preset where the weights say nothing. Without a
    preset, the one released model that has these names and shapes is taken, if it agrees with
    ``flags`` (not with ``search=False``). ``source`` names the file in errors.

    Raises CheckpointError naming each flag that disagrees with the weights, the flags that are
    needed, or the weights that do not fit.
    """
    flags = {k: coerce_flag(k, v) for k, v in normalize_flags(flags, _kind_hint(flags)).items()}
    if preset is None and search:
        preset, preset_origin = _matching_preset(shapes, flags), "by its weights"
    base = PRESETS[preset].to_dict() if preset else {}
    merged = {**base, **flags}
    try:
        told = infer_config(shapes, merged.get("kind"), merged.get("num_res_blocks"))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if "num_heads" in flags and "num_head_channels" not in flags:
        merged["num_head_channels"] = -1
    if told["kind"] == "upsampler":
        # The size of an upsampler is its large_size; image_size is accepted for it.
        size = flags.get("large_size") or flags.get("image_size") or base.get("large_size")
        if size:
            merged["image_size"] = merged["large_size"] = size

    name = f"preset {preset!r} ({preset_origin})"
    problems = []
    for flag, value in told.items():
        given = _given(flag, merged, told)
        if given is not None and given != value:
            own = any(name in flags for name in _SPELT.get(flag, (flag,)))
            problems.append(_disagreement("flag" if own else name, flag, given, value, merged))
            if flag == "kind":
                break  # nothing else is comparable
    if problems:
        way_out = ""
        if preset:
            way_out = (
                " If these are other weights, pass preset='none' and the flags they were trained "
                "with."
            )
        raise CheckpointError(f"{source}: {'; '.join(problems)}.{way_out}")

    cfg = _complete(told, merged, bool(preset), source)
    difference = compare_shapes(parameter_shapes(cfg), shapes)
    if difference:
        what = name if preset else "the flags given and inferred"
        raise CheckpointError(f"{source} does not fit {what}: {difference}.")
    return cfg, preset


# ---- reading the blocks ----


def _not_adm(why: str) -> CheckpointError:
    return CheckpointError(
        f"not the weights of an ADM model: {why}. Expected the state_dict of a guided-diffusion "
        "UNet, upsampler or classifier (keys such as 'input_blocks.0.0.weight')."
    )


def _need(shapes: Shapes, key: str, rank: int) -> tuple[int, ...]:
    if key not in shapes:
        some = ", ".join(list(shapes)[:3]) or "nothing"
        raise _not_adm(f"{key!r} is missing (found {len(shapes)} keys: {some}...)")
    if len(shapes[key]) != rank:
        raise _not_adm(f"{key!r} has shape {list(shapes[key])}, which must have {rank} dimensions")
    return tuple(shapes[key])


def _blocks(shapes: Shapes, pattern: re.Pattern) -> dict[int, _Block]:
    """Block index -> what is in it. Input block 0, the first convolution, is left out."""
    found: dict[int, dict] = {}
    for key, shape in shapes.items():
        match = pattern.fullmatch(key)
        if not match:
            continue
        index, rest = int(match[1]), match[3]
        block = found.setdefault(index, {"res": [], "attention": False, "resample_conv": False})
        if rest == "in_layers.2.weight" and len(shape) == 4:
            block["res"].append((int(match[2]), (shape[0], shape[1])))
        elif rest == "qkv.weight":
            block["attention"] = True
        elif rest in ("op.weight", "conv.weight"):
            block["resample_conv"] = True
    if pattern is _INPUT:
        found.pop(0, None)
    return {
        index: _Block(
            tuple(pair for _, pair in sorted(b["res"])), b["attention"], b["resample_conv"]
        )
        for index, b in sorted(found.items())
    }


def _unet_flags(shapes: Shapes, first, kind: str | None) -> dict[str, Any]:
    seen = first[1]
    made = _need(shapes, "out.2.weight", 4)[0]
    if kind not in ("diffusion", "upsampler"):
        kind = "upsampler" if made == seen // 2 or (made == seen == 6) else "diffusion"
    channels = seen // 2 if kind == "upsampler" else seen
    if made not in (channels, 2 * channels):
        raise _not_adm(f"{seen} input and {made} output channels do not belong together")
    flags = {
        "kind": kind,
        "in_channels": channels,
        "learn_sigma": made == 2 * channels,
        "class_cond": "label_emb.weight" in shapes,
    }
    if flags["class_cond"]:
        flags["embedding_rows"] = _need(shapes, "label_emb.weight", 2)[0]
    return flags


def _classifier_flags(shapes: Shapes) -> dict[str, Any]:
    flags: dict[str, Any] = {"kind": "classifier"}
    if "out.2.positional_embedding" in shapes:
        tokens = _need(shapes, "out.2.positional_embedding", 2)[1]
        flags["pool"] = "attention"
        flags["num_classes"] = _need(shapes, "out.2.c_proj.weight", 3)[0]
        flags["_pool_side"] = math.isqrt(max(tokens - 1, 0))
    elif len(shapes.get("out.3.weight", ())) == 4:
        flags["pool"] = "adaptive"
        flags["num_classes"] = shapes["out.3.weight"][0]
    elif len(shapes.get("out.0.weight", ())) == 2:
        last = "out.3.weight" if "out.3.weight" in shapes else "out.2.weight"
        flags["pool"] = "spatial_v2" if last == "out.3.weight" else "spatial"
        flags["num_classes"] = _need(shapes, last, 2)[0]
    else:
        raise _not_adm("there are neither output_blocks nor a classifier head ('out.*')")
    flags["in_channels"] = _need(shapes, "input_blocks.0.0.weight", 4)[1]
    return flags


def _levels_from_outputs(outputs: dict[int, _Block]) -> int:
    """Blocks per level of the decoder: a level ends where something up-samples."""
    for index, block in outputs.items():
        if block.resample_conv or len(block.res) > 1:
            return index + 1
    return len(outputs)


def _levels(inputs, first_width, width, per_level, depth_hint) -> dict[str, Any]:
    """Depth, multipliers, attention and up/down blocks from the encoder's blocks.

    With up/down residual blocks an encoder alone does not always show where its levels end: then
    every division that fits is tried (the hinted depth first), and what they do not agree on is
    left out.
    """
    count = len(inputs) + 1
    sizes = [per_level] if per_level else [n for n in range(2, count + 1) if count % n == 0]
    fits = [f for f in (_divide(inputs, count, n, first_width) for n in sizes) if f is not None]
    if not fits:
        raise _not_adm("input_blocks do not form levels of equal depth")
    fits = [f for f in fits if f[0] == depth_hint] or fits
    results = []
    for depth, widths, attention, updown in fits:
        flags = {
            "num_res_blocks": depth,
            "channel_mult": coerce_flag("channel_mult", [_mult(w, width) for w in widths]),
            "attention_ds": frozenset(2**i for i, has in enumerate(attention) if has),
        }
        if updown is not None:
            flags["resblock_updown"] = updown
        results.append(flags)
    common = results[0].keys()
    for other in results[1:]:
        common = {k for k in common if k in other and other[k] == results[0][k]}
    return {k: v for k, v in results[0].items() if k in common}


def _divide(inputs, count, per_level, first_width):
    """(depth, widths, attention, updown or None) for levels of per_level blocks, or None."""
    if per_level < 2 or count % per_level:
        return None
    widths, attention, downs = [], [], []
    channels = first_width
    for start in range(1, count, per_level):
        level = [inputs[i] for i in range(start, min(start + per_level - 1, count))]
        if any(b.resample_conv or len(b.res) != 1 for b in level):
            return None
        if len({(b.res[0][0], b.attention) for b in level}) != 1:
            return None
        for block in level:
            if block.res[0][1] != channels:
                return None
            channels = block.res[0][0]
        widths.append(channels)
        attention.append(level[0].attention)
        down = inputs.get(start + per_level - 1)
        if down is not None:
            if down.attention or (down.res and down.res != ((channels, channels),)):
                return None
            downs.append(not down.resample_conv)
    if len(set(downs)) > 1:
        return None
    return per_level - 1, widths, attention, downs[0] if downs else None


def _widths(channel_mult: str, width: int) -> list[int]:
    return [int(float(m) * width) for m in channel_mult.split(",")]


def _mult(level_width: int, width: int) -> float:
    mult = level_width / width
    while int(mult * width) < level_width:
        mult = math.nextafter(mult, math.inf)
    return mult


# ---- putting told, given and preset together ----


def _kind_hint(flags):
    if "kind" in flags:
        return flags["kind"]
    return "upsampler" if flags.get("large_size") or flags.get("small_size") else None


def _matching_preset(shapes: Shapes, flags: dict[str, Any]) -> str | None:
    """The released model with these weights, when flags leave no doubt about it."""
    matches = []
    for name, cfg in PRESETS.items():
        own = cfg.to_dict()
        # Multipliers and attention are in the shapes; every other flag given must be the preset's.
        shown = {"channel_mult", "attention_resolutions"}
        if own["num_head_channels"] != -1 and flags.get("num_head_channels"):
            shown.add("num_heads")
        same = all(own[k] == v for k, v in flags.items() if k not in FREE_FLAGS | shown)
        if same and parameter_shapes(cfg) == shapes:
            matches.append(name)
    # Models that differ in dropout alone (the unconditional 256x256 ones) are one network.
    facts = {
        tuple((k, v) for k, v in PRESETS[m].to_dict().items() if k not in FREE_FLAGS)
        for m in matches
    }
    return matches[0] if len(facts) == 1 else None


def _effective_ds(merged, levels: int):
    resolutions = merged["attention_resolutions"]
    size = merged["image_size"]
    factors = {size // int(r) for r in resolutions.split(",") if r}
    return frozenset(2**i for i in range(levels) if 2**i in factors)


def _given(flag, merged, told):
    """What flags and preset say about an inferred fact, or None when they say nothing."""
    size = merged.get("image_size")
    if flag == "attention_ds":
        size = size or told.get("image_size")
        if "attention_resolutions" not in merged or not size or "channel_mult" not in told:
            return None
        levels = told["channel_mult"].count(",") + 1
        return _effective_ds({**merged, "image_size": size}, levels)
    if flag == "channel_mult":
        mult = merged.get("channel_mult")
        if not mult:
            if "channel_mult" not in merged or not size:
                return None
            try:
                default = ModelConfig.default_channel_mult(told["kind"], size)
            except ValueError:
                return None
            mult = coerce_flag("channel_mult", default)
        # Two multipliers that give the same channels are the same (1/3 may be written 0.3334).
        width = told["num_channels"]
        same = _widths(mult, width) == _widths(told["channel_mult"], width)
        return told["channel_mult"] if same else mult
    if flag == "embedding_rows":
        if "num_classes" not in merged:
            return None
        return merged["num_classes"] + int(merged.get("null_class", False))
    return merged.get(flag)


def _disagreement(origin, flag, given, value, merged) -> str:
    if flag == "attention_ds":
        size = merged["image_size"]
        return (
            f"{origin} says attention_resolutions={merged['attention_resolutions']!r} at "
            f"image_size={size}, but the weights have attention at "
            f"{_resolutions(value, size) or 'none'!r}"
        )
    if flag == "embedding_rows":
        return (
            f"{origin} says num_classes={merged['num_classes']}, null_class="
            f"{merged.get('null_class', False)}, but the weights have {value} label embeddings"
        )
    alias = CLASSIFIER_ALIASES.get(flag) if merged.get("kind") == "classifier" else None
    shown = f"{flag} ({alias})" if alias else flag
    return f"{origin} says {shown}={given!r}, but the weights say {value!r}"


def _resolutions(attention_ds, image_size) -> str:
    return ",".join(str(image_size // ds) for ds in sorted(attention_ds))


def _complete(told, merged, has_preset, source) -> ModelConfig:
    flags = {**merged, **{k: v for k, v in told.items() if k in ModelConfig.__dataclass_fields__}}
    kind = flags["kind"]
    missing = [] if has_preset else _missing(told, flags, kind)
    if "channel_mult" not in told:
        missing.append("num_res_blocks")
    if missing:
        raise CheckpointError(
            f"{source}: the weights cannot tell {', '.join(missing)}. Give them as flags (adm-rt "
            "convert FILE FOLDER takes all of them, and FOLDER needs none), or name the released "
            f"model they are from (preset=...; known: {', '.join(PRESETS)})."
        )
    if kind == "classifier":
        # The published classifiers always have 64 channels per head.
        flags.setdefault("num_head_channels", 64 if "num_heads" not in merged else -1)
    if "attention_ds" in told:
        size = flags["image_size"]
        levels = flags["channel_mult"].count(",") + 1
        if (
            "attention_resolutions" not in merged
            or _effective_ds(flags, levels) != told["attention_ds"]
        ):
            flags["attention_resolutions"] = _resolutions(told["attention_ds"], size)
    if "embedding_rows" in told and "num_classes" not in merged:
        flags["num_classes"] = told["embedding_rows"] - int(flags.get("null_class", False))
    try:
        default = coerce_flag(
            "channel_mult", ModelConfig.default_channel_mult(kind, flags["image_size"])
        )
        if default == flags["channel_mult"]:
            flags["channel_mult"] = ""
    except ValueError:
        pass
    try:
        return ModelConfig(**flags)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _missing(told, flags, kind) -> list[str]:
    missing = []
    for name in _NEEDED:
        if name in flags or (kind == "classifier" and name != "image_size"):
            continue
        if name == "num_heads":
            if flags.get("num_head_channels", -1) == -1:
                missing.append("num_heads or num_head_channels")
        elif name == "image_size" and kind == "upsampler":
            missing.append("large_size")
        else:
            missing.append(name)
    if kind == "upsampler" and not flags.get("small_size"):
        missing.append("small_size")
    return missing
