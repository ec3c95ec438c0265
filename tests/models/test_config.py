"""ModelConfig: published defaults, guided-diffusion's forms of values, errors naming a flag."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from adm_rt.models.config import ModelConfig


@pytest.mark.parametrize(
    ("size", "mult"),
    [
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (128, (1, 1, 2, 3, 4)),
        (64, (1, 2, 3, 4)),
    ],
)
def test_published_multipliers(size, mult):
    assert ModelConfig(image_size=size).channel_mult_tuple == mult
    assert ModelConfig.classifier(size).channel_mult_tuple == mult


@pytest.mark.parametrize(
    ("size", "mult"),
    [(512, (1, 1, 2, 2, 4, 4)), (256, (1, 1, 2, 2, 4, 4)), (64, (1, 2, 3, 4))],
)
def test_published_multipliers_of_the_upsampler(size, mult):
    assert ModelConfig.upsampler(size, 32).channel_mult_tuple == mult


def test_derived_facts():
    cfg = ModelConfig(
        image_size=512, num_channels=256, attention_resolutions="32,16,8", num_head_channels=64
    )
    assert cfg.level_channels == (128, 256, 256, 512, 512, 1024, 1024)
    assert cfg.attention_ds == {16, 32, 64}
    assert (cfg.out_channels, cfg.model_in_channels, cfg.embedding_rows) == (3, 3, 0)
    assert cfg.heads(512) == cfg.heads(512, upsample=True) == 8
    guided = cfg.replace(learn_sigma=True, class_cond=True, null_class=True, num_classes=36)
    assert (guided.out_channels, guided.embedding_rows) == (6, 37)

    up = ModelConfig.upsampler(256, 64, num_channels=192, learn_sigma=True)
    assert (up.image_size, up.model_in_channels, up.out_channels) == (256, 6, 6)
    assert up == ModelConfig(
        kind="upsampler", large_size=256, small_size=64, num_channels=192, learn_sigma=True
    )
    assert up.replace(large_size=512, small_size=128).image_size == 512

    heads = ModelConfig(num_heads=4, num_heads_upsample=8)
    assert (heads.heads(256), heads.heads(256, upsample=True)) == (4, 8)


def test_classifier_flags_map_onto_the_fields():
    cfg = ModelConfig.classifier(
        image_size=256,
        classifier_width=64,
        classifier_depth=4,
        classifier_attention_resolutions="16",
        classifier_use_scale_shift_norm=False,
        classifier_resblock_updown=False,
        classifier_pool="spatial",
        classifier_use_fp16=True,
        num_classes=10,
    )
    assert (cfg.kind, cfg.num_channels, cfg.num_res_blocks) == ("classifier", 64, 4)
    assert (cfg.attention_resolutions, cfg.pool, cfg.use_fp16) == ("16", "spatial", True)
    assert not cfg.use_scale_shift_norm and not cfg.resblock_updown
    assert (cfg.out_channels, cfg.num_head_channels) == (10, 64)
    same = ModelConfig.from_dict(
        {"kind": "classifier", "image_size": 64, "classifier_width": 64, "num_head_channels": 64}
    )
    assert same.num_channels == 64


@pytest.mark.parametrize(
    "cfg",
    [
        ModelConfig(),
        ModelConfig(image_size=32, channel_mult="0.5,1,2.5", num_channels=64, num_heads=2),
        ModelConfig.upsampler(512, 128, num_channels=192, num_head_channels=64),
        ModelConfig.classifier(128, classifier_pool="adaptive"),
    ],
)
def test_round_trip_through_json(cfg):
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_values_are_brought_to_one_form():
    cfg = ModelConfig(
        image_size=np.int64(64),
        channel_mult=(1, 2.0, 3, 4),
        attention_resolutions=[32, 16],
        class_cond="True",
        use_fp16="no",
        dropout=1 / 4,
        learn_sigma=np.bool_(True),
    )
    assert (cfg.channel_mult, cfg.attention_resolutions) == ("1,2,3,4", "32,16")
    assert (cfg.class_cond, cfg.use_fp16, cfg.learn_sigma) == (True, False, True)
    assert type(cfg.image_size) is int and type(cfg.learn_sigma) is bool
    assert hash(cfg) == hash(dataclasses.replace(cfg))
    # A multiplier is kept exactly: 96 channels of 288 must not become 95.
    third = ModelConfig(image_size=32, num_channels=288, channel_mult=(1 / 3, 1))
    assert third.level_channels == (96, 288)


BAD = [
    ({"image_size": 32}, ["image_size=32", "64, 128, 256, 512", "channel_mult"]),
    ({"image_size": 0}, ["image_size=0"]),
    ({"image_size": 36, "channel_mult": "1,2,2,2"}, ["image_size=36", "multiple of 8"]),
    ({"image_size": "64"}, ["image_size='64'", "integer"]),
    ({"image_size": True}, ["image_size=True"]),
    ({"num_channels": 100}, ["num_channels=100", "multiple of norm_groups=32"]),
    ({"num_channels": 10**9}, ["num_channels=1000000000"]),
    ({"num_res_blocks": 0}, ["num_res_blocks=0"]),
    ({"num_heads": 3}, ["num_heads=3", "512 channels"]),
    ({"num_heads": -1}, ["num_heads=-1", "num_head_channels"]),
    ({"num_heads": 0}, ["num_heads=0"]),
    ({"num_heads_upsample": 5}, ["num_heads_upsample=5"]),
    ({"num_head_channels": 48}, ["num_head_channels=48"]),
    ({"channel_mult": "1,two"}, ["channel_mult='1,two'", "0.5,1"]),
    ({"channel_mult": "1,nan"}, ["channel_mult='1,nan'"]),
    ({"channel_mult": "1,-2"}, ["channel_mult"]),
    ({"channel_mult": ",".join("1" * 40)}, ["channel_mult"]),
    ({"channel_mult": 3}, ["channel_mult=3"]),
    ({"attention_resolutions": "16,eight"}, ["attention_resolutions='16,eight'"]),
    ({"attention_resolutions": "0"}, ["attention_resolutions"]),
    ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
    ({"dropout": float("nan")}, ["dropout=nan"]),
    ({"num_classes": 0}, ["num_classes=0"]),
    ({"null_class": True}, ["null_class=True", "class_cond=True"]),
    ({"class_cond": 2}, ["class_cond=2"]),
    ({"use_fp16": "maybe"}, ["use_fp16='maybe'"]),
    ({"kind": "unet"}, ["kind='unet'", "upsampler"]),
    ({"noise_schedule": "cosin"}, ["noise_schedule='cosin'", "'cosine'"]),
    ({"diffusion_steps": 0}, ["diffusion_steps=0"]),
    ({"timestep_respacing": 25}, ["timestep_respacing=25", "string"]),
    ({"kind": "classifier", "pool": "max", "num_head_channels": 64}, ["pool='max'", "spatial_v2"]),
    ({"kind": "classifier"}, ["num_head_channels=-1", "pool='attention'"]),
    ({"kind": "classifier", "num_head_channels": 64, "class_cond": True}, ["class_cond=True"]),
    ({"small_size": 16}, ["small_size=16", "kind='diffusion'"]),
    ({"kind": "upsampler", "large_size": 256}, ["small_size=0"]),
    ({"kind": "upsampler", "large_size": 64, "small_size": 128}, ["small_size=128"]),
    ({"kind": "upsampler", "large_size": 128, "small_size": 64}, ["large_size=128"]),
    (
        {"kind": "upsampler", "large_size": 256, "image_size": 128, "small_size": 64},
        ["image_size=128", "large_size=256"],
    ),
    ({"num_chanels": 3}, ["'num_chanels'", "'num_channels'"]),
    ({"classifier_width": 64, "kind": "diffusion"}, ["classifier_width", "kind='diffusion'"]),
    ({"classifier_width": 64, "num_channels": 64}, ["classifier_width", "same flag"]),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[str(f) for f, _ in BAD])
def test_bad_values_are_named(flags, words):
    with pytest.raises((ValueError, TypeError)) as error:
        ModelConfig.from_dict(flags)
    for word in words:
        assert word in str(error.value)


def test_unknown_classifier_flag_names_the_nearest():
    with pytest.raises(TypeError, match="classifier_width"):
        ModelConfig.classifier(64, classifier_widht=64)


def test_diffusion_config_has_the_arguments_of_diffusion():
    cfg = ModelConfig(learn_sigma=True, noise_schedule="cosine", diffusion_steps=500)
    assert cfg.diffusion_config() == {
        "steps": 500,
        "noise_schedule": "cosine",
        "timestep_respacing": "",
        "learn_sigma": True,
        "sigma_small": False,
        "predict_xstart": False,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
        "use_kl": False,
    }


def test_configuration_and_folders_need_no_torch():
    code = (
        "import sys, adm_rt.models.checkpoint, adm_rt.models.presets\n"
        "from adm_rt.models import ModelConfig, preset\n"
        "preset('256x256_diffusion').channel_mult_tuple\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
