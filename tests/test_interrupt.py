"""Ctrl-C: within a step, one clear line, exit code 130, no file."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from adm_rt.errors import SamplingInterrupted

TIMEOUT = 120


@pytest.fixture
def start():
    """Starts ``adm-rt`` (or a program with its arguments); ends what is left of it afterwards."""
    processes = []

    def start(arguments, place, program=None):
        command = [sys.executable, "-m", "adm_rt", *arguments]
        if program is not None:
            command = [sys.executable, "-c", program, *arguments]
        process = subprocess.Popen(
            command,
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(process, pattern):
    """Read stderr until ``pattern`` appears."""
    text, deadline = b"", time.monotonic() + TIMEOUT
    while not re.search(pattern, text):
        assert time.monotonic() < deadline, text[-300:].decode()
        read = os.read(process.stderr.fileno(), 4096)
        assert read, text[-300:].decode()
        text += read


def interrupt(process):
    """SIGINT; returns (exit code, stderr, seconds until it was gone)."""
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, err.decode(), time.monotonic() - began


@pytest.mark.parametrize("output", [[], ["-o", "folder"]])
def test_during_sampling(start, tiny_folder, tmp_path, output):
    arguments = ["sample", "--model", str(tiny_folder), "-n", "8", "--steps", "1000"]
    process = start([*arguments, "--batch-size", "2", *output], tmp_path)
    wait_for(process, rb" [1-9]\d*/4000 ")
    code, err, seconds = interrupt(process)
    assert code == 130
    last = err.strip().splitlines()[-1]
    assert last.startswith("adm-rt: interrupted during sampling, step ")
    assert "of 1000, images 0..1 of 8; nothing was written" in last
    assert "Traceback" not in err
    assert seconds < 20
    assert os.listdir(tmp_path) == []


def test_while_a_file_is_written(start, tiny_folder, tmp_path):
    program = (
        "import os, sys, signal, time\n"
        "real = os.fsync\n"
        "def fsync(fd):\n"
        "    print('WRITING', file=sys.stderr, flush=True); time.sleep(60)\n"
        "os.fsync = fsync\n"
        "from adm_rt.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["sample", "--model", str(tiny_folder), "-n", "2", "--steps", "1", "-o", "x.npz"]
    process = start(arguments, tmp_path, program)
    wait_for(process, b"WRITING")
    assert len(os.listdir(tmp_path)) == 1  # the temporary file
    code, err, _ = interrupt(process)
    assert code == 130 and "adm-rt: interrupted" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_in_python_it_is_a_keyboard_interrupt(tiny_pipeline):
    def press(step, total, t, x0):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return True

    with pytest.raises(SamplingInterrupted, match="interrupted during sampling, step [345] of"):
        tiny_pipeline(2, steps=50, callback=press, progress=False)
    assert issubclass(SamplingInterrupted, KeyboardInterrupt)
