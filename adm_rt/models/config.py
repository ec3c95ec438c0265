"""ModelConfig: every flag that decides what a network is and how its diffusion runs.

Field names are guided-diffusion's flag names and values are in its forms ("32,16,8"), so a command
line written for the published code can be read directly. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from typing import Any

KINDS = ("diffusion", "upsampler", "classifier")
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
NOISE_SCHEDULES = ("linear", "cosine")

# Published defaults by image size (guided-diffusion script_util.py).
_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
# The upsampler has its own table: at 512 it has six levels, not seven.
_UPSAMPLER_CHANNEL_MULT = {
    512: (1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    64: (1, 2, 3, 4),
}

# Generous bounds: far above any real model, low enough that a hostile config cannot make us
# allocate or loop without end before the weights are looked at.
_MAX_IMAGE_SIZE = 8192
_MAX_CHANNELS = 1 << 14
_MAX_LEVELS = 12
_MAX_RES_BLOCKS = 64
_MAX_CLASSES = 1 << 22

_TRUE = ("1", "true", "yes", "t", "y", "on")
_FALSE = ("0", "false", "no", "f", "n", "off")

# Flag name in guided-diffusion's classifier group -> our field.
_CLASSIFIER_FLAGS = {
    "classifier_width": "num_channels",
    "classifier_depth": "num_res_blocks",
    "classifier_attention_resolutions": "attention_resolutions",
    "classifier_use_scale_shift_norm": "use_scale_shift_norm",
    "classifier_resblock_updown": "resblock_updown",
    "classifier_pool": "pool",
    "classifier_use_fp16": "use_fp16",
}
CLASSIFIER_ALIASES = {field: flag for flag, field in _CLASSIFIER_FLAGS.items()}


def nearest(name: str, known) -> str:
    """' Did you mean ...?' for a misspelt name, or an empty string."""
    known = list(known)
    close = [k for k in known if k.lower() == str(name).lower()]
    close = close or difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What one network is.

    ``image_size`` is the side of the square output (``large_size`` for an upsampler). ``kind``
    chooses the class: "diffusion" -> UNet, "upsampler" -> SuperResUNet, "classifier" ->
    NoisyClassifier.
    ``null_class`` adds one embedding row with index ``num_classes`` for classifier-free guidance.
    ``rescale_residual`` divides every residual sum by sqrt(2) (the paper's ablation, section 3).
    ``norm_groups`` is GroupNorm's number of groups: 32 in every released model. A narrow model
    wants fewer: with 2 channels a group the network barely passes on its input's amplitude.

    Raises ValueError (value out of range) or TypeError (wrong type), naming the flag.
    """

    kind: str = "diffusion"
    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str = "16,8"
    channel_mult: str = ""
    dropout: float = 0.0
    class_cond: bool = False
    num_classes: int = 1000
    null_class: bool = False
    use_checkpoint: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    rescale_residual: bool = False
    norm_groups: int = 32
    use_fp16: bool = False
    use_new_attention_order: bool = False
    in_channels: int = 3
    large_size: int = 0
    small_size: int = 0
    pool: str = "attention"
    learn_sigma: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    timestep_respacing: str = ""
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    sigma_small: bool = False
    rescale_learned_sigmas: bool = False
    use_kl: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _coerce(field, getattr(self, field.name)))
        self._check_sizes()
        self._check_range("num_channels", 1, _MAX_CHANNELS)
        self._check_range("num_res_blocks", 1, _MAX_RES_BLOCKS)
        self._check_range("num_classes", 1, _MAX_CLASSES)
        self._check_range("in_channels", 1, 64)
        self._check_range("norm_groups", 1, 2048)
        self._check_range("diffusion_steps", 1, 1 << 20)
        self._check_choice("noise_schedule", NOISE_SCHEDULES)
        self._check_choice("pool", POOLS)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1).")
        if self.kind == "classifier" and self.class_cond:
            raise ValueError("class_cond=True: a classifier takes no labels; leave class_cond out.")
        if self.kind == "classifier" and self.pool == "attention" and self.num_head_channels == -1:
            raise ValueError(
                "num_head_channels=-1: pool='attention' needs channels per head (published: 64)."
            )
        if self.null_class and not self.class_cond:
            raise ValueError("null_class=True needs class_cond=True (an embedding to add it to).")
        self._check_channels()

    # ---- validation ----

    def _check_sizes(self):
        self._check_choice("kind", KINDS)
        set_ = object.__setattr__
        if self.kind == "upsampler":
            default = type(self).__dataclass_fields__["image_size"].default
            if not self.large_size:
                set_(self, "large_size", self.image_size)
            elif self.image_size not in (default, self.large_size):
                raise ValueError(
                    f"image_size={self.image_size} and large_size={self.large_size} disagree: for "
                    "an upsampler they are the same number; give large_size only."
                )
            set_(self, "image_size", self.large_size)
            if not self.small_size:
                raise ValueError(
                    "small_size=0: an upsampler needs the side of its low-resolution input."
                )
            if not 1 <= self.small_size <= self.large_size:
                raise ValueError(
                    f"small_size={self.small_size} must be in [1, large_size={self.large_size}]."
                )
        elif self.large_size or self.small_size:
            raise ValueError(
                f"large_size={self.large_size}, small_size={self.small_size} are flags of an "
                f"upsampler, but kind={self.kind!r}. Use kind='upsampler', or leave both at 0."
            )
        self._check_range("image_size", 1, _MAX_IMAGE_SIZE)

    def _check_range(self, name, low, high):
        value = getattr(self, name)
        if not low <= value <= high:
            raise ValueError(f"{name}={value} must be in [{low}, {high}].")

    def _check_choice(self, name, allowed):
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}."
                + nearest(value, allowed)
            )

    def _check_channels(self):
        mult = self.channel_mult_tuple
        down = 2 ** (len(mult) - 1)
        if self.image_size % down:
            raise ValueError(
                f"image_size={self.image_size} cannot be halved {len(mult) - 1} times: with "
                f"channel_mult={_join(mult)!r} it must be a multiple of {down}."
            )
        widths = self.level_channels
        for level, width in enumerate(widths):
            if width < self.norm_groups or width % self.norm_groups:
                raise ValueError(
                    f"num_channels={self.num_channels} with channel_mult={_join(mult)!r} gives "
                    f"{width} channels at level {level}; every level needs a multiple of "
                    f"norm_groups={self.norm_groups}."
                )
        for name in ("num_head_channels", "num_heads", "num_heads_upsample"):
            value = getattr(self, name)
            if value != -1 and not 1 <= value <= _MAX_CHANNELS:
                raise ValueError(f"{name}={value} must be -1 (not used) or 1 to {_MAX_CHANNELS}.")
        if self.num_head_channels == -1 and self.num_heads == -1:
            raise ValueError("num_heads=-1 and num_head_channels=-1: give one of them.")
        # The middle block always attends, whatever attention_resolutions says.
        attending = {widths[i] for i in range(len(mult)) if 2**i in self.attention_ds} | {
            widths[-1]
        }
        for width in sorted(attending):
            for name, divisor in self._head_divisors():
                if width % divisor:
                    raise ValueError(
                        f"{name}={divisor} does not divide the {width} channels of an attention "
                        f"block (num_channels={self.num_channels}, channel_mult={_join(mult)!r})."
                    )

    def _head_divisors(self):
        if self.num_head_channels != -1:
            return [("num_head_channels", self.num_head_channels)]
        divisors = [("num_heads", self.num_heads)]
        if self.num_heads_upsample != -1 and self.kind != "classifier":
            divisors.append(("num_heads_upsample", self.num_heads_upsample))
        return divisors

    # ---- derived ----

    @property
    def channel_mult_tuple(self) -> tuple[float, ...]:
        """Channel multiplier per level; the published default for the size when none is given."""
        if self.channel_mult:
            return _parse_mult(self.channel_mult)
        return self.default_channel_mult(self.kind, self.image_size)

    @staticmethod
    def default_channel_mult(kind: str, image_size: int) -> tuple[float, ...]:
        """Published multipliers for a size; ValueError when there are none."""
        table = _UPSAMPLER_CHANNEL_MULT if kind == "upsampler" else _CHANNEL_MULT
        if image_size not in table:
            name = "large_size" if kind == "upsampler" else "image_size"
            raise ValueError(
                f"{name}={image_size} has no published channel_mult (sizes that have: "
                f"{', '.join(map(str, sorted(table)))}); give one, such as channel_mult='1,2,2'."
            )
        return table[image_size]

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level: int(mult * num_channels)."""
        return tuple(int(m * self.num_channels) for m in self.channel_mult_tuple)

    @property
    def attention_ds(self) -> frozenset[int]:
        """Down-sampling factors with attention: image_size // resolution for each resolution."""
        return frozenset(
            self.image_size // r for r in _parse_resolutions(self.attention_resolutions)
        )

    @property
    def out_channels(self) -> int:
        """num_classes for a classifier, else in_channels (twice that with learn_sigma)."""
        if self.kind == "classifier":
            return self.num_classes
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def model_in_channels(self) -> int:
        """Channels of the first convolution's input (an upsampler also sees the low-res image)."""
        return self.in_channels * (2 if self.kind == "upsampler" else 1)

    @property
    def embedding_rows(self) -> int:
        """Rows of label_emb: 0 when not class-conditional; the null class is the last row."""
        return (self.num_classes + int(self.null_class)) if self.class_cond else 0

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.num_channels

    def heads(self, channels: int, upsample: bool = False) -> int:
        """Attention heads of a block with ``channels``; ``upsample``: it is in output_blocks."""
        if self.num_head_channels != -1:
            return channels // self.num_head_channels
        if upsample and self.num_heads_upsample != -1:
            return self.num_heads_upsample
        return self.num_heads

    # ---- constructors and conversion ----

    @classmethod
    def classifier(
        cls,
        image_size: int = 64,
        classifier_width: int = 128,
        classifier_depth: int = 2,
        classifier_attention_resolutions: str = "32,16,8",
        classifier_use_scale_shift_norm: bool = True,
        classifier_resblock_updown: bool = True,
        classifier_pool: str = "attention",
        classifier_use_fp16: bool = False,
        num_classes: int = 1000,
        num_head_channels: int = 64,
        channel_mult: str = "",
        **flags,
    ) -> ModelConfig:
        """A noisy classifier by guided-diffusion's flags; ``flags`` are further fields."""
        unknown = [k for k in flags if k not in cls.__dataclass_fields__ or k == "kind"]
        if unknown:
            known = [*_CLASSIFIER_FLAGS, *cls.__dataclass_fields__]
            raise TypeError(f"unknown classifier flag {unknown[0]!r}.{nearest(unknown[0], known)}")
        return cls(
            kind="classifier",
            image_size=image_size,
            num_channels=classifier_width,
            num_res_blocks=classifier_depth,
            attention_resolutions=classifier_attention_resolutions,
            use_scale_shift_norm=classifier_use_scale_shift_norm,
            resblock_updown=classifier_resblock_updown,
            pool=classifier_pool,
            use_fp16=classifier_use_fp16,
            num_classes=num_classes,
            num_head_channels=num_head_channels,
            channel_mult=channel_mult,
            **flags,
        )

    @classmethod
    def upsampler(cls, large_size: int = 256, small_size: int = 64, **flags) -> ModelConfig:
        """A super-resolution model small_size -> large_size; ``flags`` are further fields."""
        return cls.from_dict(
            {**flags, "kind": "upsampler", "large_size": large_size, "small_size": small_size}
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready; ``from_dict`` gives back an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, flags: dict[str, Any]) -> ModelConfig:
        """Config from flags; an unknown flag is a ValueError naming the nearest known one."""
        return cls(**normalize_flags(flags))

    def replace(self, **flags) -> ModelConfig:
        """A copy with other values for ``flags``."""
        changed = normalize_flags(flags, self.kind)
        base = self.to_dict()
        if base["kind"] == "upsampler" and "large_size" in changed:
            base["image_size"] = changed["large_size"]
        return type(self)(**{**base, **changed})

    def diffusion_config(self) -> dict[str, Any]:
        """The diffusion flags under the argument names of ``Diffusion``."""
        return {
            "steps": self.diffusion_steps,
            "noise_schedule": self.noise_schedule,
            "timestep_respacing": self.timestep_respacing,
            "learn_sigma": self.learn_sigma,
            "sigma_small": self.sigma_small,
            "predict_xstart": self.predict_xstart,
            "rescale_timesteps": self.rescale_timesteps,
            "rescale_learned_sigmas": self.rescale_learned_sigmas,
            "use_kl": self.use_kl,
        }


