"""Everything that needs a GPU, by one command: ``make gpu``, or ``python benchmarks/gpu.py``.

Builds for the GPU at hand, runs the tests on it, compute-sanitizer over the kernels and the
benchmarks, prints a short table and writes one JSON with the device, versions, commit and rows.
Downloads and installs nothing; needs torch with CUDA, nvcc, cmake, ninja, pybind11 and pytest in
the Python that runs it.

    python benchmarks/gpu.py --dry-run            what it would do
    python benchmarks/gpu.py --only build,tests   parts: build tests sanitizer ops sample
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NO_DEVICE = 3  # exit status


class Part(NamedTuple):
    """A command of `make gpu`; {python}, {arch} and {rows} are filled in. seconds: its limit."""

    name: str
    what: str
    command: tuple
    seconds: int
    environment: dict = {}
    rows: bool = False  # it writes a JSON list of rows to {rows}


PARTS = (
    Part(
        "build",
        "adm_rt._C and adm_rt._cuda for this GPU's architecture",
        ("{python}", "setup.py", "-q", "build_ext", "--inplace"),
        240,
        {"ADM_RT_CUDA": "on", "ADM_RT_CUDA_ARCHS": "{arch}"},
    ),
    Part(
        "tests",
        "every op and captured runs on the device, against float64 (tests/gpu)",
        ("{python}", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu")
        + ("--ignore=tests/gpu/test_sanitizers.py",),
        150,
        {"ADM_RT_REQUIRE_GPU": "1"},
    ),
    Part(
        "sanitizer",
        "compute-sanitizer: memcheck, racecheck, initcheck, synccheck over small cases",
        ("{python}", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
        + ("tests/gpu/test_sanitizers.py",),
        240,
        {"ADM_RT_REQUIRE_GPU": "1"},
    ),
    Part(
        "ops",
        "the three ops against plain torch, times and bandwidth",
        ("{python}", "benchmarks/bench_cuda_ops.py", "--json", "{rows}"),
        120,
        rows=True,
    ),
    Part(
        "sample",
        "guided 25-step samples against published code in float16: a few sizes",
        ("{python}", "benchmarks/bench_sample.py", "--device", "cuda", "--short")
        + ("--json", "{rows}"),
        240,  # an estimate; half of it makes weights and lets cuDNN choose
        rows=True,
    ),
)
NEEDED = {
    "build": ("setuptools", "cmake", "ninja", "pybind11"),
    "tests": ("torch", "numpy", "pytest"),
    "sanitizer": ("torch", "numpy", "pytest"),
    "ops": ("torch", "numpy"),
    "sample": ("torch", "numpy"),
}

PROGRAMS = ("cmake", "ninja")  # of NEEDED: setup.py takes those on PATH, too


class Device(NamedTuple):
    """The first GPU. arch: its compute capability, such as 90."""

    name: str
    arch: str
    driver: str
    memory: str


def parse_device(line):
    """A line of nvidia-smi's table -> Device; ValueError for anything else."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 4 or not re.fullmatch(r"\d+\.\d", fields[1]):
        raise ValueError(f"nvidia-smi printed {line!r}")
    return Device(fields[0], fields[1].replace(".", ""), fields[2], fields[3])


def find_device(run=subprocess.run):
    """(Device, None), or (None, why there is none)."""
    query = "--query-gpu=name,compute_cap,driver_version,memory.total"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return None, "nvidia-smi is not on PATH, so there is no NVIDIA driver here"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi: {error}"
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return None, f"nvidia-smi: {(done.stdout + done.stderr).strip() or 'it printed nothing'}"
    try:
        return parse_device(lines[0]), None
    except ValueError as error:
        return None, str(error)


def missing_packages(part):
    """Names of what a part needs and is neither a package of this Python nor, of programs, on
    PATH."""
    return [
        name
        for name in NEEDED[part.name]
        if importlib.util.find_spec(name) is None and not (name in PROGRAMS and shutil.which(name))
    ]


def filled(part, arch, rows):
    """(command, environment) of a part."""
    values = {"python": sys.executable, "arch": arch, "rows": str(rows)}
    command = [word.format(**values) for word in part.command]
    return command, {name: text.format(**values) for name, text in part.environment.items()}


def plan(parts, device):
    """The lines of a dry run."""
    arch = device.arch if device else "<its compute capability>"
    for part in parts:
        command, environment = filled(part, arch, "<rows>.json")
        words = [f"{name}={value}" for name, value in environment.items()]
        command[0] = Path(command[0]).name
        yield f"{part.name:10s} {part.what} (at most {part.seconds} s)"
        yield f"{'':10s} $ {' '.join([*words, *command])}"


