"""Runs in forked processes: ``python forked_runs.py <scenario> <folder>``.

Imports are the cost of a tiny run, so this process imports everything and forks each run. It must
itself never do a backward pass: torch refuses autograd in the child of a process that has.
"""

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import all_tensors, tiny_trainer  # noqa: E402

from adm_rt.errors import CheckpointError, ProcessLostError  # noqa: E402
from adm_rt.training import distributed, shards  # noqa: E402

PATIENCE = int(os.environ.get("PATIENCE", 400))  # seconds for a process
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Lost(Exception):
    """Exit code 3."""


def say(text):
    """Print a line whole: unbuffered, print() writes its end apart, and lines of processes mix."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def fork(run, *args):
    """Start ``run(*args)`` in a child; returns its pid. Exit code 1 for any error but ``Lost``."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    faulthandler.dump_traceback_later(PATIENCE - 20)  # where one that hangs does so
    try:
        run(*args)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        code = 3 if isinstance(error, Lost) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids):
    """Exit codes of the children (-9: killed); those still there after PATIENCE are killed."""
    codes, end = {}, time.monotonic() + PATIENCE
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        if time.monotonic() > end:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = "hung"
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def ranks(world_size, run, *args):
    """Fork ``run(*args)`` once per rank with the environment that torchrun would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def as_rank(rank):
        values = (rank, world_size, rank, "127.0.0.1", port)
        os.environ.update(dict(zip(ENVIRONMENT, map(str, values))))
        run(*args)

    return [fork(as_rank, rank) for rank in range(world_size)]


# ---- twenty kills ----

KILLS, STEPS = 20, 40
KILLED_RUN = {
    "iterations": STEPS,
    "save_interval": 2,
    "keep": 2,
    "ema_rate": "0.99,0.9",
    "schedule_sampler": "loss-second-moment",
    "cooldown_steps": 10,
}


def killed_run(out, pipe=None, deadly_call=None):
    """One life of the run: tells ``pipe`` each step, and dies inside a checkpoint if asked to.

    deadly_call: (name of a function of os, how many calls of it to survive).
    """
    if deadly_call:
        name, left = deadly_call
        original = getattr(os, name)

        def deadly(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, deadly)

    def tell(step, values):
        if pipe is not None:
            os.write(pipe, b".")

    # two timesteps, so that both have their ten losses and the sampler's memory matters
    trainer = tiny_trainer(out, timesteps=2, model={"dropout": 0.1}, callback=tell, **KILLED_RUN)
    trainer.run()
    save_file(all_tensors(trainer), Path(out) / "result.safetensors")


def kills(folder):
    """KILLS SIGKILLs over one run, the rest of it, and an uninterrupted run beside it."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    draw = random.Random(seed)
    print(f"KILL_SEED={seed}")
    out = folder / "killed"
    inside = 0
    for kill in range(KILLS):
        reading, writing = os.pipe()
        deadly_call = None
        newest = max((int(path.name[5:]) for path in out.glob("step_*")), default=0)
        # In the middle of a checkpoint, after some fsync or before a rename; near the end of the
        # run all are, so that no life survives.
        if kill % 3 == 2 or newest > STEPS - 14:
            # A write syncs three files and two folders; one life writes at least once.
            deadly_call = ("fsync", draw.randrange(5)) if draw.random() < 0.7 else ("rename", 0)
        pid = fork(killed_run, out, writing, deadly_call)
        os.close(writing)
        if not deadly_call:
            for _ in range(draw.randrange(1, 8)):
                if not os.read(reading, 1):
                    break
            time.sleep(draw.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
        [code] = wait([pid])
        os.close(reading)
        if code != -signal.SIGKILL:
            raise SystemExit(f"life {kill} ended with {code}, not by SIGKILL")
        inside += any(out.glob(".step_*"))
    steps = sorted(path.name for path in out.glob("step_*"))
    print(f"{KILLS} kills, {inside} during a write, then at {steps[-1:]}")
    assert wait([fork(killed_run, out)]) == [0]
    assert wait([fork(killed_run, folder / "whole")]) == [0]
    leftovers = [path.name for path in out.glob(".step_*")]
    print(json.dumps({"inside": inside, "leftovers": leftovers}))


# ---- one process and several ----

SHARED_RUN = {
    "iterations": 20,
    "save_interval": 10,
    "batch_size": 5,  # shares of 2 and 3; and update 19 has one image: shares of 0 and 1
    "lr": 1e-3,
    "ema_rate": "0.9,0.5",
    "grad_clip": 0.5,
    "schedule_sampler": "loss-second-moment",
}


def shared_run(out, changes):
    """The run of this rank; rank 0 also leaves what each update saw in ``rows.json``."""
    trainer = tiny_trainer(out, short=(19, 1), timesteps=2, **(SHARED_RUN | changes))
    trainer.run()
    if trainer.processes.is_main:
        rows = [[s, v["t"].tolist(), v["loss"].tolist()] for s, v, _ in trainer.monitor.rows]
        (Path(out) / "rows.json").write_text(json.dumps(rows))


def half_of(run, name):
    """A folder ``name`` with the checkpoint that ``run`` wrote half-way."""
    half = run.with_name(name)
    shutil.copytree(run / "step_0000010", half / "step_0000010")
    return half


def parity(folder):
    """The same run by 1 process, 2, 3, 2 with microbatches; 2, continued; and with shards: 1
    continued by 2, 2 continued by 3, 2 continued by 1."""
    shards.supported()  # imports what the children would import one by one
    one, two = folder / "one", folder / "two"
    codes = wait([fork(shared_run, one, {})])
    codes += wait(ranks(2, shared_run, two, {}))
    codes += wait(ranks(3, shared_run, folder / "three", {}))
    codes += wait(ranks(2, shared_run, folder / "microbatches", {"microbatch": 2}))
    codes += wait(ranks(2, shared_run, half_of(two, "stopped"), {}))
    if distributed.can_shard(torch.device("cpu")):
        sharded = {"parallel": "fsdp"}
        codes += wait(ranks(2, shared_run, half_of(one, "one_then_shards"), sharded))
        codes += wait(ranks(2, shared_run, folder / "shards", {"iterations": 10, **sharded}))
        then_one = half_of(folder / "shards", "shards_then_one")
        codes += wait(ranks(3, shared_run, folder / "shards", sharded))
        codes += wait([fork(shared_run, then_one, {})])
    print(json.dumps(codes))


# ---- a process that dies, and one that hangs ----


def lost_run(out, misfortune, timeout=600, at=4):
    """Rank 1 meets its ``misfortune`` before update ``at``, or, when that is None, once it has
    joined the others; what the others say is printed. Exit code 3 for a lost process."""
    unlucky = os.environ["RANK"] == "1"
    try:
        distributed.start("cpu", timeout)  # the trainer finds the group made
        if unlucky and at is None:
            misfortune()
        trainer = tiny_trainer(out, iterations=1000, save_interval=3)
        batch = trainer.task.batch

        def share(step, *of):
            if step == at and unlucky:
                misfortune()
            return batch(step, *of)

        trainer.task.batch = share
        trainer.run()
    except ProcessLostError as error:
        say(f"rank {os.environ['RANK']}: {error}")
        raise Lost from error


def full_run(out):
    """A sharded run in which rank 1 cannot write files as large as its shards."""
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit))
    try:
        tiny_trainer(out, iterations=3, parallel="fsdp").run()
    except CheckpointError as error:
        say(f"rank {os.environ['RANK']}: {error}")
        raise Lost from error


def lost(folder):
    """What is left of three processes when one is killed, of two when one hangs, and of two when
    one cannot write."""

    def die():
        (folder / "died").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    can_write_shards = shards.supported()  # which imports what the children need
    # Time enough for both to join and to make four updates on a busy machine; and meanwhile:
    pids = ranks(2, lost_run, folder / "hanging", lambda: time.sleep(1000), 25)
    killed = wait(ranks(3, lost_run, folder / "killed", die))
    seconds = time.monotonic() - float((folder / "died").read_text())
    early = wait(ranks(2, lost_run, folder / "early", die, 600, None))
    full = wait(ranks(2, full_run, folder / "full")) if can_write_shards else []
    hanging = wait(pids[:1])
    os.kill(pids[1], signal.SIGKILL)
    wait(pids[1:])
    report = {"killed": killed, "early": early, "hanging": hanging, "full": full}
    print(json.dumps({**report, "seconds": seconds}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny_trainer(sys.argv[2])  # imports what is imported on first use, most of all the optimiser
    globals()[sys.argv[1]](Path(sys.argv[2]))
