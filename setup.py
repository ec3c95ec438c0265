"""Builds the extension modules with CMake; everything else about the package is in pyproject.toml.

Environment: ADM_RT_CUDA=auto|on|off, ADM_RT_CUDA_ARCHS=80,90,..., CUDACXX, CUDA_HOME, MAX_JOBS,
CXX, CXXFLAGS, CMAKE_ARGS, ADM_RT_TENSORRT_INCLUDE=folder with TensorRT's headers, which builds
libadm_rt_trt.so too. torch is neither needed nor looked at.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
PLUGIN_LIBRARY = "libadm_rt_trt.so"
PROBE = "__global__ void probe(float* x) { x[threadIdx.x] = 1.0f; }\n"


class BuildError(RuntimeError):
    """A build that cannot go on; the message says what to change."""


def find_nvcc(env=os.environ):
    """Path of nvcc, or None. CUDACXX is taken as it is: what the user names is what is tried."""
    if env.get("CUDACXX"):
        return env["CUDACXX"]
    places = [Path(env[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    places += [Path(place) for place in env.get("PATH", "").split(os.pathsep) if place]
    places.append(Path("/usr/local/cuda/bin"))
    for place in places:
        if os.access(place / "nvcc", os.X_OK):
            return str(place / "nvcc")
    return None


def last_lines(text, count=3):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "it printed nothing"


def query(command):
    """(exit status, stdout and stderr together); status 127 when it cannot be started."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout


def cuda_archs(nvcc, env=os.environ):
    """Compute capabilities to build for: ADM_RT_CUDA_ARCHS, or those defaults that nvcc knows."""
    text = env.get("ADM_RT_CUDA_ARCHS", "")
    if text.strip():
        archs = [item.replace(".", "") for item in re.split(r"[;,\s]+", text.strip()) if item]
        for arch in archs:
            if not re.fullmatch(r"\d{2,3}[af]?", arch):
                raise BuildError(
                    f"ADM_RT_CUDA_ARCHS={text!r}: {arch!r} is not a compute capability; "
                    "write for example 80,90 or 8.0;9.0"
                )
        return sorted(archs, key=lambda arch: int(arch.rstrip("af")))  # the newest gets PTX
    known = set(re.findall(r"compute_(\d+)", query([nvcc, "--list-gpu-arch"])[1]))
    return [arch for arch in DEFAULT_CUDA_ARCHS if arch in known] or ["80"]


def probe_nvcc(nvcc, arch):
    """None when nvcc compiles a kernel for `arch`, otherwise why not."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text(PROBE)
        status, text = query(
            [nvcc, "-c", f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source)]
            + ["-o", str(output)]
        )
        if status == 0 and output.exists():
            return None
        return f"{nvcc} cannot compile a kernel for sm_{arch} ({last_lines(text)})"


def decide_cuda(env=os.environ, root=ROOT):
    """What to do about CUDA: dict(enabled, reason, and, when enabled, nvcc, nvcc_version, archs).

    ADM_RT_CUDA=on raises BuildError where auto would leave CUDA out.
    """
    wish = env.get("ADM_RT_CUDA", "").strip().lower() or "auto"
    if wish not in ("auto", "on", "off"):
        raise BuildError(f"ADM_RT_CUDA={wish!r} is not one of auto, on, off")
    if wish == "off":
        return {"enabled": False, "reason": "ADM_RT_CUDA=off"}

    nvcc = find_nvcc(env)
    if not (root / "python" / "bind_cuda.cpp").exists():
        reason = "this source tree has no CUDA module"
    elif nvcc is None:
        reason = "nvcc was not found in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    else:
        archs = cuda_archs(nvcc, env)
        reason = probe_nvcc(nvcc, archs[-1])
        if reason is None:
            release = re.search(r"release [\d.]+, V([\d.]+)", query([nvcc, "--version"])[1])
            version = release.group(1) if release else "unknown"
            text = f"nvcc {version} at {nvcc}, compute capabilities {','.join(archs)}"
            return dict(enabled=True, reason=text, nvcc=nvcc, nvcc_version=version, archs=archs)
    if wish == "on":
        raise BuildError(
            f"ADM_RT_CUDA=on, but {reason}. Set CUDACXX to a working nvcc, or build without CUDA "
            "(ADM_RT_CUDA=off)"
        )
    return {"enabled": False, "reason": reason}


def describe_cuda(cuda):
    if cuda["enabled"]:
        return f"adm_rt: building the CPU and the CUDA extension: {cuda['reason']}"
    hint = (
        ""
        if "=off" in cuda["reason"]
        else "; to insist, set ADM_RT_CUDA=on and CUDACXX=/path/to/nvcc"
    )
    return f"adm_rt: building the CPU extension only, no CUDA: {cuda['reason']}{hint}"


def tensorrt_include(cuda, env=os.environ):
    """The folder with TensorRT's headers that ADM_RT_TENSORRT_INCLUDE names, or None."""
    folder = env.get("ADM_RT_TENSORRT_INCLUDE", "").strip()
    if not folder:
        return None
    if not cuda["enabled"]:
        raise BuildError(
            f"ADM_RT_TENSORRT_INCLUDE={folder!r}: the plugins call our CUDA kernels, which are not "
            f"built ({cuda['reason']}); build with ADM_RT_CUDA=on, or unset it"
        )
    if not Path(folder, "NvInferRuntime.h").is_file():
        raise BuildError(
            f"ADM_RT_TENSORRT_INCLUDE={folder!r} has no NvInferRuntime.h; give the include folder "
            "of a TensorRT 10.13 or newer, or unset it"
        )
    return str(Path(folder).resolve())


