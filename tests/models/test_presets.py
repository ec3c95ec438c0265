"""The 15 released models: flags, parameter and key counts, key names and shapes."""

import pytest
import torch

from adm_rt import models
from adm_rt.models.parameter_shapes import count_parameters, parameter_shapes
from adm_rt.models.presets import (
    PRESETS,
    list_presets,
    preset,
    preset_name,
    sampling_settings,
)

# Counts of the published code with the published flags.
COUNTS = {
    "64x64_diffusion": (295_904_454, 541),
    "128x128_diffusion": (421_529_606, 493),
    "256x256_diffusion": (553_838_086, 567),
    "256x256_diffusion_uncond": (552_814_086, 566),
    "512x512_diffusion": (558_997_638, 645),
    "64_256_upsampler": (311_795_910, 567),
    "128_512_upsampler": (308_835_270, 537),
    "lsun_bedroom": (552_814_086, 566),
    "lsun_cat": (552_814_086, 566),
    "lsun_horse": (552_814_086, 566),
    "lsun_horse_nodropout": (552_814_086, 566),
    "64x64_classifier": (65_438_568, 307),
    "128x128_classifier": (42_568_040, 221),
    "256x256_classifier": (54_096_360, 249),
    "512x512_classifier": (54_448_360, 281),
}


def meta_shapes(name):
    with torch.device("meta"):
        module = models.build(preset(name))
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def test_the_list_is_the_released_files():
    assert list_presets() == list(COUNTS)
    assert len(list_presets("classifier")) == 4
    assert list_presets("upsampler") == ["64_256_upsampler", "128_512_upsampler"]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_shapes(name):
    shapes = meta_shapes(name)
    assert (count_parameters(shapes), len(shapes)) == COUNTS[name]
    # The torch-free description is the same, weight by weight.
    assert parameter_shapes(preset(name)) == shapes


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("64x64_diffusion", {64}),
        ("128x128_diffusion", {128, 192, 256}),
        ("256x256_diffusion", {64}),
        ("64_256_upsampler", {96, 192}),
        ("128_512_upsampler", {64}),
        ("256x256_classifier", {64}),
    ],
)
def test_head_widths(name, dims):
    cfg = preset(name)
    widths = {w for i, w in enumerate(cfg.level_channels) if 2**i in cfg.attention_ds}
    assert {w // cfg.heads(w) for w in widths} == dims


def test_flags_that_weights_cannot_tell():
    for name, cfg in PRESETS.items():
        assert cfg.use_new_attention_order == (name == "64x64_diffusion")
        assert cfg.noise_schedule == ("cosine" if name.startswith("64x64") else "linear")
        assert cfg.diffusion_steps == 1000 and not cfg.rescale_timesteps
        assert cfg.dropout == (
            0.1 if name in ("64x64_diffusion", "lsun_bedroom", "lsun_cat", "lsun_horse") else 0.0
        )
        assert cfg.learn_sigma == (cfg.kind != "classifier")


def block(shapes, prefix):
    """Names below ``prefix``, as {position: kind}."""
    kinds = {"in_layers": "res", "qkv": "attention", "op": "op", "conv": "conv", "weight": "conv3"}
    found = {}
    for key in shapes:
        if key.startswith(prefix + "."):
            position, part = key[len(prefix) + 1 :].split(".")[:2]
            if part in kinds:
                found[int(position)] = kinds[part]
    return found


def test_block_map_of_the_256_model():
    shapes = meta_shapes("256x256_diffusion")
    res, both = {0: "res"}, {0: "res", 1: "attention"}
    assert block(shapes, "input_blocks.0") == {0: "conv3"}
    for index in range(1, 18):
        with_attention = index in (10, 11, 13, 14, 16, 17)
        assert block(shapes, f"input_blocks.{index}") == (both if with_attention else res), index
    widths = [shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0] for i in range(1, 18)]
    assert widths == [256] * 6 + [512] * 6 + [1024] * 5
    assert shapes["input_blocks.7.0.skip_connection.weight"] == (512, 256, 1, 1)
    assert "input_blocks.8.0.skip_connection.weight" not in shapes
    for index in range(18):
        expected = dict(both if index < 9 else res)
        if index % 3 == 2 and index != 17:
            expected[len(expected)] = "res"  # the up-sampling residual block
        assert block(shapes, f"output_blocks.{index}") == expected, index
    inputs = [shapes[f"output_blocks.{i}.0.in_layers.2.weight"][1] for i in range(18)]
    assert inputs == [2048] * 5 + [1536] * 2 + [1024] * 4 + [768] * 2 + [512] * 5
    assert set(block(shapes, "middle_block")) == {0, 1, 2}
    assert shapes["middle_block.1.qkv.weight"] == (3072, 1024, 1)
    assert shapes["middle_block.1.proj_out.weight"] == (1024, 1024, 1)
    assert shapes["input_blocks.1.0.emb_layers.1.weight"] == (512, 1024)
    assert shapes["time_embed.0.weight"] == (1024, 256)
    assert shapes["time_embed.2.weight"] == (1024, 1024)
    assert shapes["label_emb.weight"] == (1000, 1024)
    assert shapes["out.0.weight"] == (256,)
    assert shapes["out.2.weight"] == (6, 256, 3, 3)
    others = {k for k in shapes if not k.startswith(("input_", "output_", "middle_"))}
    assert others == {
        "label_emb.weight",
        *(
            f"{m}.{p}"
            for m in ("time_embed.0", "time_embed.2", "out.0", "out.2")
            for p in ("weight", "bias")
        ),
    }


