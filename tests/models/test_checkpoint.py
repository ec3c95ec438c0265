"""Model folders and .pt files: round trips, damage, hostile files, atomic writes, qkv orders."""

import errno
import json
import os
import random
import struct
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from adm_rt import models
from adm_rt.errors import CheckpointError
from adm_rt.models import ModelConfig, checkpoint, weight_folder
from adm_rt.models.checkpoint import (
    convert,
    convert_attention_order,
    load_checkpoint,
    load_model,
    read_info,
    read_weights,
    save_model,
    write_manifest,
)
from adm_rt.ops import reference

TINY = dict(
    image_size=16,
    num_channels=32,
    channel_mult="1,2",
    num_res_blocks=1,
    attention_resolutions="8",
    num_head_channels=32,
)
CONFIGS = {
    "diffusion": ModelConfig(
        **TINY, class_cond=True, num_classes=7, learn_sigma=True, resblock_updown=True
    ),
    "upsampler": ModelConfig.upsampler(
        16, 8, **{k: v for k, v in TINY.items() if k != "image_size"}, use_new_attention_order=True
    ),
    "classifier": ModelConfig.classifier(
        16, 32, 1, "8", num_classes=7, num_head_channels=32, channel_mult="1,2"
    ),
}
# What a .pt of a model that is not a released one needs beside its weights.
NEEDED = (
    "image_size",
    "num_head_channels",
    "num_heads",
    "use_new_attention_order",
    "noise_schedule",
    "rescale_timesteps",
    "small_size",
)


def needed_flags(cfg):
    return {name: getattr(cfg, name) for name in NEEDED}


def random_model(cfg, seed=0):
    torch.manual_seed(seed)
    module = models.build(cfg)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.eval()


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder and a .pt of each kind of model."""
    root = tmp_path_factory.mktemp("saved")
    for kind, cfg in CONFIGS.items():
        names = [f"class {i}" for i in range(cfg.num_classes)] if cfg.num_classes == 7 else None
        module = random_model(cfg)
        save_model(root / kind, module, class_names=names, metadata={"guidance_scale": 1.5})
        torch.save(module.state_dict(), root / f"{kind}.pt")
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """A private copy of the classifier's folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (saved / "classifier").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# ---- round trips ----


