"""What guided_mean_update does on CUDA alone, under the emulator: pixel-major copies and inputs,
the final image, the step counter that the kernel advances; and Philox there."""

import ctypes

import numpy as np
import pytest
from emulated_update import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    ROW,
    Case,
    assert_equal_bits,
    by_pixels,
    from_bits,
    pointer,
    to_bits,
)

from adm_rt.ops._library import extension, extension_available
from adm_rt.ops.philox import image_seeds, philox_normal
from adm_rt.trajectory import to_uint8

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def emulated(compile_emulated):
    return compile_emulated("guided_mean_update_emulated.cpp")


def rounded(x_next, dtype):
    """float32 [N, C, P] -> the bits of its copy [N, P, C], rounded to nearest even."""
    values = by_pixels(x_next)
    if dtype == FLOAT16:
        return values.astype(np.float16).view(np.uint16)
    words = values.view(np.uint32).astype(np.uint64)
    return ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)


# pixels: a multiple of four, odd ones (noise counters then begin inside a group), fewer than four
@pytest.mark.parametrize("pixels", [64, 49, 3])
@pytest.mark.parametrize("clip", ["static", "dynamic"])
def test_copies_and_image(emulated, pixels, clip):
    for channels, width in ((3, 3), (3, 8), (3, 6), (1, 1), (4, 5)):
        case = Case(pixels, 2, channels, pixels)
        copies = [
            (np.full((2, pixels, width), 0x1234, np.uint16), FLOAT16),
            (np.full((2, pixels, channels), 0x1234, np.uint16), BFLOAT16),
        ]
        image = np.zeros((2, pixels, channels), np.uint8)
        got, vector = case.emulate(emulated, ROW, 5, clip, 0.7, copies=copies, image=image)
        assert vector == (pixels % 4 == 0)
        expected = case.cpu(ROW, 5, clip, 0.7)
        assert_equal_bits(got, expected)
        for array, dtype in copies:
            np.testing.assert_array_equal(array[:, :, :channels], rounded(expected[0], dtype))
            assert (array[:, :, channels:] == 0x1234).all()  # the rest keeps what it holds
        x_next = expected[0].reshape(2, channels, pixels, 1)
        np.testing.assert_array_equal(image.reshape(2, pixels, 1, channels), to_uint8(x_next))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("pixels", [64, 31])
def test_pixel_major_networks(emulated, dtype, pixels):
    """What channels_last networks return is read as it lies."""
    case = Case(3, 2, 3, pixels, dtype=dtype)
    expected = case.cpu(ROW, 4, "static", 0.9)
    for by_pixel in ((True, True), (True, False), (False, True), (False, False)):
        got, _ = case.emulate(emulated, ROW, 4, "static", 0.9, by_pixel=by_pixel)
        assert_equal_bits(got, expected)


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_a_grid_that_goes_round(emulated, schedule):
    """More pixels than the threads of the grid, wide and narrow."""
    case = Case(9, 2, 3, 3000)
    expected = case.cpu(ROW, 2, "static", 0.9)
    for vector in (0, 1):
        copy = np.zeros((2, 3000, 3), np.uint16)
        arguments = {"vector": vector, "schedule": schedule, "blocks": 2}
        got, _ = case.emulate(
            emulated, ROW, 2, "static", 0.9, copies=[(copy, FLOAT16)], **arguments
        )
        assert_equal_bits(got, expected)
        np.testing.assert_array_equal(copy, rounded(expected[0], FLOAT16))
        got, _ = case.emulate(emulated, ROW, 2, "static", 0.9, **arguments)
        assert_equal_bits(got, expected)