@pytest.mark.parametrize("name", list_presets("classifier"))
def test_attention_pool_shapes(name):
    shapes = parameter_shapes(preset(name))
    assert shapes["out.2.positional_embedding"] == (512, 65)
    assert shapes["out.2.qkv_proj.weight"] == (1536, 512, 1)
    assert shapes["out.2.c_proj.weight"] == (1000, 512, 1)
    assert not any(k.startswith(("output_blocks", "label_emb")) for k in shapes)


def test_names_files_and_paths_are_accepted():
    cfg = preset("64x64_diffusion")
    assert preset("64x64_diffusion.pt") is cfg
    assert preset("/models/64x64_diffusion.pt") is cfg
    assert preset_name("models/lsun_cat.pt") == "lsun_cat"
    assert preset_name("my_model.pt") is None


def test_unknown_name_lists_the_nearest_and_all():
    with pytest.raises(ValueError) as error:
        preset("64x64_difusion")
    assert "Nearest: 64x64_diffusion" in str(error.value)
    for name in COUNTS:
        assert name in str(error.value)
    with pytest.raises(TypeError, match="must be a string"):
        preset(64)


def test_published_sampling_settings():
    scales = {
        name: (s.guidance_scale, s.ddim_guidance_scale, s.classifier)
        for name in list_presets("diffusion")
        for s in [sampling_settings(name)]
    }
    assert scales["64x64_diffusion"] == (1.0, None, "64x64_classifier")
    assert scales["128x128_diffusion"] == (0.5, 1.25, "128x128_classifier")
    assert scales["256x256_diffusion"] == (1.0, 2.5, "256x256_classifier")
    assert scales["256x256_diffusion_uncond"] == (10.0, None, "256x256_classifier")
    assert scales["512x512_diffusion"] == (4.0, 9.0, "512x512_classifier")
    assert sampling_settings("lsun_cat").timestep_respacing == ""
    assert sampling_settings("64_256_upsampler").base == "64x64_diffusion"
    for name in list_presets("diffusion"):
        classifier = sampling_settings(name).classifier
        if classifier:
            assert preset(classifier).image_size == preset(name).image_size
            assert preset(classifier).noise_schedule == preset(name).noise_schedule
    with pytest.raises(ValueError, match="is a classifier"):
        sampling_settings("64x64_classifier")
