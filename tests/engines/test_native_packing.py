"""Packed weights: the cache on disk, its damage, and loading without raw weights."""

import dataclasses
import os
import stat
import time

import numpy as np
import pytest
from native_cases import inputs_of
from tiny_models import tiny_network

from adm_rt import _C, engines
from adm_rt.engines import packed_cache
from adm_rt.errors import CheckpointError
from adm_rt.models import ModelConfig, load_weights, save_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder that keeps weights of every size; nothing is shared in the process."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ADM_RT_CACHE", str(folder))
    monkeypatch.setattr(packed_cache, "MIN_CACHED_BYTES", 0)
    monkeypatch.setattr(packed_cache, "_packed", {})
    return folder


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", tiny_network())


def answer(model):
    packed_cache._packed.clear()
    engine = engines.create("native", load_weights(model))
    x, y, _ = inputs_of(engine._unet.cfg)
    return engine.denoise(x, 12.5, y), engine.notes


def test_a_warm_load_reads_no_raw_weights(cache, model, monkeypatch):
    expected, notes = answer(model)
    (file,) = cache.iterdir()
    assert len(notes) == 1 and "GB" in notes[0] and str(cache) in notes[0]
    assert "ADM_RT_CACHE" in notes[0] and "\n" not in notes[0]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def refuse(*arguments):
        raise AssertionError("raw weights were read")

    monkeypatch.setattr("adm_rt.models.checkpoint.read_weights", refuse)
    assert np.array_equal(answer(model)[0], expected)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "header", "not ours"])
def test_a_damaged_file_is_made_again(cache, model, damage):
    expected, _ = answer(model)
    (file,) = cache.iterdir()
    whole = bytearray(file.read_bytes())
    broken = {
        "truncated": whole[:-4096],
        "flipped": whole[:200_000] + bytes([whole[200_000] ^ 4]) + whole[200_001:],
        "emptied": bytearray(),
        "header": b"\xff" * 100 + whole[100:],
        "not ours": b"{}" + b"\0" * (len(whole) - 2),
    }[damage]
    assert broken != whole
    file.write_bytes(broken)
    assert np.array_equal(answer(model)[0], expected)
    assert file.read_bytes() == whole and len(list(cache.iterdir())) == 1


def test_other_weights_have_another_file(cache, model, tmp_path):
    expected, _ = answer(model)
    other = save_model(tmp_path / "other", tiny_network(seed=1))
    assert not np.array_equal(answer(other)[0], expected)
    assert len(list(cache.iterdir())) == 2
    changed = tmp_path / "flags"
    save_model(changed, tiny_network(num_head_channels=16))  # the same weights, another network
    assert not np.array_equal(answer(changed)[0], expected)
    assert len(list(cache.iterdir())) == 3


def test_flags_that_no_plan_depends_on_need_no_file_of_their_own(cache, model, tmp_path):
    expected, _ = answer(model)
    same = tmp_path / "same"
    other = {"noise_schedule": "cosine", "diffusion_steps": 500, "use_fp16": True, "dropout": 0.1}
    save_model(same, tiny_network(**other))
    assert np.array_equal(answer(same)[0], expected)
    assert len(list(cache.iterdir())) == 1


def test_every_flag_left_out_of_the_key_is_one():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields > packed_cache._OTHER_FLAGS


def test_it_can_be_switched_off_and_small_models_need_none(cache, model, monkeypatch):
    expected, _ = answer(model)
    for file in cache.iterdir():
        file.unlink()
    monkeypatch.setenv("ADM_RT_CACHE", "off")
    values, notes = answer(model)
    assert np.array_equal(values, expected) and notes == [] and not any(cache.iterdir())
    monkeypatch.setenv("ADM_RT_CACHE", str(cache))
    monkeypatch.undo()
    monkeypatch.setenv("ADM_RT_CACHE", str(cache))
    values, notes = answer(model)
    assert np.array_equal(values, expected) and notes == [] and not any(cache.iterdir())


