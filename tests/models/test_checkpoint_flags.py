"""What weights tell about their flags: every preset, random configurations, disagreements."""

import random

import pytest
import torch

from adm_rt import models
from adm_rt.errors import CheckpointError
from adm_rt.models import ModelConfig
from adm_rt.models.checkpoint import load_checkpoint
from adm_rt.models.flag_inference import infer_config, resolve_config
from adm_rt.models.parameter_shapes import parameter_shapes
from adm_rt.models.presets import PRESETS, list_presets, preset

TOLD = (
    "kind",
    "in_channels",
    "num_channels",
    "num_res_blocks",
    "use_scale_shift_norm",
    "resblock_updown",
)
TOLD_OF = {
    "diffusion": ("learn_sigma", "class_cond"),
    "upsampler": ("learn_sigma", "class_cond"),
    "classifier": ("pool", "num_classes"),
}
NEEDED = ("image_size", "num_heads", "num_head_channels", "num_heads_upsample",
          "use_new_attention_order", "noise_schedule", "rescale_timesteps", "small_size",
          "null_class")  # fmt: skip


def meta_shapes(cfg):
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in models.build(cfg).state_dict().items()}


def assert_told(told, cfg):
    for name in TOLD + TOLD_OF[cfg.kind]:
        assert told[name] == getattr(cfg, name), name
    mult = [int(float(m) * cfg.num_channels) for m in told["channel_mult"].split(",")]
    assert mult == list(cfg.level_channels)
    levels = {2**i for i in range(len(mult))}
    assert told["attention_ds"] == cfg.attention_ds & levels
    if cfg.class_cond:
        assert told["embedding_rows"] == cfg.embedding_rows


@pytest.mark.parametrize("name", list_presets())
def test_presets_are_inferred(name):
    cfg = preset(name)
    shapes = meta_shapes(cfg)
    told = infer_config(shapes)
    assert_told(told, cfg)
    if cfg.kind == "classifier":
        assert told["image_size"] == cfg.image_size
    assert resolve_config(shapes, {}, name) == (cfg, name)
    # Without a name the weights find their preset; only dropout may be another.
    found, found_name = resolve_config(shapes, {})
    assert found.replace(dropout=cfg.dropout) == cfg
    assert preset(found_name) == found