def job_count(env=os.environ):
    """MAX_JOBS, CMAKE_BUILD_PARALLEL_LEVEL, or one per core and per 2 GB of free memory."""
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        if env.get(name, "").strip().isdigit() and int(env[name]) > 0:
            return int(env[name])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free_gb = int(re.search(r"MemAvailable:\s+(\d+)", meminfo).group(1)) / 2**20
    except (OSError, AttributeError):
        free_gb = 2.0 * cores
    return max(1, min(cores, int(free_gb / 2)))


def find_tool(name):
    """cmake or ninja: the Python package of that name if it is installed, else PATH."""
    try:
        package = __import__(name)
        folder = Path(getattr(package, "CMAKE_BIN_DIR", None) or package.BIN_DIR)
        if (folder / name).exists():
            return str(folder / name)
    except (ImportError, AttributeError):
        pass
    return shutil.which(name)


def git_revision():
    """The commit, with "-dirty" when tracked files differ from it; None outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    status, revision = query(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if status != 0:
        return None
    changed = query(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"])[1].strip()
    return revision.strip() + ("-dirty" if changed else "")


class CMakeBuild(build_ext):
    """build_ext whose extensions are CMake targets: adm_rt.<target>."""

    def run(self):
        try:
            self.cuda = decide_cuda()
            self.tensorrt = tensorrt_include(self.cuda)
        except BuildError as error:
            raise SystemExit(f"error: {error}") from None
        print(describe_cuda(self.cuda), flush=True)
        if not self.cuda["enabled"]:
            self.extensions = [e for e in self.extensions if e.name != "adm_rt._cuda"]
        super().run()
        if self.inplace:
            shutil.copy2(self.facts_path(), ROOT / "adm_rt" / "_build.json")
            library = ROOT / "adm_rt" / PLUGIN_LIBRARY
            library.unlink(missing_ok=True)  # one of an earlier build would have its kernels
            if self.tensorrt:
                shutil.copy2(self.facts_path().with_name(PLUGIN_LIBRARY), library)

    def facts_path(self):
        return Path(self.build_lib, "adm_rt", "_build.json")

    def get_outputs(self):
        more = [self.facts_path(), self.facts_path().with_name(PLUGIN_LIBRARY)]
        return [path for path in super().get_outputs() if Path(path).exists()] + [
            str(path) for path in more if path.exists() and not self.inplace
        ]

    def build_extensions(self):
        import pybind11

        # Objects are kept for the next build, unless the tools live in pip's temporary environment.
        isolated = Path(sys.prefix).resolve() not in Path(pybind11.__file__).resolve().parents
        kept = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build = Path(self.build_temp).resolve() if isolated else kept
        build.parent.mkdir(parents=True, exist_ok=True)
        with open(build.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree would share the objects
            self.build_in(build, pybind11.get_cmake_dir())

    def build_in(self, build, pybind11_folder):
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if cmake is None:
            raise SystemExit("error: cmake was not found; pip install cmake ninja")
        version = self.distribution.get_version()
        tools = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_folder,
        }
        if ninja:
            tools["CMAKE_MAKE_PROGRAM"] = ninja
        if self.cuda["enabled"]:
            tools["CMAKE_CUDA_COMPILER"] = self.cuda["nvcc"]
        environment = {name: os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CMAKE_ARGS")}
        self.drop_stale_cache(build, {"source": str(ROOT), **tools, **environment})

        arguments = [
            f"-DADM_RT_VERSION={version}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DADM_RT_CUDA={'ON' if self.cuda['enabled'] else 'OFF'}",
            f"-DADM_RT_TENSORRT_INCLUDE={self.tensorrt or ''}",
            *(f"-D{name}={value}" for name, value in tools.items()),
        ]
        if ninja:
            arguments += ["-G", "Ninja"]
        if self.cuda["enabled"]:
            # Commas, because a semicolon would split the list on its way.
            arguments += [f"-DADM_RT_CUDA_ARCHS={','.join(self.cuda['archs'])}"]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        names = [extension.name.rpartition(".")[2] for extension in self.extensions]
        targets = [*names, *(["adm_rt_trt"] if self.tensorrt else [])]
        jobs = str(self.parallel or job_count())
        subprocess.run([cmake, "--build", str(build), "-j", jobs, "--target", *targets], check=True)
        for extension, name in zip(self.extensions, names):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(next(build.glob(f"{name}.*{target.suffix}")), target)
        if self.tensorrt:
            shutil.copy2(build / PLUGIN_LIBRARY, self.facts_path().with_name(PLUGIN_LIBRARY))
        self.write_facts(build, version)

    @staticmethod
    def drop_stale_cache(build, tools):
        """Forget a build folder that other tools made: CMake cannot change them in place."""
        record = build / "adm_rt_tools.json"
        known = json.loads(record.read_text()) if record.exists() else {}
        if any(known.get(name, value) != value for name, value in tools.items()):
            shutil.rmtree(build)
            known = {}
        build.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({**known, **tools}))

    def write_facts(self, build, version):
        cache = (build / "CMakeCache.txt").read_text()
        compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.M).group(1)
        facts = {
            "version": version,
            "git": git_revision(),
            "compiler": query([compiler, "--version"])[1].splitlines()[0],
            "cxx_flags": os.environ.get("CXXFLAGS", ""),
            "cuda": self.cuda,
            "tensorrt_plugins": self.tensorrt is not None,
        }
        self.facts_path().write_text(json.dumps(facts, indent=2) + "\n")


def main():
    setup(
        ext_modules=[Extension("adm_rt._C", sources=[]), Extension("adm_rt._cuda", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )


if __name__ == "__main__":
    main()