def run_part(part, device, folder, limit):
    """Runs a part to the terminal; dict(status, seconds, rows)."""
    rows = folder / f"{part.name}.json"
    command, environment = filled(part, device.arch, rows)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    print(f"\n== {part.name}: {part.what}", flush=True)
    start = time.monotonic()
    # A session of its own: past the limit the whole family has to go, compilers included.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=max(1, min(part.seconds, limit)))
        status = "passed" if code == 0 else f"failed (exit status {code})"
    except subprocess.TimeoutExpired:
        status = f"stopped after {time.monotonic() - start:.0f} s"
    except KeyboardInterrupt:
        status = "interrupted"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if part.rows:
        result["rows"] = json.loads(rows.read_text()) if rows.exists() else []
    return result


def facts(device):
    """Device, versions and commit, for the JSON."""

    def first_line(command, pattern=None):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = re.search(pattern, done.stdout) if pattern else None
        lines = done.stdout.strip().splitlines()
        return found.group(1) if found else lines[0] if lines and not pattern else None

    code = (
        "import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())"
    )
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    commit = first_line(["git", "describe", "--always", "--dirty", "--abbrev=40"])
    return {
        "device": device.name,
        "compute_capability": device.arch,
        "memory": device.memory,
        "driver": device.driver,
        "torch_cuda_cudnn": first_line([sys.executable, "-c", code]),
        "nvcc": first_line([nvcc, "--version"], r"V([\d.]+)"),
        "python": platform.python_version(),
        "commit": commit or os.environ.get("ADM_RT_COMMIT"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def table(results):
    """The short table: a line per part, then one per row."""
    for name, result in results.items():
        yield f"{name:10s} {result['seconds']:7.1f} s  {result['status']}"
    for result in results.values():
        for row in result.get("rows", []):
            rate = f"{row['rate']:7.2f} {row['rate_unit']}" if "rate" in row else ""
            yield (
                f"{row['name']:26s} {row['sizes']:36s} {row['ours_ms']:9.4f} ms  "
                f"{row['baseline']:8s}{row['baseline_ms']:10.4f} ms  {row['ratio']:5.2f}x  {rate}"
            )


def write_json(path, content):
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)


def earlier_parts(path, now):
    """Parts that another run of the same commit on the same device left in the JSON."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    same = all(content.get(key) == now[key] for key in ("commit", "device", "driver"))
    return content.get("parts", {}) if same and now["commit"] else {}


def chosen(only):
    """The parts of --only, in their order; ValueError names a wrong one."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise ValueError(f"--only {name!r} is unknown; allowed: {', '.join(known)}")
    return [part for part in PARTS if not names or part.name in names]


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Build, test, sanitize and measure on the GPU at hand."
    )
    parser.add_argument(
        "--only", default="", metavar="PART,PART", help="of " + " ".join(p.name for p in PARTS)
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--minutes", type=float, default=10, help="for all parts (default: 10)")
    parser.add_argument(
        "--json", metavar="FILE", help="default: benchmarks/results/gpu_<name>.json"
    )
    args = parser.parse_args(argv)
    try:
        parts = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))

    device, reason = find_device()
    if device:
        print(f"make gpu: {device.name}, sm_{device.arch}, driver {device.driver}, {device.memory}")
    else:
        print(f"make gpu: no GPU: {reason}")
    if args.dry_run or not device:
        print("what would be done, in this order:" if device else "with a GPU it would do:")
        print("\n".join(plan(parts, device)))
        if args.dry_run:
            return 0
        print("make gpu: nothing was run and nothing was measured", file=sys.stderr)
        return NO_DEVICE

    deadline = time.monotonic() + 60 * args.minutes
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            left, missing = deadline - time.monotonic(), ", ".join(missing_packages(part))
            if left < 5 or missing:
                why = f"no {missing}" if missing else "out of time"
                results[part.name] = {"status": f"not run: {why}", "seconds": 0.0}
                if missing:
                    print(f"make gpu: {part.name}: {sys.executable} has {why}", file=sys.stderr)
            else:
                results[part.name] = run_part(part, device, Path(folder), left)
            if results[part.name]["status"] == "interrupted":
                break
            if part.name == "build" and results["build"]["status"] != "passed":
                break  # the rest would run what was built before
    name = re.sub(r"[^a-z0-9]+", "_", device.name.lower()).strip("_")
    path = Path(args.json) if args.json else ROOT / "benchmarks" / "results" / f"gpu_{name}.json"
    now = facts(device)
    write_json(path, {**now, "parts": {**earlier_parts(path, now), **results}})
    print("\n" + "\n".join(table(results)))
    print(f"-> {path}")
    return 0 if all(result["status"] == "passed" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