def random_config(rng):
    kind = rng.choice(["diffusion", "upsampler", "classifier"])
    levels = rng.randint(1, 4)
    size = 2 ** (levels - 1) * rng.choice([4, 8])
    flags = dict(
        kind=kind,
        image_size=size,
        num_channels=rng.choice([32, 64]),
        channel_mult=",".join(rng.choice("1 1 2 3".split()) for _ in range(levels)),
        num_res_blocks=rng.randint(1, 4),
        attention_resolutions=",".join(
            str(size // 2**i) for i in range(levels) if rng.random() < 0.5
        ),
        use_scale_shift_norm=rng.random() < 0.5,
        resblock_updown=rng.random() < 0.5,
        noise_schedule=rng.choice(["linear", "cosine"]),
        rescale_timesteps=rng.random() < 0.5,
        use_new_attention_order=rng.random() < 0.5,
    )
    if rng.random() < 0.5 or kind == "classifier":
        flags["num_head_channels"] = rng.choice([8, 16, 32])
    else:
        flags.update(num_heads=rng.choice([1, 2, 4]), num_heads_upsample=rng.choice([-1, 8]))
    if kind == "classifier":
        flags.update(
            pool=rng.choice(["attention", "adaptive", "spatial", "spatial_v2"]), num_classes=10
        )
    else:
        classes = rng.random() < 0.5
        flags.update(learn_sigma=rng.random() < 0.5, class_cond=classes)
        flags.update(num_classes=10 if classes else 1000, null_class=classes and rng.random() < 0.5)
    if kind == "upsampler":
        flags.update(large_size=size, small_size=size // 2)
        flags.pop("image_size")
    return ModelConfig(**flags)


def test_random_configurations_are_recovered():
    """From shapes and the flags that shapes cannot tell; resblock_updown shows with two levels."""
    seed = 7
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        cfg = random_config(rng)
        flags = {name: getattr(cfg, name) for name in NEEDED}
        shapes = parameter_shapes(cfg)
        if cfg.kind == "classifier":
            flags["num_res_blocks"] = cfg.num_res_blocks
        else:
            assert_told({"resblock_updown": cfg.resblock_updown, **infer_config(shapes)}, cfg)
        found, name = resolve_config(shapes, flags)
        assert name is None
        assert parameter_shapes(found) == shapes, cfg
        if len(cfg.level_channels) > 1:
            assert found == cfg.replace(
                attention_resolutions=found.attention_resolutions, channel_mult=found.channel_mult
            ), cfg
            levels = {2**i for i in range(len(cfg.level_channels))}
            assert found.attention_ds & levels == cfg.attention_ds & levels
            assert found.level_channels == cfg.level_channels


def test_depth_of_a_classifier_that_does_not_show_its_levels():
    """Equal widths, no attention, up/down blocks: 8 blocks may be 2 x 4 or 4 x 2."""
    cfg = ModelConfig.classifier(
        32, 32, 3, "", classifier_pool="adaptive", channel_mult="1,1", num_head_channels=32
    )
    shapes = parameter_shapes(cfg)
    assert "num_res_blocks" not in infer_config(shapes)
    with pytest.raises(CheckpointError, match="cannot tell num_res_blocks"):
        resolve_config(shapes, {"image_size": 32})
    found, _ = resolve_config(
        shapes, {"image_size": 32, "classifier_depth": 3, "num_head_channels": 32}
    )
    assert found == cfg


WRONG = [
    ("256x256_diffusion", {"num_channels": 128}, "num_channels=128"),
    ("256x256_diffusion", {"num_res_blocks": 3}, "num_res_blocks=3"),
    ("256x256_diffusion", {"channel_mult": "1,2,3,4"}, "channel_mult='1,2,3,4'"),
    ("256x256_diffusion", {"attention_resolutions": "16,8"}, "attention_resolutions='16,8'"),
    ("256x256_diffusion", {"class_cond": False}, "class_cond=False"),
    ("256x256_diffusion", {"num_classes": 10}, "num_classes=10"),
    ("256x256_diffusion", {"null_class": True}, "null_class=True"),
    ("256x256_diffusion", {"learn_sigma": False}, "learn_sigma=False"),
    ("256x256_diffusion", {"resblock_updown": False}, "resblock_updown=False"),
    ("256x256_diffusion", {"use_scale_shift_norm": False}, "use_scale_shift_norm=False"),
    ("256x256_diffusion", {"in_channels": 1}, "in_channels=1"),
    ("256x256_diffusion", {"kind": "classifier"}, "kind='classifier'"),
    ("64_256_upsampler", {"attention_resolutions": "8"}, "attention_resolutions='8'"),
    ("256x256_classifier", {"classifier_width": 64}, "num_channels (classifier_width)=64"),
    ("256x256_classifier", {"classifier_depth": 4}, "num_res_blocks (classifier_depth)=4"),
    ("256x256_classifier", {"classifier_pool": "spatial"}, "pool (classifier_pool)='spatial'"),
    ("256x256_classifier", {"image_size": 128}, "image_size=128"),
    ("256x256_classifier", {"num_classes": 10}, "num_classes=10"),
]


@pytest.mark.parametrize(("name", "flags", "words"), WRONG, ids=[f"{n}-{f}" for n, f, _ in WRONG])
def test_a_flag_that_disagrees_is_named(name, flags, words):
    with pytest.raises(CheckpointError) as error:
        resolve_config(parameter_shapes(preset(name)), flags, name, source="weights.pt")
    assert "flag says" in str(error.value) and words in str(error.value)
    assert "weights.pt" in str(error.value) and "the weights" in str(error.value)


@pytest.mark.parametrize(
    ("weights", "name", "words"),
    [
        ("256x256_diffusion_uncond", "256x256_diffusion", "class_cond=True, but the weights say F"),
        ("64x64_diffusion", "128x128_diffusion", "num_res_blocks=2, but the weights say 3"),
        ("512x512_diffusion", "256x256_diffusion", "channel_mult='1,1,2,2,4,4', but the weights"),
        ("128_512_upsampler", "64_256_upsampler", "attention_resolutions='32,16,8'"),
        ("256x256_classifier", "256x256_diffusion", "kind='diffusion', but the weights say 'cl"),
        ("64_256_upsampler", "256x256_diffusion", "num_channels=256, but the weights say 192"),
        ("64x64_classifier", "128x128_classifier", "image_size=128, but the weights say 64"),
    ],
)
def test_a_preset_that_disagrees_is_named(weights, name, words):
    with pytest.raises(CheckpointError) as error:
        resolve_config(parameter_shapes(preset(weights)), {}, name, "by the file's name")
    assert f"preset {name!r} (by the file's name) says" in str(error.value)
    assert words in str(error.value) and "preset='none'" in str(error.value)


def test_what_is_needed_is_named():
    shapes = parameter_shapes(
        ModelConfig(image_size=32, channel_mult="1,2", num_channels=32, num_heads=2)
    )
    with pytest.raises(CheckpointError) as error:
        resolve_config(shapes, {"noise_schedule": "cosine"})
    for flag in ("image_size", "num_heads or num_head_channels", "use_new_attention_order",
                 "rescale_timesteps", "preset=", "64x64_diffusion"):  # fmt: skip
        assert flag in str(error.value)
    assert "noise_schedule" not in str(error.value)
    # search=False: the released model is not recognised by its shapes either.
    with pytest.raises(CheckpointError, match="cannot tell image_size"):
        resolve_config(parameter_shapes(preset("256x256_diffusion")), {}, search=False)


def test_flags_win_where_weights_are_silent():
    shapes = parameter_shapes(preset("256x256_diffusion"))
    cfg, _ = resolve_config(
        shapes, {"num_heads": 8, "noise_schedule": "cosine"}, "256x256_diffusion"
    )
    assert (cfg.num_head_channels, cfg.num_heads, cfg.noise_schedule) == (-1, 8, "cosine")
    # Heads of another number contradict every released model, so none is recognised.
    with pytest.raises(CheckpointError, match="cannot tell image_size"):
        resolve_config(shapes, {"num_heads": 8})
    same = {"num_head_channels": 64, "attention_resolutions": "8,16,32", "dropout": 0.1}
    cfg, name = resolve_config(shapes, same)
    assert name == "256x256_diffusion" and cfg.dropout == 0.1


def test_mismatch_report_is_exact():
    cfg = ModelConfig(image_size=16, channel_mult="1,2", num_channels=32, num_heads=2)
    shapes = parameter_shapes(cfg)
    flags = {name: getattr(cfg, name) for name in NEEDED}
    shapes["label_embedding"] = (3,)
    shapes["out.0.bias"] = (31,)
    for name in [k for k in shapes if ".emb_layers.1.bias" in k][:5]:
        del shapes[name]
    with pytest.raises(CheckpointError) as error:
        resolve_config(shapes, flags, source="my.pt")
    assert (
        "5 missing: input_blocks.1.0.emb_layers.1.bias, input_blocks.2.0.emb_layers.1.bias, "
        "input_blocks.4.0.emb_layers.1.bias, and 2 more; 1 unexpected: label_embedding; 1 of the "
        "wrong shape: out.0.bias is [31] but must be [32]"
    ) in str(error.value)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"weight": (3, 3)},
        {"model.diffusion_model.input_blocks.0.0.weight": (128, 3, 3, 3)},
        {"input_blocks.0.0.weight": (128,), "time_embed.0.weight": (512, 128)},
    ],
)
def test_other_weights_are_recognised_as_other(shapes):
    with pytest.raises(CheckpointError, match="not the weights of an ADM model"):
        infer_config(shapes)