def test_image_of_extremes(emulated):
    """Outside [-1, 1], both zeros, infinities; each value in between falls on its step."""
    steps = (np.arange(256) / 127.5 - 1).astype(np.float32)
    values = np.concatenate([steps, np.nextafter(steps, np.float32(-9)), [-9, 9, -np.inf, np.inf]])
    values = np.concatenate([values, [-0.0, 0.0, 1.0, -1.0]]).astype(np.float32)[None, None]
    case = Case(0, 1, 1, values.shape[2], noise=None, full=False)
    case.arrays[0] = np.ascontiguousarray(values)
    case.arrays[1][:] = 0
    row = ROW._replace(next_x=1.0, next_x0=0.0, noise=0.0, guide_mean=0.0)
    image = np.full((1, values.shape[2], 1), 77, np.uint8)
    case.emulate(emulated, row, 0, "static", 0.9, image=image)
    np.testing.assert_array_equal(image[0, :, 0], to_uint8(values[:, :, :, None])[0, :, 0, 0])


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("clip", ["static", "dynamic"])
def test_the_kernel_advances_the_step(emulated, schedule, clip):
    case = Case(4, 3, 3, 700)
    counter, arrivals = np.array([6], np.uint32), np.zeros(1, np.uint32)
    for step in (6, 7):  # a replay goes on by itself
        got, _ = case.emulate(
            emulated, ROW, step, clip, 0.7, table=True, counter=counter, arrivals=arrivals,
            schedule=schedule,
        )  # fmt: skip
        assert_equal_bits(got, case.cpu(ROW, step, clip, 0.7))
        assert counter[0] == step + 1 and arrivals[0] == 0
    case.emulate(emulated, ROW, 8, clip, 0.7, table=True, counter=counter)
    assert counter[0] == 8  # without arrivals the caller advances it


def test_refusals(emulated):
    five = Case(1, 1, 5, 8)
    image = np.zeros((1, 8, 5), np.uint8)
    with pytest.raises(AssertionError, match="pixel-major tensors of 5 channels; at most 4"):
        five.emulate(emulated, ROW, 0, "static", 0.9, image=image)
    case = Case(1, 1, 3, 8)
    narrow = np.zeros((1, 8, 2), np.uint16)
    with pytest.raises(AssertionError, match="a copy of 2 channels; x has 3"):
        case.emulate(emulated, ROW, 0, "static", 0.9, copies=[(narrow, FLOAT16)])
    wide = np.zeros((1, 8, 3), np.float32)
    with pytest.raises(AssertionError, match="a copy is float16 or bfloat16"):
        case.emulate(emulated, ROW, 0, "static", 0.9, copies=[(wide, FLOAT32)])
    with pytest.raises(AssertionError, match="arrivals without a step_counter"):
        case.emulate(emulated, ROW, 0, "static", 0.9, arrivals=np.zeros(1, np.uint32))


def test_float16_outputs_of_networks(emulated):
    case = Case(6, 2, 3, 64, dtype=FLOAT16)
    got, vector = case.emulate(emulated, ROW, 2, "static", 0.9)
    assert vector
    assert_equal_bits(got, case.cpu(ROW, 2, "static", 0.9))
    assert from_bits(to_bits(np.float32([1.5]), FLOAT16), FLOAT16) == 1.5


# ---- Philox ----


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(emulated, counter, key, expected):
    """Random123's vectors of philox4x32-10, by the code of the GPU's thread."""
    words = np.zeros(4, np.uint32)
    arrays = (np.array(counter, np.uint32), np.array(key, np.uint32), words)
    assert emulated.run_philox(*map(pointer, arrays)) == 0
    assert " ".join(f"{word:08x}" for word in words) == expected


@pytest.mark.parametrize("size", [1, 1003, 12288])
def test_normals_have_the_bits_of_the_cpu(emulated, size):
    seeds = np.concatenate([image_seeds(7, 3), np.array([0, 2**63 - 1, -1], np.int64)])
    for step, purpose in ((0, 0), (999, 1), (2**32 - 1, 1)):
        normals = np.full((6, size), np.nan, np.float32)
        assert not emulated.run_normals(
            pointer(seeds), 6, ctypes.c_int64(size), ctypes.c_uint32(step), purpose,
            pointer(normals),
        )  # fmt: skip
        expected = philox_normal(seeds, (size,), step=step, purpose=purpose)
        np.testing.assert_array_equal(normals.view(np.uint32), expected.view(np.uint32))


def test_the_frozen_stream(emulated):
    """The same bits as tests/ops/test_philox.py, which saved seeds rely on."""
    seeds, normals = image_seeds(42, 2, first=3), np.zeros((2, 5), np.float32)
    emulated.run_normals(pointer(seeds), 2, ctypes.c_int64(5), ctypes.c_uint32(2), 1,
                         pointer(normals))  # fmt: skip
    frozen = "bf0bca20 bfba876b bf4fdccd beba466e beadc565 3ee78b16 3e49573c be4726c8 3ef803bf"
    assert " ".join(f"{word:08x}" for word in normals.view(np.uint32).ravel()[:9]) == frozen
    assert extension().philox4x32([0] * 4, [0] * 2)[0] == 0x6627E8D5
