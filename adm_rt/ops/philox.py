"""Counter-based random numbers: noise as a pure function of (seed, step, purpose, element).

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). The key is the
64-bit seed of one image, the counter is ``(element // 4, step, purpose, 0)`` and the four words of
a counter serve the elements ``4k .. 4k + 3``. So an image's noise does not depend on the batch it is
drawn in, on the number of threads, or on what was drawn before.
"""

import operator

import numpy as np

INITIAL_NOISE = 0  # purpose of x_T, always at step 0
STEP_NOISE = 1  # purpose of the noise added by sampler step `step`
LABELS = 2  # purpose of randomly chosen class labels


def image_seeds(seed, num_images, first=0):
    """Seeds of the images ``first .. first + num_images - 1`` of a run: ``(seed << 32) | index``.

    seed: int in [0, 2**31). Returns int64 [num_images]. Raises ValueError out of range.
    """
    seed, num_images, first = (operator.index(v) for v in (seed, num_images, first))
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed}; allowed: 0 .. 2**31 - 1 (the upper half is the image index)")
    if num_images < 0 or first < 0 or first + num_images > 2**32:
        raise ValueError(
            f"num_images={num_images} and first={first} name image indices outside 0 .. 2**32 - 1"
        )
    return (np.int64(seed) << np.int64(32)) | np.arange(first, first + num_images, dtype=np.int64)


def _philox4x32(counter, key):
    """Ten rounds on uint32 arrays counter [4, ...], key [2, ...]."""
    c = [np.asarray(w, dtype=np.uint64) for w in counter]
    k0, k1 = (np.asarray(w, dtype=np.uint64) for w in key)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c


def _words(seeds, size, step, purpose):
    seeds = np.asarray(seeds).astype(np.int64).reshape(-1).view(np.uint64)[:, None]
    blocks = np.arange((size + 3) // 4, dtype=np.uint64)[None]
    key = (seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32))
    zero = np.zeros_like(blocks)
    return _philox4x32((blocks, zero + np.uint64(step), zero + np.uint64(purpose), zero), key)


def philox_normal(seeds, shape, step=0, purpose=INITIAL_NOISE):
    """Standard normal noise: seeds int64 [N], shape (C, H, W) -> float32 [N, C, H, W]."""
    size = int(np.prod(shape))
    u = [(w >> np.uint64(8)).astype(np.float64) * 2.0**-24 + 2.0**-25 for w in _words(seeds, size, step, purpose)]
    normals = []
    for a, b in ((u[0], u[1]), (u[2], u[3])):
        radius = np.sqrt(-2.0 * np.log(a))
        normals += [radius * np.cos(2 * np.pi * b), radius * np.sin(2 * np.pi * b)]
    out = np.stack(normals, axis=-1).astype(np.float32).reshape(len(u[0]), -1)[:, :size]
    return np.ascontiguousarray(out).reshape(len(u[0]), *shape)


def philox_uniform(seeds, count=1, step=0, purpose=LABELS):
    """Uniform numbers in (0, 1): seeds int64 [N] -> float32 [N, count]."""
    words = np.stack(_words(seeds, count, step, purpose), axis=-1)
    out = words.reshape(words.shape[0], -1)[:, :count]
    return ((out >> np.uint64(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)


def philox_randint(seeds, high, step=0, purpose=LABELS):
    """One integer in [0, high) per seed: seeds int64 [N] -> int64 [N]."""
    word = _words(seeds, 1, step, purpose)[0][:, 0]
    return ((word * np.uint64(high)) >> np.uint64(32)).astype(np.int64)
