"""``make gpu`` where there is no GPU, and its bookkeeping with parts that need none."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_device(tmp_path, monkeypatch):
    """An nvidia-smi that knows one GPU."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 580.1, 143771 MiB'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def command(*arguments, path=None):
    environment = {**os.environ, "PATH": path} if path is not None else None
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_a_gpu_it_says_why_and_what_it_would_do(tmp_path):
    done = command(path=str(tmp_path))
    assert done.returncode == 3
    assert "no GPU: nvidia-smi is not on PATH" in done.stdout
    for words in ("setup.py", "tests/gpu", "compute-sanitizer", "bench_cuda_ops.py"):
        assert words in done.stdout
    assert "nothing was measured" in done.stderr
    dry = command("--dry-run", "--only", "tests", path=str(tmp_path))
    assert dry.returncode == 0 and "tests/gpu" in dry.stdout and "setup.py" not in dry.stdout


def test_make_gpu_is_this_command():
    done = subprocess.run(
        ["make", "-n", "gpu", "ONLY=build,ops", "DRY_RUN=1", "GPU_PYTHON=python3"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},  # we may be in make
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == "python3 benchmarks/gpu.py --only build,ops --dry-run".split()


def test_with_a_gpu_the_plan_names_its_architecture(fake_device):
    done = command("--dry-run", path=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    assert "NVIDIA H200, sm_90, driver 580.1" in done.stdout
    assert "ADM_RT_CUDA=on ADM_RT_CUDA_ARCHS=90" in done.stdout


def test_what_the_plan_runs_is_there(gpu):
    for part in gpu.PARTS:
        for word in part.command:
            word = word.removeprefix("--ignore=")
            if word.endswith(".py") or word.startswith("tests/"):
                assert (ROOT / word).exists(), word
    assert set(gpu.NEEDED) == {part.name for part in gpu.PARTS}
    # The whole has ten minutes; a part that takes longer than expected costs the last ones.
    assert all(part.seconds <= 240 for part in gpu.PARTS)


def test_a_wrong_part_is_named():
    done = command("--only", "tests,speed")
    assert done.returncode == 2 and "'speed' is unknown; allowed: build, tests" in done.stderr


@pytest.mark.parametrize("line", ["", "NVIDIA H200, 9.0", "No devices were found", "a, b, c, d"])
def test_what_is_no_device(gpu, line):
    with pytest.raises(ValueError, match="nvidia-smi printed"):
        gpu.parse_device(line)


def part(gpu, name, code, **more):
    return gpu.Part(name, "a part of the test", ("{python}", "-c", code, "{rows}"), 30, **more)


ROWS = "import json, sys; json.dump([dict(name='norm', sizes='1x2', ours_ms=1.0, baseline='eager',"
ROWS += " baseline_ms=2.0, ratio=2.0, rate=3.5, rate_unit='TB/s')], open(sys.argv[1], 'w'))"


def test_results_go_to_the_table_and_the_json(gpu, fake_device, monkeypatch, tmp_path, capfd):
    arch = "import os; assert os.environ['ARCH'] == '90'"
    parts = (
        part(gpu, "build", arch, environment={"ARCH": "{arch}"}),
        part(gpu, "tests", "raise SystemExit(4)"),
        part(gpu, "ops", ROWS, rows=True),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "NEEDED", {name: () for name in ("build", "tests", "ops")})
    file = tmp_path / "result.json"
    assert gpu.main(["--json", str(file)]) == 1
    content = json.loads(file.read_text())
    assert content["device"] == "NVIDIA H200" and content["driver"] == "580.1"
    assert {"commit", "torch_cuda_cudnn", "nvcc", "python", "date"} <= set(content)
    assert content["parts"]["build"]["status"] == "passed"
    assert content["parts"]["tests"]["status"] == "failed (exit status 4)"
    assert content["parts"]["ops"]["rows"][0]["ratio"] == 2.0
    out = capfd.readouterr().out
    assert "failed (exit status 4)" in out and "3.50 TB/s" in out


def test_parts_run_one_by_one_come_together(gpu, fake_device, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PARTS", (part(gpu, "tests", "pass"), part(gpu, "ops", "pass")))
    monkeypatch.setattr(gpu, "NEEDED", {"tests": (), "ops": ()})
    facts = {"device": "NVIDIA H200", "driver": "580.1", "commit": "abc"}
    monkeypatch.setattr(gpu, "facts", lambda device: dict(facts))
    file = tmp_path / "result.json"
    for only in ("tests", "ops"):
        assert gpu.main(["--only", only, "--json", str(file)]) == 0
    assert list(json.loads(file.read_text())["parts"]) == ["tests", "ops"]
    facts["commit"] = "def"  # what another commit measured does not count
    assert gpu.main(["--only", "ops", "--json", str(file)]) == 0
    assert list(json.loads(file.read_text())["parts"]) == ["ops"]


def test_after_a_failed_build_nothing_runs(gpu, fake_device, monkeypatch, tmp_path):
    parts = (part(gpu, "build", "raise SystemExit(1)"), part(gpu, "tests", "pass"))
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "NEEDED", {"build": (), "tests": ()})
    file = tmp_path / "result.json"
    assert gpu.main(["--json", str(file)]) == 1
    assert list(json.loads(file.read_text())["parts"]) == ["build"]


def test_a_part_past_its_limit_is_stopped_with_its_children(gpu, tmp_path):
    child = tmp_path / "child.py"
    child.write_text("import pathlib, sys, time; time.sleep(4); pathlib.Path(sys.argv[1]).touch()")
    late = tmp_path / "late"
    code = f"import subprocess as s, sys; s.run([sys.executable, {str(child)!r}, {str(late)!r}])"
    device = gpu.Device("GPU", "90", "1", "1 MiB")
    result = gpu.run_part(part(gpu, "tests", code), device, tmp_path, limit=1.5)
    assert result["status"].startswith("stopped after") and result["seconds"] < 30
    time.sleep(3)
    assert not late.exists()


def test_a_part_whose_packages_are_missing_is_named_and_left_out(
    gpu, fake_device, monkeypatch, tmp_path, capsys
):
    parts = (part(gpu, "tests", "pass"), part(gpu, "ops", "pass"))
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "NEEDED", {"tests": ("no_such_package_here",), "ops": ()})
    monkeypatch.setattr(gpu, "facts", lambda device: {"commit": None})
    file = tmp_path / "result.json"
    assert gpu.main(["--json", str(file)]) == 1
    assert "has no no_such_package_here" in capsys.readouterr().err
    found = {name: p["status"] for name, p in json.loads(file.read_text())["parts"].items()}
    assert found == {"tests": "not run: no no_such_package_here", "ops": "passed"}


def test_cmake_and_ninja_may_be_programs(gpu, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu.missing_packages(gpu.PARTS[0]) == ["setuptools", "pybind11"]


def test_what_the_sanitizers_run_runs():
    """On the CPU, and which kernels each of them is told to look at."""
    code = """
import small_calls, test_sanitizers
small_calls.main()
for tool, options in (
    ("memcheck", "--kernel-name ... --kernel-regex ..."),
    ("racecheck", "--kernel-regex ..."),
    ("synccheck", "--filter ..."),
    ("initcheck", "--kernel-name ..."),  # else what torch writes is unwritten to it
):
    print(*test_sanitizers.only_ours(tool, options))
"""
    environment = {**os.environ, "ADM_RT_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    folders = [str(ROOT / folder) for folder in ("", "tests/gpu", "tests/cpp")]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "all kernels ran",
        "--kernel-name kns=adm_rt",
        "--kernel-regex kns=adm_rt",
        "--filter kns=adm_rt",
        "",
    ], done.stderr[-2000:]
