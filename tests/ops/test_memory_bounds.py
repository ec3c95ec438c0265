"""The kernels touch nothing outside their tensors: every tensor ends, then begins, at a page that
may not be touched, for odd shapes and in every instruction set of this machine.

Masked loads and stores may reach into such a page, as far as their mask is off.
"""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from adm_rt.ops._library import extension, extension_available

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


class Fence:
    """Tensors between two pages without access rights, flush with the one at their end or start."""

    def __init__(self, at_end):
        self.at_end = at_end
        self.rng = np.random.default_rng(7)
        self.kept = []

    def __call__(self, count, dtype="float32"):
        """The address of `count` values: normal numbers, bfloat16 ones for "uint16"."""
        values = self.rng.standard_normal(count, dtype=np.float32)
        if dtype == "uint16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        size = count * np.dtype(dtype).itemsize
        inner = -(-size // PAGE) * PAGE
        region = mmap.mmap(-1, inner + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for page in (first, first + PAGE + inner):
            if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        address = first + PAGE + (inner - size if self.at_end else 0)
        ctypes.memmove(address, values.astype(dtype).ctypes.data, size)
        self.kept.append(region)
        return address


def ada_group_norm(module, fence):
    shapes = [(2, 6, 1, 2), (1, 12, 7, 3), (2, 33, 17, 3), (1, 2, 4099, 1), (1, 130, 35, 2)]
    for (n, c, spatial, groups), bf16, silu, last in itertools.product(
        shapes, (0, 1), (False, True), (False, True)
    ):
        tensor = [n * c * spatial, "uint16" if bf16 else "float32"]
        x, y, grad, dx = (fence(*tensor) for _ in range(4))
        weight, bias, dweight, dbias = (fence(c) for _ in range(4))
        scale_shift, dscale_shift = fence(n * 2 * c), fence(n * 2 * c)
        mean, rstd = fence(n * groups), fence(n * groups)
        module.ada_group_norm(
            *(x, weight, bias, scale_shift, 2 * c, y, mean, rstd, n, c, spatial, groups),
            *(1e-5, silu, bf16, last),
        )
        module.ada_group_norm_backward(
            *(grad, x, mean, rstd, weight, bias, scale_shift, 2 * c, dx, dweight, dbias),
            *(dscale_shift, n, c, spatial, groups, silu, bf16, last),
        )


def qkv_attention(module, fence):
    for d, length, bf16, order in itertools.product(
        (1, 7, 33, 64), (1, 5, 49, 130), (0, 1), (0, 1)
    ):
        dtype = "uint16" if bf16 else "float32"
        n, heads = 1, 2
        qkv, dqkv = (fence(n * 3 * heads * d * length, dtype) for _ in range(2))
        for queries in {1, length // 2 + 1, length}:
            out, grad = (fence(n * heads * d * queries, dtype) for _ in range(2))
            stats = fence(n * heads * 2 * queries)
            module.qkv_attention(qkv, out, stats, n, heads, d, length, queries, order, bf16)
            module.qkv_attention_backward(
                grad, qkv, out, stats, dqkv, n, heads, d, length, queries, order, bf16
            )


def guided_mean_update(module, fence):
    row = (1.5, 1.3, -0.9, 0.2, 1.5, 0.3, 0.6, 0.1, -0.2, 0.3, 0.1, 0.2, 0.5, 0, 0, -5, -3, 0.7)
    seeds = np.arange(2, dtype=np.int64)
    for pixels, bf16, clip, draw in itertools.product(
        (1, 7, 64, 1023), (0, 1), (0, 1, 2), (False, True)
    ):
        n, c = 2, 3
        dtype = "uint16" if bf16 else "float32"
        x, *history = (fence(n * c * pixels) for _ in range(4))
        model, uncond = (fence(n * 2 * c * pixels, dtype) for _ in range(2))
        gradient = fence(n * c * pixels, dtype)
        noise = (0, seeds.ctypes.data) if draw else (fence(n * c * pixels), 0)
        outputs = tuple(fence(n * c * pixels) for _ in range(3))
        inputs = (x, model, uncond, gradient, *history, *noise)
        shape = (n, c, pixels, 2 * c, 2 * c)
        module.guided_mean_update(row, shape, inputs, outputs, (bf16, bf16), 3, True, clip, 0.9)
        module.count_nonfinite(x, n, c * pixels, fence(2 * n))  # int64 counts
        module.philox_normal(seeds.ctypes.data, n, c * pixels, 0, 0, x)


OPS = {f.__name__: f for f in (ada_group_norm, qkv_attention, guided_mean_update)}


def run_child(*arguments):
    command = [sys.executable, __file__, *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("isa", extension().available_cpu_isas())
@pytest.mark.parametrize("op", OPS)
def test_nothing_outside_is_touched(op, isa):
    status, errors = run_child(op, isa)
    assert status == 0, f"exit status {status} (-11: outside a tensor)\n{errors[-2000:]}"


@pytest.mark.parametrize("offset", ["-4", "16"])
def test_the_fence_holds(offset):
    status, _ = run_child("fence", offset)
    assert status < 0


def main(op, argument):
    module = extension()
    if op == "fence":
        fence, counts = Fence(at_end=int(argument) > 0), np.zeros(1, np.int64)
        module.count_nonfinite(fence(16) + int(argument), 1, 16, counts.ctypes.data)
        return
    module.set_cpu_isa(argument)
    module.set_num_threads(2)
    for at_end in (True, False):
        OPS[op](module, Fence(at_end))


if __name__ == "__main__":
    main(*sys.argv[1:])
