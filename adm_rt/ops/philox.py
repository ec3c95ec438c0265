"""Counter-based random numbers: noise as a pure function of (seed, step, purpose, element).

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). The key is
the 64-bit seed of one image, the counter is ``(element // 4, step, purpose, 0)`` and the four words
of a counter serve the elements ``4k .. 4k + 3``; normals come from them by Box-Muller. So an
image's noise does not depend on the batch it is drawn in, on the number of threads, or on what was
drawn before, and it has the same bits in every CPU build and, by construction, on CUDA
(csrc/common/philox.h).
"""

import math
import operator

import numpy as np

from adm_rt.ops._library import extension

INITIAL_NOISE = 0  # purpose of x_T, always at step 0
STEP_NOISE = 1  # purpose of the noise that sampler step `step` adds
LABELS = 2  # purpose of randomly chosen class labels


def image_seeds(seed, num_images, first=0):
    """Seeds of the images ``first .. first + num_images - 1`` of a run: ``(seed << 32) | index``.

    seed: int in [0, 2**31). Returns int64 [num_images]. Raises ValueError out of range.
    """
    seed, num_images, first = (operator.index(value) for value in (seed, num_images, first))
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed}; allowed: 0 to 2147483647 (2**31 - 1)")
    if num_images < 0 or first < 0 or first + num_images > 2**32:
        raise ValueError(
            f"num_images={num_images} from first={first} on are not image indices in [0, 2**32)"
        )
    return np.int64(seed << 32) | np.arange(first, first + num_images, dtype=np.int64)


def philox_normal(seeds, shape, step=0, purpose=INITIAL_NOISE):
    """Standard normal noise.

    seeds: int64 [N], one per image (array, tensor or list); shape: (C, H, W) or any other of one
    image; step, purpose: ints in [0, 2**32). Returns NumPy float32 [N, *shape]. The values lie in
    [-5.9, 5.9], 2**24 radii by 2**24 angles.
    """
    seeds = as_seeds(seeds)
    shape = tuple(operator.index(size) for size in shape)
    if any(size < 1 for size in shape):
        raise ValueError(f"shape is {shape}; every size must be at least 1")
    out = np.empty((len(seeds), *shape), dtype=np.float32)
    extension().philox_normal(
        seeds.ctypes.data,
        len(seeds),
        math.prod(shape),
        _word("step", step),
        _word("purpose", purpose),
        out.ctypes.data,
    )
    return out


def philox_uniform(seeds, count=1, step=0, purpose=LABELS):
    """Uniform numbers ``((word >> 8) + 0.5) * 2**-24`` in (0, 1].

    seeds: int64 [N]; returns NumPy float32 [N, count]. (The largest rounds to 1.)
    """
    words = _words(seeds, count, step, purpose) >> np.uint32(8)
    return (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)


def philox_randint(seeds, high, step=0, purpose=LABELS):
    """One integer in [0, high) per seed, ``(word * high) >> 32``: random class labels.

    seeds: int64 [N]; high: int in [1, 2**31]. Returns NumPy int64 [N]. No value is more likely than
    another by more than high / 2**32.
    """
    high = operator.index(high)
    if not 1 <= high <= 2**31:
        raise ValueError(f"high is {high}; allowed: 1 to 2147483648 (2**31)")
    words = _words(seeds, 1, step, purpose)[:, 0].astype(np.uint64)
    return ((words * np.uint64(high)) >> np.uint64(32)).astype(np.int64)


def as_seeds(seeds, count=None):
    """seeds as a contiguous NumPy int64 [N]; ValueError or TypeError when they are not that."""
    if hasattr(seeds, "detach"):  # a torch tensor, without importing torch
        seeds = seeds.detach().cpu()
    array = np.asarray(seeds)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"seeds must be a one-dimensional array of integers, one per image; got dtype "
            f"{array.dtype} with shape {list(array.shape)}: see adm_rt.ops.philox.image_seeds"
        )
    if count is not None and len(array) != count:
        raise ValueError(f"seeds has {len(array)} entries for a batch of {count} images")
    return np.ascontiguousarray(array, dtype=np.int64)


def _words(seeds, count, step, purpose):
    """Random words: uint32 [N, count]."""
    seeds, count = as_seeds(seeds), operator.index(count)
    if count < 0:
        raise ValueError(f"count is {count}; it must not be negative")
    words = np.empty((len(seeds), (count + 3) // 4 * 4), dtype=np.uint32)
    extension().philox_words(
        seeds.ctypes.data,
        len(seeds),
        words.shape[1] // 4,
        _word("step", step),
        _word("purpose", purpose),
        words.ctypes.data,
    )
    return words[:, :count]


def _word(name, value):
    value = operator.index(value)
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} is {value}; allowed: 0 to 4294967295 (2**32 - 1)")
    return value
