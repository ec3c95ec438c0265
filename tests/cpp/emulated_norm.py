"""ada_group_norm's CUDA kernels under the emulator, called as adm_rt._cuda is called, and cases."""

import ctypes
import functools
from typing import NamedTuple

import numpy as np
from emulated_dtypes import FLOAT32, pack, unpack

NONE, POOL, UP = 0, 1, 2


def aligned(shape, dtype, offset=0):
    """An array whose address is a multiple of 64 plus `offset` elements, filled with NaN."""
    item = np.dtype(np.float32 if dtype == FLOAT32 else np.uint16)
    size = int(np.prod(shape))
    buffer = np.full((size + offset) * item.itemsize + 64, 0xFF, np.uint8)
    start = -buffer.ctypes.data % 64 + offset * item.itemsize
    return buffer[start : start + size * item.itemsize].view(item).reshape(shape)


class EmulatedCuda:
    """The functions of adm_rt._cuda on host memory."""

    def __init__(self, library):
        """library: the compiled tests/cpp/ada_group_norm_emulated.cpp, or its path."""
        self.library = ctypes.CDLL(library) if isinstance(library, str) else library
        self.library.error_text.restype = ctypes.c_char_p
        self.library.workspace_bytes.restype = ctypes.c_int64

    def schedule(self, schedule, seed=1):
        self.library.set_schedule(schedule, ctypes.c_uint(seed))

    def _arguments(self, shape, options, *addresses):
        arrays = [np.array(shape, np.int64), np.array(options, np.float64)]
        arrays += [np.array(group, np.uint64) for group in addresses]
        return arrays, [ctypes.c_void_p(array.ctypes.data) for array in arrays]

    def _check(self, failed):
        if failed:
            raise RuntimeError(self.library.error_text().decode())

    def ada_group_norm_workspace(self, shape, options):
        _keep, pointers = self._arguments(shape, options)
        bytes = self.library.workspace_bytes(*pointers)
        self._check(bytes < 0)
        return bytes

    ada_group_norm_backward_workspace = ada_group_norm_workspace

    def is_on_chip(self, shape, options):
        _keep, pointers = self._arguments(shape, options)
        return bool(self.library.is_on_chip(*pointers))

    def chunk_count(self, shape, options):
        _keep, pointers = self._arguments(shape, options)
        return self.library.chunk_count(*pointers)

    def ada_group_norm(self, shape, options, inputs, outputs, workspace, stream):
        _keep, pointers = self._arguments(shape, options, inputs, outputs)
        self._check(self.library.run_forward(*pointers, ctypes.c_void_p(workspace)))

    def ada_group_norm_backward(self, shape, options, inputs, outputs, workspace, stream):
        _keep, pointers = self._arguments(shape, options, inputs, outputs)
        self._check(self.library.run_backward(*pointers, ctypes.c_void_p(workspace)))

    def channel_moments(self, shape, options, x, moments, workspace, stream):
        _keep, pointers = self._arguments(shape, options)
        addresses = [ctypes.c_void_p(address) for address in (x, moments, workspace)]
        self._check(self.library.run_moments(*pointers, *addresses))


@functools.cache
def emulated_cuda(compile_emulated):
    """The kernels, compiled once for all test files; compile_emulated: the fixture."""
    return EmulatedCuda(compile_emulated("ada_group_norm_emulated.cpp"))


class NormCase(NamedTuple):
    """One call. height and width are those of the input; skip_channels of the channels come from a
    second tensor; offset: how far the channels' means lie from zero, in standard deviations."""

    batch: int
    channels: int
    height: int
    width: int
    dtype: int = FLOAT32
    groups: int = 32
    skip_channels: int = 0
    resample: int = NONE
    silu: bool = True
    modulated: bool = True
    channels_last: bool = True
    modulation_dtype: int = FLOAT32
    offset: float = 1.0
    misaligned: int = 0  # elements by which x is off

    def out_size(self):
        scale = {NONE: 1, POOL: 0.5, UP: 2}[self.resample]
        return int(self.height * scale), int(self.width * scale)


