"""Hostile and damaged .pt files: nothing in them runs, and only CheckpointError comes out."""

import io
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from adm_rt.errors import CheckpointError
from adm_rt.models import ModelConfig, build
from adm_rt.models.checkpoint import convert, load_checkpoint


class Call:
    """Pickles to a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class State:
    """Calls exec when its state is set."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return dict, (), None, None, iter([("a", Call(exec, self.code))])


def bare(protocol):
    return lambda value: pickle.dumps(value, protocol)


def saved(new_zip=True):
    def dump(value):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=new_zip)
        return buffer.getvalue()

    return dump


def compressed(value):
    """A zip like torch's, but deflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved()(value))) as source:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
            for entry in source.infolist():
                target.writestr(entry.filename, source.read(entry))
    return buffer.getvalue()


WRAP = {
    "alone": lambda bad: bad,
    "value": lambda bad: {"input_blocks.0.0.weight": torch.zeros(1), "x": bad},
    "key": lambda bad: {(bad, 1): 2},
    "nested": lambda bad: {"a": [({"b": bad},)]},
    "items": lambda bad: State("raise SystemExit"),
}
DUMP = {
    "zip": saved(),
    "legacy": saved(False),
    "deflated": compressed,
    "pickle0": bare(0),
    "pickle2": bare(2),
    "pickle5": bare(5),
}


@pytest.mark.parametrize("wrap", WRAP)
@pytest.mark.parametrize("dump", DUMP)
@pytest.mark.parametrize("forced", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, wrap, dump, forced):
    if forced:  # the environment must not switch the check off
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()"
    for function in (exec, eval, os.system):
        argument = f"touch {marker}" if function is os.system else code
        value = WRAP[wrap](Call(function, argument))
        if wrap == "items":
            value = State(code)
        path = tmp_path / "model.pt"
        path.write_bytes(DUMP[dump](value))
        for action in (load_checkpoint, lambda p: convert(p, tmp_path / "out")):
            with pytest.raises(CheckpointError) as error:
                action(path)
            assert str(path) in str(error.value)
            assert "weights_only" not in str(error.value)
        assert sorted(os.listdir(tmp_path)) == ["model.pt"]


def test_the_same_file_runs_its_code_when_loaded_carelessly(tmp_path):
    """The test above would notice: without weights_only the marker appears."""
    marker = tmp_path / "executed"
    path = tmp_path / "model.pt"
    path.write_bytes(saved()({"x": Call(exec, f"open({str(marker)!r}, 'w').close()")}))
    code = f"import torch; torch.load({str(path)!r}, weights_only=False)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert marker.exists()


def test_a_refused_file_says_what_it_would_call(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(saved()({"x": Call(os.system, "true")}))
    with pytest.raises(CheckpointError, match=r"would call 'posix.system'.*nothing in it was run"):
        load_checkpoint(path)


NOT_WEIGHTS = {
    "empty": (b"", "no readable"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "no readable"),
    "html": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "zeros": (bytes(10000), "no readable"),
    "zip": (None, "no readable|compressed"),
    "list": (saved()([torch.zeros(3)]), "holds a list"),
    "none": (saved()(None), "holds a NoneType"),
    "nothing": (saved()({}), "holds a dict"),
    "number": (saved()({"a": 3}), "'a' is a int, not a tensor"),
    "nested": (saved()({"model": {"a": torch.zeros(2)}, "step": 3}), "state_dicts inside"),
    "integers": (saved()({"a": torch.zeros(3, dtype=torch.int64)}), "torch.int64"),
    "sparse": (saved()({"a": torch.eye(3).to_sparse()}), "sparse"),
    "other": (saved()({"a": torch.zeros(3)}), "not the weights of an ADM model"),
}


@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_files_that_are_no_weights(tmp_path, case):
    data, words = NOT_WEIGHTS[case]
    path = tmp_path / "model.pt"
    if data is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no weights")
    else:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing.pt")


def test_views_that_claim_more_than_the_file_holds(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(CheckpointError, match="damaged: 4398046511104 bytes of weights"):
        load_checkpoint(path)


def test_damaged_pt_raises_nothing_else(tmp_path):
    """A .pt has no checksum over its payload, so a flip there may pass; nothing may crash."""
    seed = 99
    print(f"seed {seed}")
    rng = random.Random(seed)
    cfg = ModelConfig.classifier(
        16, 32, 1, "8", num_classes=3, num_head_channels=32, channel_mult="1,1"
    )
    path = tmp_path / "model.pt"
    torch.save(build(cfg).state_dict(), path)
    data = path.read_bytes()
    flags = {"num_head_channels": 32}
    assert load_checkpoint(path, **flags).cfg == cfg
    pickle_end = data.index(b"data/0")  # the pickle stands before the first weight
    refused = 0
    for index in range(120):
        damaged = bytearray(data)
        if index % 3 == 0:
            damaged = damaged[: rng.randrange(len(data))]
        else:
            bit = rng.randrange(8 * (pickle_end if index % 3 == 1 else len(data)))
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            module = load_checkpoint(path, **flags)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert all(np.isfinite(p.detach().numpy()).all() for p in module.parameters())
    assert refused >= 40  # every truncation at the least
