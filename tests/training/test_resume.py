"""What a checkpoint promises: whole or not there, verified, continued by the same run only."""

import errno
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import all_tensors, assert_same_bits, poisoned, tiny_trainer

from adm_rt.errors import CheckpointError
from adm_rt.training import checkpoints

EVERYTHING = {
    "ema_rate": "0.9,0.5",
    "schedule_sampler": "loss-second-moment",
    "precision": "fp16",
    "microbatch": 3,
    "grad_clip": 0.5,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of six updates with checkpoints of 3 and 6: copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    tiny_trainer(out).run()
    return out


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_every_part_of_the_state_is_continued(tmp_path):
    options = {"timesteps": 2, "batch_size": 8, "model": {"dropout": 0.1}, **EVERYTHING}
    whole = tiny_trainer(tmp_path / "whole", iterations=14, **options)
    whole.run()
    for stop in (3, 12):
        part = tiny_trainer(tmp_path / "parts", iterations=14, **options)
        part.callback = lambda step, values, stop=stop: step < stop
        part.run()
        assert part.step == stop
    part = tiny_trainer(tmp_path / "parts", iterations=14, **options)
    part.run()
    assert_same_bits(all_tensors(whole), all_tensors(part))
    assert whole.skipped == part.skipped > 0  # the first fp16 scale is too high: it overflows
    assert whole.loss_scale == part.loss_scale
    states = [
        load_file(tmp_path / n / "step_0000014/state.safetensors") for n in ("whole", "parts")
    ]
    assert_same_bits(*states)
    assert int(states[0]["schedule_sampler.counts"].min()) == 10


def test_a_skipped_first_update_is_continued_too(tmp_path):
    for iterations in (1, 4):
        trainer = tiny_trainer(tmp_path / "parts", iterations=iterations)
        with poisoned(trainer, lambda step: step == 0):
            trainer.run()
    whole = tiny_trainer(tmp_path / "whole", iterations=4)
    with poisoned(whole, lambda step: step == 0):
        whole.run()
    assert trainer.skipped == whole.skipped == 1
    assert_same_bits(all_tensors(whole), all_tensors(trainer))


def test_what_is_kept_is_the_whole_configuration(run_folder):
    facts = json.loads((run_folder / "step_0000006" / "state.json").read_text())
    assert facts["config"]["train"]["lr"] == 1e-2
    assert facts["config"]["model"]["num_channels"] == 4
    assert facts["config"]["task"]["type"] == "DiffusionTask"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.5}, "lr is 0.5, was 0.01"),
        ({"model": {"dropout": 0.5}}, "model.dropout is 0.5, was 0.0"),
        ({"seed": 3, "grad_clip": 1.0}, "grad_clip is 1.0, was 0.0; seed is 3, was 0"),
    ],
    ids=["lr", "model", "two"],
)
def test_another_configuration_is_refused_by_name(run_folder, changes, named):
    with pytest.raises(CheckpointError, match=named):
        tiny_trainer(run_folder, iterations=9, **changes).run()
    names = sorted(path.name for path in run_folder.glob("step_*"))
    assert names == ["step_0000003", "step_0000006"]


def test_some_fields_may_change_and_others_on_request(run_folder):
    free = {"save_interval": 2, "log_interval": 7, "keep": 3, "sample_interval": 4}
    trainer = tiny_trainer(run_folder, iterations=9, lr=0.5, allow_changes="lr", **free)
    trainer.run()
    assert trainer.step == 9
    kept = sorted(path.name for path in run_folder.glob("step_*"))
    assert kept == ["step_0000006", "step_0000008", "step_0000009"]
    assert [step for step, _ in trainer.monitor.networks] == [8, 9]


def test_fewer_iterations_than_done_are_refused(run_folder):
    with pytest.raises(CheckpointError, match="at step 6, beyond iterations=4"):
        tiny_trainer(run_folder, iterations=4).run()


def _truncate(folder):
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _flip(folder):
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.safetensors").write_bytes(data)


