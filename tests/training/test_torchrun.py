"""``adm-rt train`` under torchrun, whole: two processes train and one of them prints and writes."""

import json
import os
import subprocess
import sys

from adm_rt import models


def test_torchrun_trains_through_the_command(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "adm_rt", "train", "diffusion", "--out", str(tmp_path / "run")]
    command += ["--iterations=3", "--batch-size=3", "--image-size=8", "--num-channels=32"]
    command += ["--channel-mult=1,1", "--num-res-blocks=1", "--num-head-channels=32"]
    command += ["--attention-resolutions=4", "--device=cpu", "--ema-rate=0.9,0.5"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrote") == 1  # rank 0 alone prints
    assert models.load_model(tmp_path / "run" / "final").cfg.image_size == 8
    assert [p.name for p in (tmp_path / "run").glob("step_*")] == ["step_0000003"]
    facts = json.loads((tmp_path / "run" / "step_0000003" / "state.json").read_text())
    assert facts["processes"] == 2
