"""One contender in one process: pinned, with an environment of its own, one request at a time.

``Worker`` is the side of the benchmark, ``serve`` that of the process. They exchange pickles over a
socket pair, so that what libraries print does not get in between.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Pipe

# Freed memory stays in the process instead of being unmapped and faulted in again at the next
# allocation, which costs eager PyTorch up to a tenth. Everybody gets it.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "67108864",
}
# For libraries that ask; ``_limit`` is for those that do not.
AVX2 = {
    "ADM_RT_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
}


class WorkerError(RuntimeError):
    """The process reported an error or died; the message says which contender and why."""


def environment(threads, isa="auto", cache=None):
    """os.environ with the settings of a worker. cache: a folder for packed weights, None for no."""
    own = {
        "ADM_RT_CACHE": str(cache or "off"),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "ADM_RT_NUM_THREADS": str(threads),
        **ALLOCATOR,
        **(AVX2 if isa == "avx2" else {}),
    }
    return {**os.environ, **own}


class Worker:
    """A contender that runs elsewhere. Closing it ends its process."""

    def __init__(self, name, cores, isa="auto", cache=None):
        self.name = name
        self._log = tempfile.TemporaryFile()
        self._connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "adm_rt.benchmarking.worker", str(theirs.fileno())]
            self._process = subprocess.Popen(
                [*command, ",".join(map(str, cores)), isa],
                env=environment(len(cores), isa, cache),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )

    def call(self, method, *args):
        """What the method of ``_Server`` returns; WorkerError."""
        try:
            self._connection.send((method, args))
            good, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.wait()
            status = self._process.returncode
            raise WorkerError(
                f"{self.name}: its process ended ({_status(status)}); last words: {self._tail()}"
            ) from None
        if not good:
            raise WorkerError(f"{self.name}: {value}")
        return value

    def close(self):
        """Let it go; by force when it does not within ten seconds."""
        self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _tail(self):
        self._log.seek(0)
        text = self._log.read().decode(errors="replace").strip()
        return " / ".join(text.splitlines()[-3:]) or "none"


def _status(code):
    if code == -9:
        return "killed: probably out of memory"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


class _Server:
    """The methods that a ``Worker`` may call."""

    def __init__(self, limited=False):
        self._contender = self._request = None
        self._limited = limited

    def export(self, part, folder, file):
        """Write an ONNX graph."""
        from adm_rt.benchmarking import contenders

        contenders.export_onnx(part, folder, file)

    def load(self, factory, setup):
        """Make the contender: "module:attribute", called with the setup."""
        module, attribute = factory.split(":")
        self._contender = getattr(importlib.import_module(module), attribute)(setup)

    def prepare(self, kind, cfg, arrays, guidance_scale):
        """Make the request and run it once -> its output."""
        from adm_rt.benchmarking import workloads

        self._request = None
        self._request = workloads.request(self._contender, kind, cfg, arrays, guidance_scale)
        return self._request()

    def exact(self, kind, cfg, arrays, folders):
        """The output in float64 through the reference operations; kinds forward and gradient."""
        from adm_rt.benchmarking import float64

        return float64.output(kind, cfg, arrays, folders)

    def sample(self, repeats, clock="wall", warm=True):
        """Seconds per request: of the wall, or of the processor in all threads of the process.

        warm: after one that does not count. A sampler's requests follow one another; what other
        processes did meanwhile has taken the caches.
        """
        now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        if warm:
            self._request()
        begin = now()
        for _ in range(repeats):
            self._request()
        return (now() - begin) / repeats

    def usage(self):
        """Peak memory in MB, page faults so far, what our kernels use if they are loaded, and
        whether the processor itself is kept to AVX2."""
        import resource

        peak = None
        try:
            with open("/proc/self/status") as lines:
                peak = next(int(x.split()[1]) >> 10 for x in lines if x.startswith("VmHWM"))
        except (OSError, StopIteration):
            pass
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kernels = sys.modules.get("adm_rt._C")
        return {
            "peak_mb": peak,
            "faults": faults,
            "isa": kernels and kernels.cpu_isa(),
            "limited": self._limited,
        }


def _limit(isa):
    """Whether the processor, asked by whatever library, now says that it has AVX2 at most."""
    if isa != "avx2":
        return False
    from adm_rt.ops._library import extension

    return extension().limit_cpuid_to_avx2()


def serve(connection, limited=False):
    """Answer until the other side closes."""
    server = _Server(limited)
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(server, method)(*args)
        except Exception as error:
            if os.environ.get("ADM_RT_TRACEBACK"):
                import traceback

                traceback.print_exc()
            answer = False, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        connection.send(answer)


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in sys.argv[2].split(",")})
    serve(Connection(int(sys.argv[1])), _limit(sys.argv[3]))
