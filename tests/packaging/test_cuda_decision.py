"""setup.py's decision about CUDA: auto, on and off, with and without a working nvcc."""

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("adm_rt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A source tree that has a CUDA module, as far as the decision looks."""
    (tmp_path / "tree" / "python").mkdir(parents=True)
    (tmp_path / "tree" / "python" / "bind_cuda.cpp").touch()
    return tmp_path / "tree"


def fake_nvcc(folder, known="80 86 89 90 100 120", compiles=True):
    """A script that answers as nvcc does to the three questions of setup.py."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    lines = "\n".join(f"echo compute_{arch}" for arch in known.split())
    compile_line = 'for last; do :; done; : > "$last"' if compiles else "echo no such host; exit 1"
    path.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--list-gpu-arch) {lines} ;;\n"
        "--version) echo 'Cuda compilation tools, release 12.9, V12.9.41' ;;\n"
        f"*) {compile_line} ;;\nesac\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def no_cuda_env(monkeypatch, build):
    """An environment where no place holds nvcc, /usr/local/cuda included."""
    monkeypatch.setattr(build.os, "access", lambda *_: False)
    return {"PATH": "/nonexistent"}


def test_off_looks_for_nothing(build, tree):
    decision = build.decide_cuda({"ADM_RT_CUDA": "off", "CUDACXX": "/bin/false"}, tree)
    assert decision == {"enabled": False, "reason": "ADM_RT_CUDA=off"}


def test_auto_without_nvcc_says_where_it_looked(build, tree, monkeypatch):
    decision = build.decide_cuda(no_cuda_env(monkeypatch, build), tree)
    assert not decision["enabled"]
    line = build.describe_cuda(decision)
    assert "\n" not in line
    for word in ("no CUDA", "not found", "CUDACXX", "CUDA_HOME", "PATH", "ADM_RT_CUDA=on"):
        assert word in line


def test_on_without_nvcc_is_an_error(build, tree, monkeypatch):
    env = {**no_cuda_env(monkeypatch, build), "ADM_RT_CUDA": "on"}
    with pytest.raises(build.BuildError, match="ADM_RT_CUDA=on, but nvcc was not found.*CUDACXX"):
        build.decide_cuda(env, tree)


@pytest.mark.parametrize("nvcc", ["/bin/false", "/nonexistent/nvcc"])
def test_broken_nvcc(build, tree, nvcc):
    decision = build.decide_cuda({"CUDACXX": nvcc}, tree)
    assert not decision["enabled"] and f"{nvcc} cannot compile" in decision["reason"]
    with pytest.raises(build.BuildError, match=f"{nvcc} cannot compile"):
        build.decide_cuda({"CUDACXX": nvcc, "ADM_RT_CUDA": "on"}, tree)


def test_failed_probe_keeps_the_compilers_words(build, tree, tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin", compiles=False)
    assert "no such host" in build.decide_cuda({"CUDACXX": nvcc}, tree)["reason"]


def test_working_nvcc(build, tree, tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin")
    decision = build.decide_cuda({"CUDACXX": nvcc}, tree)
    assert decision["enabled"] and decision["nvcc"] == nvcc
    assert decision["archs"] == ["80", "86", "89", "90", "100", "120"]
    assert decision["nvcc_version"] == "12.9.41"
    line = build.describe_cuda(decision)
    assert "\n" not in line and nvcc in line and "80,86,89,90,100,120" in line


def test_old_nvcc_gets_the_capabilities_it_knows(build, tree, tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin", known="75 80 86 89 90")
    assert build.decide_cuda({"CUDACXX": nvcc}, tree)["archs"] == ["80", "86", "89", "90"]


@pytest.mark.parametrize("text", ["90", "9.0", "80;90", "90,80", " 80 90a "])
def test_arch_list_forms(build, text):
    archs = build.cuda_archs("unused", {"ADM_RT_CUDA_ARCHS": text})
    assert archs in (["90"], ["80", "90"], ["80", "90a"])


def test_bad_values_are_named(build, tree):
    with pytest.raises(build.BuildError, match="ADM_RT_CUDA='maybe' is not one of auto, on, off"):
        build.decide_cuda({"ADM_RT_CUDA": "maybe"}, tree)
    with pytest.raises(build.BuildError, match="'hopper' is not a compute capability"):
        build.cuda_archs("unused", {"ADM_RT_CUDA_ARCHS": "hopper"})


def test_order_of_the_search(build, tmp_path):
    in_path, in_home = (fake_nvcc(tmp_path / name / "bin") for name in ("path", "home"))
    env = {"PATH": str(Path(in_path).parent)}
    assert build.find_nvcc(env) == in_path
    env["CUDA_HOME"] = str(tmp_path / "home")
    assert build.find_nvcc(env) == in_home
    env["CUDA_HOME"] = str(tmp_path / "holds no compiler")
    assert build.find_nvcc(env) == in_path
    env["CUDACXX"] = "/named/by/the/user"
    assert build.find_nvcc(env) == "/named/by/the/user"


def test_tree_without_cuda_sources(build, tmp_path):
    assert "no CUDA module" in build.decide_cuda({}, tmp_path)["reason"]


def test_jobs(build):
    assert build.job_count({"MAX_JOBS": "3", "CMAKE_BUILD_PARALLEL_LEVEL": "5"}) == 3
    assert build.job_count({"CMAKE_BUILD_PARALLEL_LEVEL": "5"}) == 5
    assert 1 <= build.job_count({"MAX_JOBS": "many"}) <= (os.cpu_count() or 1)


def test_setup_stops_with_one_clear_line(tmp_path):
    """The whole way through setup.py, as pip goes: exit status and message, nothing compiled."""
    pytest.importorskip("setuptools", minversion="77.0.3", reason="setup.py needs setuptools 77")
    env = {**os.environ, "ADM_RT_CUDA": "on", "CUDACXX": "/bin/false"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"]
        + ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "error: ADM_RT_CUDA=on, but /bin/false cannot compile" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "lib").exists()


def test_the_plugin_library_is_built_where_headers_and_cuda_are(build, tmp_path):
    cuda, none = {"enabled": True}, {"enabled": False, "reason": "ADM_RT_CUDA=off"}
    assert build.tensorrt_include(none, {}) is None
    env = {"ADM_RT_TENSORRT_INCLUDE": str(tmp_path)}
    with pytest.raises(build.BuildError, match="not built .ADM_RT_CUDA=off.; build with"):
        build.tensorrt_include(none, env)
    with pytest.raises(build.BuildError, match="has no NvInferRuntime.h"):
        build.tensorrt_include(cuda, env)
    (tmp_path / "NvInferRuntime.h").touch()
    assert build.tensorrt_include(cuda, env) == str(tmp_path)
