"""Calls of guided_mean_update under the emulator beside the same on the CPU, for the tests here."""

import ctypes

import numpy as np

from adm_rt.ops._library import extension
from adm_rt.ops.guided_mean_update import CLIPS, StepCoefficients

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # as in csrc/common/dtype.h
ROW = StepCoefficients(
    cfg=1.5, x0_x=1.3, x0_out=-0.9, guide_x0=0.2, guide_mean=1.5, next_x=0.3, next_x0=0.6,
    next_h0=0.1, next_h1=-0.2, next_h2=0.3, state_x=0.1, state_x0=0.2, state_h0=0.5,
    min_log=-5.0, max_log=-3.0, noise=0.7,
)  # fmt: skip


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)  # which keeps the array


def address(array):
    return 0 if array is None else array.ctypes.data


def to_bits(values, dtype):
    """float32 -> what a tensor of that dtype holds; bfloat16 by truncation."""
    if dtype == BFLOAT16:
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16) if dtype == FLOAT16 else values


def from_bits(values, dtype):
    if dtype == BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def by_pixels(values):
    """[N, C, P] -> [N, P, C]"""
    return np.ascontiguousarray(values.transpose(0, 2, 1))


class Case:
    """Inputs of one call, from a seed, and the outputs of both implementations."""

    def __init__(self, seed, n, c, pixels, *, noise="seeds", dtype=FLOAT32, full=True):
        rng = np.random.default_rng(seed)
        self.shape = (n, c, pixels, 2 * c, 2 * c if full else 0)
        self.dtypes = (dtype, dtype)

        def normal(*size, dtype=FLOAT32):
            return to_bits(rng.standard_normal(size, dtype=np.float32), dtype)

        self.arrays = [
            normal(n, c, pixels),
            normal(n, 2 * c, pixels, dtype=dtype),
            normal(n, 2 * c, pixels, dtype=dtype) if full else None,
            normal(n, c, pixels, dtype=dtype) if full else None,
            *[normal(n, c, pixels) if full else None for _ in range(3)],
            normal(n, c, pixels) if noise == "tensor" else None,
            rng.integers(0, 2**62, n) if noise == "seeds" else None,
        ]
        self.full = full

    def outputs(self):
        results = [
            np.full(self.shape[:3], np.nan, np.float32) for _ in range(3 if self.full else 2)
        ]
        return tuple(a.ctypes.data for a in results) + (() if self.full else (0,)), results

    def cpu(self, row, step, clip, quantile):
        """x_next, x0 and state by the CPU build, which has no float16."""
        arrays, dtypes = list(self.arrays), self.dtypes
        if dtypes[0] == FLOAT16:
            arrays[1:4] = [None if a is None else from_bits(a, FLOAT16) for a in arrays[1:4]]
            dtypes = (FLOAT32, FLOAT32)
        outputs, results = self.outputs()
        inputs = tuple(address(a) for a in arrays)
        extension().guided_mean_update(
            row, self.shape, inputs, outputs, dtypes, step, True, CLIPS.index(clip), quantile
        )
        return results

    def emulate(
        self,
        library,
        row,
        step,
        clip,
        quantile,
        *,
        schedule=0,
        vector=-1,
        blocks=2,
        table=False,
        counter=None,
        arrivals=None,
        by_pixel=(False, False),
        copies=(),
        image=None,
    ):
        """([x_next, x0, state], whether four elements were taken at once).

        by_pixel: model outputs, gradient; copies: (uint16 array [N, P, channels], dtype) each;
        image: uint8 [N, P, C]; counter, arrivals: uint32 [1], with table.
        """
        outputs, results = self.outputs()
        arrays = list(self.arrays)
        for i, turned in zip((1, 2, 3), (by_pixel[0], *by_pixel), strict=True):
            if turned and arrays[i] is not None:
                arrays[i] = by_pixels(arrays[i])
        limits = np.full(self.shape[0], np.nan, np.float32)
        floats = np.array(row, np.float32)
        rows = np.zeros((step + 1, 18), np.float32)
        rows[step] = floats
        counter = np.array([step], np.uint32) if counter is None else counter
        if table:  # then neither the row nor the step of the arguments may matter
            floats = np.full(18, np.nan, np.float32)
        device = [rows if table else None, counter if table else None, arrivals, limits]
        device += [array for array, _ in copies] + [None] * (2 - len(copies)) + [image]
        layout = [int(flag) for flag in by_pixel]
        for array, dtype in copies:
            layout += [array.shape[2], dtype]
        layout += [0, BFLOAT16] * (2 - len(copies))
        used = ctypes.c_int(-1)
        failed = library.run_update(
            pointer(floats),
            pointer(np.array(self.shape, np.int64)),
            pointer(np.array([address(a) for a in arrays], np.uint64)),
            pointer(np.array(outputs, np.uint64)),
            pointer(np.array(self.dtypes, np.int32)),
            ctypes.c_uint32(0 if table else step),
            1,
            CLIPS.index(clip),
            ctypes.c_double(quantile),
            pointer(np.array([address(a) for a in device], np.uint64)),
            pointer(np.array(layout, np.int32)),
            blocks,
            schedule,
            vector,
            ctypes.byref(used),
        )
        assert not failed, library.error_text().decode()
        return results, bool(used.value)


def assert_equal_bits(got, expected):
    for name, a, b in zip(("x_next", "x0", "state"), got, expected):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=name)


class EmulatedCuda:
    """The functions of adm_rt._cuda on host memory."""

    def __init__(self, library):
        self.library = library
        self.calls = []  # (dtypes, by_pixels) of each

    def guided_mean_update_step(
        self, row, shape, inputs, outputs, dtypes, step, learned, clip, quantile, device, by_pixels,
        copies, image, stream,
    ):  # fmt: skip
        assert copies == [] and stream == 0
        self.calls.append((tuple(dtypes), tuple(by_pixels)))
        table, counter, arrivals, limits = device
        layout = [*map(int, by_pixels), 0, BFLOAT16, 0, BFLOAT16]
        addresses = [table, counter, arrivals, limits, 0, 0, image]
        failed = self.library.run_update(
            pointer(np.array(row, np.float32)),
            pointer(np.array(shape, np.int64)),
            pointer(np.array(inputs, np.uint64)),
            pointer(np.array(outputs, np.uint64)),
            pointer(np.array(dtypes, np.int32)),
            ctypes.c_uint32(step),
            int(learned),
            clip,
            ctypes.c_double(quantile),
            pointer(np.array(addresses, np.uint64)),
            pointer(np.array(layout, np.int32)),
            1,
            0,
            -1,
            ctypes.byref(ctypes.c_int()),
        )
        if failed:
            raise ValueError(self.library.error_text().decode())