@pytest.mark.parametrize("kind", CONFIGS)
def test_folder_round_trip(saved, kind):
    module = random_model(CONFIGS[kind])
    loaded = load_model(saved / kind)
    assert type(loaded) is type(module) and loaded.cfg == CONFIGS[kind]
    assert_same_weights(loaded, module)
    assert not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    assert loaded.info.metadata == {"guidance_scale": 1.5}
    if kind != "upsampler":
        assert loaded.info.class_names[6] == "class 6"
    cfg, arrays = read_weights(saved / kind)
    assert cfg == CONFIGS[kind]
    for name, tensor in module.state_dict().items():
        assert arrays[name].dtype == np.float32
        assert np.array_equal(arrays[name], tensor.numpy())
    # Any safetensors reader can open the weights.
    plain = safetensors.torch.load_file(saved / kind / "model.safetensors")
    assert all(torch.equal(plain[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_pt_to_folder_to_pt(saved, kind, tmp_path):
    cfg = CONFIGS[kind]
    flags = needed_flags(cfg)
    loaded = load_checkpoint(saved / f"{kind}.pt", **flags)
    assert loaded.cfg == cfg
    convert(saved / f"{kind}.pt", tmp_path / "folder", **flags)
    assert_same_weights(load_checkpoint(tmp_path / "folder"), loaded)
    convert(tmp_path / "folder", tmp_path / "again.pt")
    state = torch.load(tmp_path / "again.pt", weights_only=True)
    original = torch.load(saved / f"{kind}.pt", weights_only=True)
    assert state.keys() == original.keys()
    assert all(torch.equal(state[k], original[k]) for k in state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_storage_rounds_as_torch_does(saved, tmp_path, dtype):
    convert(saved / "classifier", tmp_path / "half", dtype)
    original = random_model(CONFIGS["classifier"]).state_dict()
    _, arrays = read_weights(tmp_path / "half")
    for name, tensor in original.items():
        expected = tensor.to(getattr(torch, dtype)).float()
        assert torch.equal(torch.from_numpy(arrays[name]), expected), name
    assert load_model(tmp_path / "half").out[0].weight.dtype == torch.float32
    full = (saved / "classifier" / "model.safetensors").stat().st_size
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * full
    # Converting what is half stays half, and exact, unless told otherwise.
    convert(tmp_path / "half", tmp_path / "same")
    assert read_info(tmp_path / "same").dtype == dtype
    same = read_weights(tmp_path / "same")[1]
    assert all(np.array_equal(same[k], arrays[k]) for k in arrays)


def test_bfloat16_rounds_ties_to_even():
    from adm_rt.models.safetensors_file import stored_array

    values = np.float32([1.0, 1.00390625, 1.01171875, -1.00390625, 3.3e38, 1e-40, -0.0])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(stored_array("w", values, "bfloat16").view(np.int16), expected)


def test_float16_half_precision_pt_loads_as_float32(saved, tmp_path):
    state = torch.load(saved / "diffusion.pt", weights_only=True)
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pt")
    loaded = load_checkpoint(tmp_path / "half.pt", **needed_flags(CONFIGS["diffusion"]))
    assert loaded.state_dict()["out.2.weight"].dtype == torch.float32
    assert torch.equal(loaded.state_dict()["out.2.weight"], state["out.2.weight"].half().float())


def test_loaded_weights_do_not_depend_on_the_file(saved, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes((saved / "diffusion.pt").read_bytes())
    loaded = load_checkpoint(path, **needed_flags(CONFIGS["diffusion"]))
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same_weights(loaded, random_model(CONFIGS["diffusion"]))


def test_folder_flags_may_not_be_contradicted(saved):
    assert load_checkpoint(saved / "diffusion", dropout=0.25).cfg.dropout == 0.25
    with pytest.raises(CheckpointError, match=r"num_head_channels=16 disagrees.*says 32"):
        load_checkpoint(saved / "diffusion", num_head_channels=16)
    with pytest.raises(CheckpointError, match=r"preset 'lsun_cat': image_size=256 disagrees"):
        load_checkpoint(saved / "diffusion", preset="lsun_cat")


# ---- damage ----


def assert_refused(folder):
    """The folder is refused by an error that names one of its files; no other exception."""
    with pytest.raises(CheckpointError) as error:
        read_weights(folder)
    assert str(folder) in str(error.value), error.value


def test_every_truncation_and_bit_flip_is_detected(copy):
    seed = 20240
    print(f"seed {seed}")
    rng = random.Random(seed)
    read_weights(copy)
    for file in sorted(copy.iterdir()):
        data = file.read_bytes()
        for _ in range(60):
            file.write_bytes(data[: rng.randrange(len(data))])
            assert_refused(copy)
        for _ in range(150):
            bit = rng.randrange(8 * len(data))
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            assert_refused(copy)
        file.write_bytes(data + b"\0")
        assert_refused(copy)
        file.write_bytes(data)
    read_weights(copy)


def test_damage_without_verification_is_no_other_error(copy):
    """With verify=False a changed payload may pass, but nothing else than CheckpointError comes."""
    seed = 20241
    print(f"seed {seed}")
    rng = random.Random(seed)
    for name in ("config.json", "model.safetensors"):
        data = (copy / name).read_bytes()
        # Most of the weights file is payload; its header is where parsing could go wrong.
        limit = len(data) if name == "config.json" else 4096
        for _ in range(150):
            damaged = bytearray(data)
            bit = rng.randrange(8 * limit)
            damaged[bit // 8] ^= 1 << bit % 8
            (copy / name).write_bytes(damaged[: rng.choice([len(data), rng.randrange(len(data))])])
            try:
                read_weights(copy, verify=False)
            except CheckpointError:
                pass
        (copy / name).write_bytes(data)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(copy)


def test_missing_manifest_can_be_waived_and_rewritten(copy):
    (copy / "manifest.json").unlink()
    assert load_model(copy, verify=False).cfg == CONFIGS["classifier"]
    write_manifest(copy)
    load_model(copy)


def rewrite_config(folder, change):
    value = json.loads((folder / "config.json").read_text())
    change(value)
    (folder / "config.json").write_text(json.dumps(value))
    write_manifest(folder)


BOMBS = {
    "width": lambda v: v["config"].update(num_channels=16384),
    "depth": lambda v: v["config"].update(num_res_blocks=64),
    "classes": lambda v: v["config"].update(num_classes=1 << 22),
    "beyond": lambda v: v["config"].update(num_channels=1 << 60),
    "text": lambda v: v["config"].update(channel_mult="1," * 100000 + "1"),
    "float": lambda v: v["config"].update(num_channels=1e300),
    "unknown": lambda v: v["config"].update(num_chanels=3),
    "version": lambda v: v.update(format_version=2),
    "list": lambda v: v.update(config=[]),
    "names": lambda v: v.update(class_names=["one"]),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_config_bombs_are_refused_before_allocation(copy, bomb):
    rewrite_config(copy, BOMBS[bomb])
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        load_model(copy)
    assert str(copy) in str(error.value) and len(str(error.value)) < 1500
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("text", ["[" * 100000, "{" * 5, "[]", "", "x" * (5 << 20), "\xff"])
def test_config_that_is_no_config(copy, text):
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(copy)


@pytest.mark.parametrize("length", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_weights_header_of_impossible_length(copy, length):
    path = copy / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(copy)


def test_weights_of_another_model_or_type(copy, saved):
    (copy / "model.safetensors").write_bytes(
        (saved / "diffusion" / "model.safetensors").read_bytes()
    )
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"does not fit its config.*unexpected"):
        load_model(copy)
    state = random_model(CONFIGS["classifier"]).state_dict()
    state["out.0.bias"] = state["out.0.bias"].to(torch.int32)
    safetensors.torch.save_file(state, copy / "model.safetensors")
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"'out.0.bias' is stored as I32"):
        load_model(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(copy, saved, tmp_path, value):
    module = random_model(CONFIGS["classifier"])
    with torch.no_grad():
        module.out[0].bias[3] = value
    with pytest.raises(CheckpointError, match="'out.0.bias'"):
        save_model(tmp_path / "bad", module)
    assert not (tmp_path / "bad").exists()
    safetensors.torch.save_file(module.state_dict(), copy / "model.safetensors")
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: weight 'out.0.bias' has NaN"):
        load_model(copy)
    torch.save(module.state_dict(), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: weight 'out.0.bias' has NaN"):
        load_checkpoint(tmp_path / "bad.pt", **needed_flags(CONFIGS["classifier"]))


def test_values_that_a_type_cannot_hold(tmp_path):
    module = random_model(CONFIGS["classifier"])
    with torch.no_grad():
        module.out[0].bias[3] = 1e5
    with pytest.raises(CheckpointError, match=r"'out.0.bias' as float16.*bfloat16"):
        save_model(tmp_path / "model", module, dtype="float16")
    save_model(tmp_path / "model", module, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype='int8'"):
        save_model(tmp_path / "other", module, dtype="int8")
    assert os.listdir(tmp_path) == ["model"]


# ---- writing ----


def fail_while_writing(monkeypatch, error):
    real = weight_folder.write_safetensors

    def fail(path, weights, dtype):
        real(path, weights, dtype)
        path.write_bytes(path.read_bytes()[:1000])
        raise error

    monkeypatch.setattr(weight_folder, "write_safetensors", fail)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
def test_failing_write_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch, error, raised):
    old = random_model(CONFIGS["classifier"], seed=1)
    save_model(tmp_path / "old", old)
    fail_while_writing(monkeypatch, error)
    new = random_model(CONFIGS["classifier"], seed=2)
    for name in ("new", "old"):
        with pytest.raises(raised) as caught:
            save_model(tmp_path / name, new, overwrite=True)
        if raised is CheckpointError:
            assert "No space left" in str(caught.value) and name in str(caught.value)
    assert os.listdir(tmp_path) == ["old"]
    assert_same_weights(load_model(tmp_path / "old"), old)


def test_failing_last_rename_puts_the_old_model_back(tmp_path, monkeypatch):
    old = random_model(CONFIGS["classifier"], seed=1)
    save_model(tmp_path / "model", old)
    real, calls = os.rename, []

    def rename(src, dst):
        calls.append(src)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(src, dst)

    monkeypatch.setattr(weight_folder.os, "rename", rename)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_model(tmp_path / "model", random_model(CONFIGS["classifier"]), overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    assert_same_weights(load_model(tmp_path / "model"), old)


def test_overwriting(tmp_path):
    module = random_model(CONFIGS["classifier"], seed=3)
    place = tmp_path / "model"
    place.mkdir()
    save_model(place, random_model(CONFIGS["diffusion"]))  # an empty folder is free
    (place / "MODEL_CARD.md").write_text("a card")
    with pytest.raises(CheckpointError, match="not empty.*overwrite=True"):
        save_model(place, module)
    assert load_model(place).cfg == CONFIGS["diffusion"]
    save_model(place, module, overwrite=True)
    assert_same_weights(load_model(place), module)
    assert (place / "MODEL_CARD.md").read_text() == "a card"
    assert os.listdir(tmp_path) == ["model"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_model(precious, module, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "years of work"

    convert(place, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        convert(place, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before


def test_unwritable_places(tmp_path):
    module = random_model(CONFIGS["classifier"])
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "model", tmp_path / "file", "/proc/adm_rt/model"):
        with pytest.raises(CheckpointError) as error:
            save_model(place, module)
        assert f"cannot write {place}" in str(error.value)
    save_model(tmp_path / "model", module)
    for place in (tmp_path / "file" / "model.pt", "/proc/model.pt"):
        with pytest.raises(CheckpointError, match="cannot write"):
            convert(tmp_path / "model", place)
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


def test_folder_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        save_model(tmp_path / "model", random_model(CONFIGS["classifier"]))
    finally:
        os.umask(old)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_saving_weights_that_do_not_fit_the_config(tmp_path):
    state = random_model(CONFIGS["classifier"]).state_dict()
    state["extra"] = state.pop("out.0.bias")
    with pytest.raises(CheckpointError, match="1 missing: out.0.bias; 1 unexpected: extra"):
        save_model(tmp_path / "model", (CONFIGS["classifier"], state))
    with pytest.raises(ValueError, match="class_names has 2 entries"):
        save_model(tmp_path / "model", random_model(CONFIGS["classifier"]), class_names=["a", "b"])
    with pytest.raises(ValueError, match="metadata must be plain JSON"):
        save_model(
            tmp_path / "model", random_model(CONFIGS["classifier"]), metadata={"x": object()}
        )
    assert os.listdir(tmp_path) == []


# ---- qkv orders ----


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_qkv_permutation_is_exact_in_the_reference_attention(heads):
    """Small integers: every product and sum is exact, so only the order of rows could differ."""
    width = 64
    cfg = ModelConfig(
        image_size=16, num_channels=width, channel_mult="1", attention_resolutions="16",
        num_heads=heads,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(heads)
    weight = torch.randint(-3, 4, (3 * width, width, 1), generator=generator).float()
    bias = torch.randint(-3, 4, (3 * width,), generator=generator).float()
    x = torch.randint(-2, 3, (2, width, 25), generator=generator).float() / 8
    name = "middle_block.1.qkv"
    new_cfg, new = convert_attention_order(
        cfg, {f"{name}.weight": weight, f"{name}.bias": bias}, "new"
    )
    assert new_cfg.use_new_attention_order
    assert torch.equal(new[f"{name}.weight"], weight) == (heads == 1)
    old_qkv = torch.nn.functional.conv1d(x, weight, bias)
    new_qkv = torch.nn.functional.conv1d(x, new[f"{name}.weight"], new[f"{name}.bias"])
    legacy = reference.qkv_attention(old_qkv, heads, "legacy")
    assert torch.equal(reference.qkv_attention(new_qkv, heads, "new"), legacy)
    if heads > 1:
        assert not torch.equal(reference.qkv_attention(new_qkv, heads, "legacy"), legacy)
    back_cfg, back = convert_attention_order(new_cfg, new, "legacy")
    assert back_cfg == cfg
    assert torch.equal(back[f"{name}.weight"], weight)
    assert torch.equal(back[f"{name}.bias"], bias)


def test_attention_order_of_a_whole_model(saved, tmp_path):
    cfg = ModelConfig(
        **{**TINY, "num_head_channels": -1}, num_heads=2, num_heads_upsample=4, learn_sigma=True
    )
    module = random_model(cfg)
    save_model(tmp_path / "legacy", module)
    new = load_checkpoint(tmp_path / "legacy", attention_order="new")
    assert new.cfg == cfg.replace(use_new_attention_order=True)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        expected, found = module(x, t), new(x, t)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    convert(tmp_path / "legacy", tmp_path / "new", attention_order="new")
    assert_same_weights(load_model(tmp_path / "new"), new)
    back = load_checkpoint(tmp_path / "new", attention_order="legacy")
    assert back.cfg == cfg
    assert_same_weights(back, module)
    # The pooling head of a classifier has one fixed order.
    classifier = load_checkpoint(saved / "classifier", attention_order="new")
    original = random_model(CONFIGS["classifier"])
    assert torch.equal(classifier.out[2].qkv_proj.weight, original.out[2].qkv_proj.weight)
    assert not torch.equal(
        classifier.middle_block[1].qkv.weight, original.middle_block[1].qkv.weight
    )
    with pytest.raises(ValueError, match="attention_order='old'"):
        load_checkpoint(saved / "classifier", attention_order="old")


def test_public_names():
    for name in checkpoint.__all__:
        assert hasattr(checkpoint, name)
    assert models.load_checkpoint is load_checkpoint
