"""Several processes make the run of one, and the death of one ends all with a message."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import assert_same_bits, tiny_trainer

from adm_rt.training import distributed, shards, trainer
from adm_rt.training.checkpoints import Checkpoints

SCRIPT = Path(__file__).with_name("forked_runs.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def scenario(name, folder):
    """What the scenario ``name`` of forked_runs.py said: stdout, its last line as JSON, stderr."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the runs of ``forked_runs.parity``: 20 updates, the last one of a single image."""
    for _ in range(2):
        folder = tmp_path_factory.mktemp("parity")
        _, codes, errors = scenario("parity", folder)
        # Seen once in many runs, cause unknown: one of the forked processes never ends. Processes
        # that torchrun starts are not forked. Twice in a row is an error.
        if "hung" not in codes:
            break
    assert set(codes) == {0}, errors
    return folder


def state(folder):
    """All tensors of the last checkpoint, whole."""
    path = folder / "step_0000020"
    if (path / "state.safetensors").exists():
        return load_file(path / "state.safetensors")
    tensors = {n: torch.zeros_like(t) for n, t in state(folder.with_name("one")).items()}
    assert shards.shapes(path) == {name: tuple(t.shape) for name, t in tensors.items()}
    shards.read(path, tensors, together=False)
    return tensors


no_fsdp = pytest.mark.skipif(
    not distributed.can_shard(torch.device("cpu")),
    reason=f"FSDP2 of torch {torch.__version__} does not run on the CPU",
)
no_shards = pytest.mark.skipif(
    not shards.supported(), reason=f"torch {torch.__version__} writes no shards as safetensors"
)
SHARDED = ("one_then_shards", "shards", "shards_then_one")


@pytest.mark.parametrize(
    "name",
    ["two", "three", "microbatches", *(pytest.param(name, marks=no_fsdp) for name in SHARDED)],
)
def test_processes_and_microbatches_make_the_run_of_one_process(runs, name):
    one, other = state(runs / "one"), state(runs / name)
    assert one.keys() == other.keys()
    for key in (key for key in one if key.startswith(("model.", "ema."))):
        tensor = one[key]
        difference = (other[key].double() - tensor.double()).norm()
        assert difference <= 1e-5 * tensor.double().norm(), key
    expected, seen = (json.loads((runs / n / "rows.json").read_text()) for n in ("one", name))
    if name in SHARDED:
        expected = expected[10:]  # continued by another number of processes
    for (step, t, loss), (other_step, other_t, other_loss) in zip(expected, seen, strict=True):
        assert (step, t) == (other_step, other_t)  # in the order of the global batch
        assert other_loss == pytest.approx(loss, rel=1e-4)
    assert len(seen[-1][1]) == 1


@no_fsdp
@no_shards
def test_each_process_writes_its_own_shards(runs):
    found = {p.name for p in (runs / "shards" / "step_0000020").iterdir()}
    tensors = sorted(name for name in found if name.endswith(".safetensors"))
    assert len(tensors) == 3 and all(name.startswith("shard-0000") for name in tensors)
    assert found - set(tensors) == {"state.json", "manifest.json"}
    assert (runs / "shards_then_one" / "step_0000020" / "state.safetensors").exists()


@no_fsdp
@no_shards
def test_a_damaged_shard_is_found(runs, tmp_path):
    shutil.copytree(runs / "shards", tmp_path / "run")
    path = max((tmp_path / "run" / "step_0000020").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    told = []
    found, facts = Checkpoints(tmp_path / "run", 2).newest(told.append)
    assert found.name == "step_0000010" and facts["step"] == 10
    assert len(told) == 1 and f"{path.name} is not as it was written" in told[0]


def test_a_stopped_run_of_two_processes_continues_bit_for_bit(runs):
    assert_same_bits(state(runs / "two"), state(runs / "stopped"))


def test_a_dead_or_silent_process_ends_the_run_with_a_message(tmp_path):
    text, report, errors = scenario("lost", tmp_path)
    assert report["killed"] == [3, -9, 3], errors
    assert report["early"] == [3, -9], errors
    assert report["hanging"] == [3], errors
    assert report["seconds"] < 60
    lines = [line for line in text.splitlines() if "another process of the run is gone" in line]
    early = [line for line in lines if "at the start" in line]
    assert len(lines) == 4 and len(early) == 1, text + errors
    for line in set(lines) - set(early):
        assert "at step 4" in line and "step_0000003" in line, line
    if shards.supported():
        assert report["full"] == [3, 3], errors
        lines = [line for line in text.splitlines() if "cannot write" in line]
        assert len(lines) == 2 and all("step_0000003: File too large" in line for line in lines)
        assert not list((tmp_path / "full").glob(".step_*"))


def test_a_signal_after_an_error_leaves_time_for_the_message(tmp_path, monkeypatch):
    """torchrun sends SIGTERM to the others at once, and by default it ends them without a word."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(time.monotonic()))
    own = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer, "_LAST_WORDS", 0.3)
    one = tiny_trainer(tmp_path)
    try:
        for world_size in (1, 2):
            one.processes = distributed.Processes(0, world_size, torch.device("cpu"))
            with pytest.raises(RuntimeError), one._signals():
                raise RuntimeError("Connection closed by peer")
            began = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
            while not seen:
                time.sleep(0.01)
            assert (seen.pop() - began > 0.25) is (world_size > 1)
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
    ids=str,
)
def test_an_environment_that_cannot_be_is_named(monkeypatch, variables, named):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        distributed.start("cpu")


def test_the_group_has_the_time_out_that_was_given(monkeypatch):
    given = {}
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: given.update(k))
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("MASTER_ADDR", "x"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    processes = distributed.start("cpu", timeout=7.5)
    assert (processes.rank, processes.world_size) == (1, 2)
    assert given["timeout"].total_seconds() == 7.5 and given["rank"] == 1


def test_a_torch_that_cannot_shard_is_named(monkeypatch):
    monkeypatch.delattr("torch.cpu.Stream.record_event", raising=False)
    with pytest.raises(ValueError, match="parallel='fsdp': torch .* cannot shard on the CPU"):
        distributed.shard(None, distributed.Processes(0, 2, torch.device("cpu")))


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda'"):
        distributed.start("cuda")
    assert distributed.start("auto").device.type == "cpu"


def test_a_gpu_without_our_kernels_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(distributed, "why_no_cuda_kernels", lambda: "nvcc was not found")
    assert distributed._device("auto", 1).type == "cpu"
    assert "the CPU is used" in capsys.readouterr().err
    assert distributed._device("cuda", 1).type == "cuda"


@pytest.mark.parametrize(
    ("local_rank", "count", "index"), [("3", 4, 3), ("3", 1, 0), ("4", 4, None)]
)
def test_the_device_is_the_local_ranks(monkeypatch, local_rank, count, index):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr(distributed, "why_no_cuda_kernels", lambda: "")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    if index is None:
        with pytest.raises(ValueError, match="LOCAL_RANK=4"):
            distributed._device("auto", 8)
    else:
        assert distributed._device("auto", 8).index == index
