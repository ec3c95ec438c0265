"""Twenty SIGKILLs over one run, some in the middle of a checkpoint, and not one bit differs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from tiny_training import assert_same_bits


def test_a_run_killed_twenty_times_ends_in_the_same_bits(tmp_path):
    script = Path(__file__).with_name("forked_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), "kills", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["inside"] >= 3, done.stdout  # kills that left a half-written checkpoint
    assert report["leftovers"] == []  # and the next life cleared it away
    killed, whole = (load_file(tmp_path / n / "result.safetensors") for n in ("killed", "whole"))
    assert_same_bits(killed, whole)
    states = [
        load_file(tmp_path / n / "step_0000040/state.safetensors") for n in (*("killed",), "whole")
    ]
    assert_same_bits(*states)
    assert int(states[0]["schedule_sampler.counts"].min()) == 10  # the sampler's history mattered