DAMAGES = {
    "truncated": (_truncate, "state.safetensors has"),
    "one bit": (_flip, "state.safetensors is not as it was written"),
    "no tensors": (
        lambda f: (f / "state.safetensors").unlink(),
        "state.safetensors cannot be read",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "bad manifest": (lambda f: (f / "manifest.json").write_text("[]"), ".*not what was written"),
    "other facts": (lambda f: (f / "state.json").write_text('{"step": 5}'), "state.json has"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    run_folder, finished, name
):
    damage, words = DAMAGES[name]
    damage(run_folder / "step_0000006")
    seen = []
    with pytest.warns(UserWarning, match=f"step_0000006 is damaged and is not used: {words}"):
        trainer = tiny_trainer(run_folder, callback=lambda step, _: seen.append(step))
        trainer.run()
    assert seen == [4, 5, 6]
    states = [load_file(f / "step_0000006" / "state.safetensors") for f in (run_folder, finished)]
    assert_same_bits(*states)  # the damaged one was replaced


def test_only_damaged_checkpoints_are_an_error(run_folder):
    for path in run_folder.glob("step_*"):
        _flip(path)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="anew"):
        tiny_trainer(run_folder).run()


def test_a_checkpoint_of_an_older_format_is_refused_as_such(run_folder):
    newest = run_folder / "step_0000006"
    (newest / "manifest.json").unlink()
    (newest / "state.json").write_text('{"step": 6}')
    with pytest.raises(CheckpointError, match="format_version None"):
        tiny_trainer(run_folder).run()


def test_what_killed_runs_left_is_cleared_and_nothing_else(run_folder):
    (run_folder / ".step_0000009.4711").mkdir()
    (run_folder / ".step_0000006.12.old").mkdir()
    (run_folder / ".step_notes").mkdir()
    tiny_trainer(run_folder).run()
    assert sorted(path.name for path in run_folder.glob(".step_*")) == [".step_notes"]


class _FullDisk:
    """``os.fsync`` of a disk that is full from the given call on."""

    def __init__(self, calls):
        self.left = calls
        self.fsync = os.fsync

    def __call__(self, handle):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(handle)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_full_disk_is_an_error_and_earlier_checkpoints_stay(run_folder, monkeypatch, calls):
    before = {path: path.read_bytes() for path in run_folder.glob("step_*/*")}
    monkeypatch.setattr(checkpoints.os, "fsync", _FullDisk(calls))
    with pytest.raises(CheckpointError) as caught:
        tiny_trainer(run_folder, iterations=9).run()
    for word in ("step_0000009", "No space left", "step_0000006, step_0000003", "make room"):
        assert word in str(caught.value)
    assert {path: path.read_bytes() for path in run_folder.glob("step_*/*")} == before
    assert not list(run_folder.glob(".step_*"))
    monkeypatch.undo()
    assert tiny_trainer(run_folder, iterations=9).run()


@pytest.mark.parametrize("where", ["start", "record", "evaluate", "close"])
def test_a_disk_too_full_for_the_log_is_the_same_error(run_folder, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = tiny_trainer(run_folder, iterations=9, sample_interval=8)
    setattr(trainer.monitor, where, full)
    with pytest.raises(CheckpointError, match="cannot write the log in .*No space left.*step_000"):
        trainer.run()
    tiny_trainer(run_folder, iterations=9).run()


def test_a_log_that_cannot_be_closed_hides_no_other_error(run_folder):
    def full(plot):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = tiny_trainer(run_folder, iterations=9, callback=lambda step, values: 1 / 0)
    trainer.monitor.close = full
    with pytest.raises(ZeroDivisionError):
        trainer.run()


def test_writes_that_the_system_cuts_short_are_the_same_error(run_folder):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer = tiny_trainer(run_folder, iterations=9)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))  # bytes of a file
        with pytest.raises(CheckpointError, match="cannot write .*step_0000009"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(run_folder.glob(".step_*"))


def test_two_runs_do_not_share_a_folder(run_folder):
    with checkpoints.Checkpoints(run_folder, 2).hold():
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}.*choose another out"):
            tiny_trainer(run_folder, iterations=9).run()
    tiny_trainer(run_folder, iterations=9).run()


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_update_and_saves(tmp_path, finished, number, end):
    def send(step, values):
        if step == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    trainer = tiny_trainer(tmp_path, callback=send)
    with pytest.raises(end):
        trainer.run()
    assert signal.getsignal(number) is before
    assert trainer.step == 4 and (tmp_path / "step_0000004").is_dir()
    trainer = tiny_trainer(tmp_path)
    trainer.run()
    assert_same_bits(
        load_file(finished / "step_0000006" / "state.safetensors"),
        load_file(tmp_path / "step_0000006" / "state.safetensors"),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cuts_an_evaluation_short(tmp_path, finished, number):
    seen = []

    def look(step, network):
        seen.append(step)
        os.kill(os.getpid(), number)
        time.sleep(60)

    trainer = tiny_trainer(tmp_path, sample_interval=2)
    trainer.monitor.evaluate = look
    began = time.monotonic()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.run()
    assert time.monotonic() - began < 50
    # The loss plot is for people, not for a scheduler that has lost patience.
    assert seen == [2] and trainer.monitor.plotted is (number == signal.SIGINT)
    assert (tmp_path / "step_0000002").is_dir()
    tiny_trainer(tmp_path, sample_interval=2).run()
    assert_same_bits(
        load_file(finished / "step_0000006" / "state.safetensors"),
        load_file(tmp_path / "step_0000006" / "state.safetensors"),
    )


def test_training_leaves_torchs_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    tiny_trainer(tmp_path).run()
    assert torch.equal(before, torch.random.get_rng_state())