class NormRun:
    """Inputs of a case, from its own numbers as the seed, and the outputs of the kernels."""

    def __init__(self, case):
        self.case = c = case
        rng = np.random.default_rng([c.channels, c.height, c.width, c.dtype, c.skip_channels])
        spread = rng.uniform(0.5, 1.5, (1, c.channels, 1, 1))
        x = rng.standard_normal((c.batch, c.channels, c.height, c.width)) + c.offset
        own = c.channels - c.skip_channels
        self.x = self._store(x[:, :own] * spread[:, :own], c.misaligned)
        self.skip = self._store(x[:, own:] * spread[:, own:]) if c.skip_channels else None
        self.weight = (1 + 0.2 * rng.standard_normal(c.channels)).astype(np.float32)
        self.bias = (0.3 * rng.standard_normal(c.channels)).astype(np.float32)
        # Rows further apart than they are long, as slices of one big product of embeddings are.
        self.stride = 2 * c.channels + 5
        values = 0.3 * rng.standard_normal((c.batch, self.stride))
        self.modulation = pack(values.astype(np.float32), c.modulation_dtype)
        height, width = c.out_size()
        self.grad = self._store(rng.standard_normal((c.batch, c.channels, height, width)))
        self.grad_x_out = self._store(rng.standard_normal((c.batch, c.channels, height, width)))

    def _store(self, values, offset=0):
        if self.case.channels_last:
            values = values.transpose(0, 2, 3, 1)
        array = aligned(values.shape, self.case.dtype, offset)
        array[...] = pack(values.astype(np.float32), self.case.dtype)
        return array

    def values(self, array):
        """An array of the kernels as float32 [N, C, H, W]."""
        array = unpack(array, self.case.dtype)
        return array.transpose(0, 3, 1, 2) if self.case.channels_last else array

    def modulation_rows(self):
        """scale_shift as float32 [N, 2C], or None."""
        c = self.case
        rows = unpack(self.modulation, c.modulation_dtype)[:, : 2 * c.channels]
        return rows if c.modulated else None

    def arguments(self):
        c = self.case
        shape = (c.batch, c.channels, c.skip_channels, c.height, c.width, c.groups)
        options = (1e-5, c.silu, c.dtype, c.channels_last, c.resample, c.modulation_dtype)
        return shape, (*options, self.stride)

    def _tensor(self, channels, size):
        shape = (*size, channels) if self.case.channels_last else (channels, *size)
        return aligned((self.case.batch, *shape), self.case.dtype)

    def _modulation_address(self):
        return self.modulation.ctypes.data if self.case.modulated else 0

    def moments(self, cuda):
        """Per-channel moments of both inputs, from the kernel that finds nothing else."""
        shape, options = self.arguments()
        made = []
        for tensor in (self.x, self.skip):
            if tensor is None:
                made.append(None)
                continue
            channels = tensor.shape[3 if self.case.channels_last else 1]
            sizes = (shape[0], channels, 0, *shape[3:5], 1)
            workspace = aligned((cuda.ada_group_norm_workspace(sizes, options) // 4,), FLOAT32)
            out = aligned((shape[0], 2, channels), FLOAT32)
            cuda.channel_moments(
                sizes, options, tensor.ctypes.data, out.ctypes.data, workspace.ctypes.data, 0
            )
            made.append(out)
        return made

    def forward(self, cuda, given=(None, None), wants_x=True):
        """{y, x_out, mean, rstd}; given: moments of x and of skip."""
        c = self.case
        shape, options = self.arguments()
        out = {
            "y": self._tensor(c.channels, c.out_size()),
            "x_out": self._tensor(c.channels, c.out_size()) if wants_x else None,
            "mean": aligned((c.batch, c.groups), FLOAT32),
            "rstd": aligned((c.batch, c.groups), FLOAT32),
        }
        inputs = [address(a) for a in (self.x, self.skip, self.weight, self.bias)]
        inputs += [self._modulation_address(), *map(address, given)]
        outputs = [address(a) for a in out.values()]
        workspace = aligned((cuda.ada_group_norm_workspace(shape, options) // 4,), FLOAT32)
        cuda.ada_group_norm(shape, options, inputs, outputs, workspace.ctypes.data, 0)
        return out

    def backward(self, cuda, mean, rstd, wanted=(True,) * 4, residual=True):
        """{dx, dskip, dweight, dbias, dscale_shift}; wanted: dx and dskip, then the others."""
        c = self.case
        shape, options = self.arguments()
        size = (c.height, c.width)
        own = c.channels - c.skip_channels
        skips = wanted[0] and c.skip_channels > 0
        out = {
            "dx": self._tensor(own, size) if wanted[0] else None,
            "dskip": self._tensor(c.skip_channels, size) if skips else None,
            "dweight": aligned((c.channels,), FLOAT32) if wanted[1] else None,
            "dbias": aligned((c.channels,), FLOAT32) if wanted[2] else None,
            "dscale_shift": aligned((c.batch, 2 * c.channels), FLOAT32) if wanted[3] else None,
        }
        inputs = [address(self.grad), address(self.grad_x_out) if residual else 0]
        inputs += [address(a) for a in (self.x, self.skip, mean, rstd, self.weight, self.bias)]
        inputs.append(self._modulation_address())
        outputs = [address(a) for a in out.values()]
        workspace = aligned((cuda.ada_group_norm_backward_workspace(shape, options) // 4,), FLOAT32)
        cuda.ada_group_norm_backward(shape, options, inputs, outputs, workspace.ctypes.data, 0)
        return out


def address(array):
    return 0 if array is None else array.ctypes.data


def assert_same_bits(got, expected, what):
    for name, array in got.items():
        if array is not None:
            word = np.uint32 if array.dtype == np.float32 else np.uint16
            np.testing.assert_array_equal(
                array.view(word), expected[name].view(word), err_msg=f"{what}: {name}"
            )
