"""sdist, wheel and the installed package, as a user of pip has them; no network, no torch."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.1.0"


def run(command, cwd, **variables):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def need_build_tools():
    for name in ("setuptools", "pybind11", "cmake", "ninja", "pip"):
        pytest.importorskip(name, reason=f"builds a wheel: pip install {name}")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The tree's sdist, made from a copy: egg-info and stale lists stay out of it."""
    need_build_tools()
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns("build", ".git", ".venv", "*.egg-info", "*.so", "samples")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    code = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    run([sys.executable, "-c", code], folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    assert archive.name == f"adm_rt-{VERSION}.tar.gz"
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The CPU wheel, made from the objects of the tree's own build where they are new enough."""
    need_build_tools()
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("poison", "egg"):
        (folder / name).mkdir()
    poison = "raise ImportError('the build must not import torch')\n"
    (folder / "poison" / "torch.py").write_text(poison)
    run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder / "egg"]
        + ["build", "--build-base", folder / "base"]
        + ["bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "bdist"],
        ROOT,
        ADM_RT_CUDA="off",
        PYTHONPATH=str(folder / "poison"),
    )
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel alone; nothing of this tree is on the path with it."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    run([*pip, "--target", folder, wheel], folder)
    return folder


def tracked_files(*folders):
    """Files under version control, or None where this is no checkout (an unpacked sdist)."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    text = subprocess.run(
        ["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True
    ).stdout
    return [line for line in text.splitlines() if (ROOT / line).exists()]


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "Makefile", "README.md"}
    needed |= {"constraints.txt", "csrc/common/simd.h", "python/module.cpp", "adm_rt/py.typed"}
    needed |= set(tracked_files("adm_rt", "csrc", "python", "tests", "benchmarks", "docs") or ())
    assert needed - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"adm_rt-{VERSION}.dist-info/METADATA").decode()
        scripts = archive.read(f"adm_rt-{VERSION}.dist-info/entry_points.txt").decode()
    assert {name.partition("/")[0] for name in names} == {"adm_rt", f"adm_rt-{VERSION}.dist-info"}
    assert len([name for name in names if name.startswith("adm_rt/_C.")]) == 1
    assert not [name for name in names if name.startswith("adm_rt/_cuda.")]
    assert {"adm_rt/py.typed", "adm_rt/_build.json"} <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "adm_rt").rglob("*.py")}
    assert sources - names == set()
    assert not [name for name in names if name.endswith((".cu", ".cpp", ".h", ".cuh"))]
    assert wheel.stat().st_size < 60e6

    assert "adm-rt = adm_rt.cli:main" in scripts
    assert "License-Expression: MIT" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    always = {line.split()[1].partition(">")[0] for line in required if "extra" not in line}
    assert always == {"numpy", "torch", "safetensors", "pillow", "tqdm"}
    for name in ("torchvision", "mpi4py", "blobfile"):
        assert name not in metadata


def test_wheel_holds_the_models(wheel):
    models = [path for path in (ROOT / "adm_rt" / "zoo").rglob("*") if path.is_file()]
    with zipfile.ZipFile(wheel) as archive:
        for path in models:
            name = str(path.relative_to(ROOT))
            assert archive.read(name) == path.read_bytes()
    size = sum(path.stat().st_size for path in models)
    assert size < 12e6, f"the shipped models take {size / 1e6:.1f} MB"


def test_installed_wheel_works_outside_the_tree(installed):
    code = """
import json, sys
import adm_rt
from adm_rt import _C
from adm_rt._build_info import build_info
print(json.dumps([adm_rt.__version__, adm_rt.__file__, _C.__file__, _C.version, build_info(),
                  "torch" in sys.modules]))
"""
    text = run([sys.executable, "-c", code], installed.parent, PYTHONPATH=str(installed))
    version, package, extension, built, facts, torch_imported = json.loads(text)
    assert Path(package).is_relative_to(installed) and Path(extension).is_relative_to(installed)
    assert version == built == facts["version"] == VERSION
    assert facts["cuda"] == {"enabled": False, "reason": "ADM_RT_CUDA=off"}
    assert facts["compiler"]
    assert not torch_imported


def test_threads_and_instruction_set_of_the_extension():
    from adm_rt import _C

    before, isa = _C.num_threads(), _C.cpu_isa()
    try:
        _C.set_num_threads(3)
        assert _C.num_threads() == 3
        for bad in (0, -1, 5000):
            with pytest.raises(ValueError, match=rf"num_threads={bad} is not in \[1, 1024\]"):
                _C.set_num_threads(bad)
        for name in _C.available_cpu_isas():
            _C.set_cpu_isa(name)
            assert _C.cpu_isa() == name
        with pytest.raises(ValueError, match="cpu_isa='sse9' is not one of portable, avx2"):
            _C.set_cpu_isa("sse9")
    finally:
        _C.set_num_threads(before)
        _C.set_cpu_isa(isa)


@pytest.mark.parametrize("name", ["portable", "nonsense"])
def test_instruction_set_from_the_environment(name, tmp_path):
    code = "from adm_rt import _C; print(_C.cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "ADM_RT_CPU_ISA": name},
        capture_output=True,
        text=True,
    )
    if name == "portable":
        assert done.stdout.strip() == "portable"
    else:
        assert "cpu_isa='nonsense' is not one of portable, avx2, avx512" in done.stderr


def test_import_is_light():
    """`import adm_rt` and the command line's help load neither torch nor the extension."""
    code = """
import sys
import adm_rt, adm_rt.cli
try:
    adm_rt.cli.main(["--version"])
except SystemExit:
    pass
print([name for name in ("torch", "adm_rt._C", "matplotlib") if name in sys.modules])
"""
    assert run([sys.executable, "-c", code], ROOT).splitlines()[-1] == "[]"


def test_missing_build_facts_are_said(monkeypatch):
    import adm_rt._build_info as module

    monkeypatch.setattr(module.resources, "files", lambda _: Path("/nonexistent"))
    assert "pip install -e ." in module.build_info()["error"]