def normalize_flags(flags: dict[str, Any], kind: str | None = None) -> dict[str, Any]:
    """Flags under our field names: classifier_* are mapped, unknown names raise ValueError."""
    kind = flags.get("kind", kind)
    fields = ModelConfig.__dataclass_fields__
    out: dict[str, Any] = {}
    for name, value in flags.items():
        field = name
        if name in _CLASSIFIER_FLAGS:
            if kind not in (None, "classifier"):
                raise ValueError(f"{name} is a classifier flag, but kind={kind!r}.")
            field = _CLASSIFIER_FLAGS[name]
        elif name not in fields:
            raise ValueError(
                f"unknown model flag {name!r}.{nearest(name, [*fields, *_CLASSIFIER_FLAGS])}"
            )
        if field in out:
            raise ValueError(
                f"{CLASSIFIER_ALIASES[field]!r} and {field!r} are the same flag; both were given."
            )
        out[field] = value
    return out


def coerce_flag(name: str, value: Any) -> Any:
    """The value of field ``name`` in its canonical form (what ModelConfig would store)."""
    return _coerce(ModelConfig.__dataclass_fields__[name], value)


def _coerce(field: dataclasses.Field, value: Any) -> Any:
    name, kind = field.name, field.type
    if kind == "bool":
        if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
            return bool(value)
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        if isinstance(value, numbers.Integral) and value in (0, 1):
            return bool(value)
        raise TypeError(f"{name}={value!r} must be True or False.")
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}={value!r} must be an integer.")
        return int(value)
    if kind == "float":
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r} must be a number.")
        return float(value)
    if name == "channel_mult":
        if isinstance(value, (tuple, list)):
            value = ",".join(map(str, value))
        if isinstance(value, str):
            return _join(_parse_mult(value)) if value.strip() else ""
    elif name == "attention_resolutions":
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, (tuple, list)):
            value = ",".join(map(str, value))
        if isinstance(value, str):
            return _join(_parse_resolutions(value))
    elif isinstance(value, str):
        return value
    raise TypeError(f"{name}={value!r} must be a string.")


def _join(values) -> str:
    # repr of a float is exact; a rounded multiplier could change int(mult * num_channels).
    return ",".join(str(int(v)) if v == int(v) else repr(float(v)) for v in values)


def _parse_mult(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not 1 <= len(values) <= _MAX_LEVELS or not all(0 < v <= 1024 for v in values):
        raise ValueError(
            f"channel_mult={text[:80]!r} must be 1 to {_MAX_LEVELS} positive numbers separated by "
            "commas, such as '1,2,3,4' or '0.5,1,1,2,2,4,4'."
        )
    return tuple(int(v) if v == int(v) else v for v in values)


def _parse_resolutions(text: str) -> tuple[int, ...]:
    if not text.strip():
        return ()
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (0,)
    if len(values) > 2 * _MAX_LEVELS or not all(1 <= v <= _MAX_IMAGE_SIZE for v in values):
        raise ValueError(
            f"attention_resolutions={text[:80]!r} must be positive spatial sizes separated by "
            "commas, such as '32,16,8' (or '' for attention in the middle block only)."
        )
    return values