def test_hostile_shapes_raise_nothing_else():
    seed = 11
    print(f"seed {seed}")
    rng = random.Random(seed)
    shapes = parameter_shapes(preset("64x64_classifier"))
    names = list(shapes)
    for _ in range(300):
        changed = dict(shapes)
        for name in rng.sample(names, rng.randint(1, 4)):
            action = rng.randrange(3)
            if action == 0:
                del changed[name]
            elif action == 1:
                changed[name] = tuple(rng.choice([0, 1, 7, 2**40]) for _ in changed[name])
            else:
                changed[name] = changed[name][: rng.randrange(len(changed[name]) + 1)]
        if changed != shapes:
            with pytest.raises(CheckpointError):
                resolve_config(changed, {}, "64x64_classifier")


def test_released_file_name_or_weights_choose_the_preset(tmp_path, monkeypatch):
    """Two presets are made tiny, so that files of their shapes are quick to write."""
    for name, depth in (("64x64_classifier", 2), ("128x128_classifier", 1)):
        tiny = ModelConfig.classifier(
            preset(name).image_size, 32, depth, channel_mult="1,1,1,1", num_head_channels=16
        )
        monkeypatch.setitem(PRESETS, name, tiny)
    shapes = parameter_shapes(preset("64x64_classifier"))
    state = {k: torch.zeros(shape, dtype=torch.float16) for k, shape in shapes.items()}
    torch.save(state, tmp_path / "64x64_classifier.pt")
    module = load_checkpoint(tmp_path / "64x64_classifier.pt")
    assert module.cfg == preset("64x64_classifier")
    assert module.info.metadata == {"source": "64x64_classifier.pt", "preset": "64x64_classifier"}
    (tmp_path / "64x64_classifier.pt").rename(tmp_path / "renamed.pt")
    with pytest.warns(UserWarning, match="released model '64x64_classifier'"):
        assert load_checkpoint(tmp_path / "renamed.pt").cfg == preset("64x64_classifier")
    (tmp_path / "renamed.pt").rename(tmp_path / "128x128_classifier.pt")
    with pytest.raises(CheckpointError, match="'128x128_classifier' \\(by the file's name\\)"):
        load_checkpoint(tmp_path / "128x128_classifier.pt")
    module = load_checkpoint(tmp_path / "128x128_classifier.pt", preset="64x64_classifier")
    assert module.cfg == preset("64x64_classifier")
    with pytest.raises(ValueError, match="Nearest: 64x64_classifier"):
        load_checkpoint(tmp_path / "128x128_classifier.pt", preset="64x64_clasifier")