def test_the_least_recently_used_make_room(cache, tmp_path, monkeypatch):
    models = [save_model(tmp_path / str(i), tiny_network(seed=i)) for i in range(4)]
    files = []
    for age, model in zip((30, 20, 10), models, strict=False):
        answer(model)
        (new,) = set(cache.iterdir()) - set(files)
        os.utime(new, (time.time() - age,) * 2)
        files.append(new)
    size = files[0].stat().st_size
    answer(models[0])  # used again: the second is the oldest now
    abandoned = cache / ".left.tmp"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (1, 1))
    monkeypatch.setenv("ADM_RT_CACHE_GB", str(3.5 * size / 1e9))
    assert "ADM_RT_CACHE_GB" in answer(models[3])[1][0]
    left = set(cache.iterdir())
    assert len(left) == 3 and {files[0], files[2]} < left and abandoned not in left
    report = packed_cache.cache_report()
    assert report["files"] == 3 and report["folder"] == str(cache)
    monkeypatch.setenv("ADM_RT_CACHE_GB", "0")
    answer(models[0])  # what is there is used
    assert set(cache.iterdir()) == left
    values, notes = answer(models[1])
    assert np.isfinite(values).all() and "not kept" in notes[0] and set(cache.iterdir()) == left
    monkeypatch.setenv("ADM_RT_CACHE_GB", "lots")
    with pytest.raises(ValueError, match="ADM_RT_CACHE_GB='lots': give gigabytes"):
        answer(models[0])
    monkeypatch.setenv("ADM_RT_CACHE", "off")
    assert packed_cache.cache_report()["folder"] is None


def test_a_cache_that_cannot_be_written_is_a_note(cache, model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADM_RT_CACHE", str(tmp_path / "file" / "below"))
    values, notes = answer(model)
    assert np.isfinite(values).all() and len(notes) == 1 and "could not be kept" in notes[0]


def test_a_failed_write_leaves_nothing(cache, model, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    values, notes = answer(model)
    assert np.isfinite(values).all() and "No space left" in notes[0]
    assert list(cache.iterdir()) == []


def test_damaged_raw_weights_are_not_packed(cache, model):
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        answer(model)
    assert not cache.exists()


def test_the_default_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("ADM_RT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packed_cache.cache_folder() == tmp_path / "adm_rt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packed_cache.cache_folder() == tmp_path / ".cache" / "adm_rt"
    monkeypatch.setenv("ADM_RT_CACHE", "off")
    assert packed_cache.cache_folder() is None


def test_module_and_folder_give_the_same_bits(model):
    from adm_rt.models import load_checkpoint

    x, y, _ = inputs_of(load_weights(model).cfg)
    module = engines.create("native", load_checkpoint(model))
    assert np.array_equal(module.denoise(x, 12.5, y), answer(model)[0])
    native_to_torch = engines.create("torch", load_weights(model))
    import torch

    theirs = native_to_torch.denoise(torch.from_numpy(x), 12.5, torch.from_numpy(y)).numpy()
    assert np.abs(theirs - answer(model)[0]).max() < 1e-4


def test_a_file_is_read_whole_or_refused(tmp_path):
    """More than one thread's share of it, from an odd place."""
    bytes_ = np.random.default_rng(0).integers(0, 256, 20_000_003, np.uint8)
    file = tmp_path / "blob"
    file.write_bytes(bytes_.tobytes())
    blob = _C.PackedWeights(str(file), 4096, 19_995_904)
    assert np.array_equal(np.frombuffer(blob, np.uint8), bytes_[4096:20_000_000])
    file.write_bytes(b"")  # who has read it keeps it
    assert np.array_equal(np.frombuffer(blob, np.uint8), bytes_[4096:20_000_000])
    with pytest.raises(RuntimeError, match="blob is truncated"):
        _C.PackedWeights(str(file), 4096, 8)
    with pytest.raises(RuntimeError, match="cannot open .*absent: No such file"):
        _C.PackedWeights(str(tmp_path / "absent"), 0, 8)
