"""Philox: published vectors, an independent NumPy oracle, statistics, what bits depend on."""

import math

import numpy as np
import pytest
import torch

from adm_rt.ops import philox
from adm_rt.ops._library import extension, extension_available
from adm_rt.ops.philox import image_seeds, philox_normal, philox_randint, philox_uniform

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)

C = extension()
ISAS = C.available_cpu_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    previous = C.cpu_isa()
    C.set_cpu_isa(request.param)
    yield request.param
    C.set_cpu_isa(previous)


def oracle_words(seeds, counters, step, purpose):
    """Philox4x32-10 in NumPy: uint64 [N, counters, 4]."""
    seeds = np.asarray(seeds, np.int64).view(np.uint64)[:, None]
    block = np.broadcast_to(np.arange(counters, dtype=np.uint64), (len(seeds), counters))
    c = [block, np.full_like(block, step), np.full_like(block, purpose), np.zeros_like(block)]
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    k0, k1 = seeds & low, seeds >> half
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> half) ^ c[1] ^ k0, p1 & low, (p0 >> half) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, axis=-1)


def oracle_normal(seeds, size, step, purpose):
    """Box-Muller on the oracle's words in float64: [N, size]."""
    words = oracle_words(seeds, (size + 3) // 4, step, purpose)
    u = ((words >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24
    radius, angle = np.sqrt(-2 * np.log(u[..., 0::2])), 2 * np.pi * u[..., 1::2]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return z.reshape(len(words), -1)[:, :size]


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
def test_published_vectors(counter, key, expected):
    """The known answers of Random123 for philox4x32-10."""
    assert " ".join(f"{word:08x}" for word in C.philox4x32(counter, key)) == expected


FROZEN = "bf0bca20 bfba876b bf4fdccd beba466e beadc565".split()
FROZEN += "3ee78b16 3e49573c be4726c8 3ef803bf 3d7e23a4".split()
SEEDS = np.array([0, 1, 2**31 - 1, (7 << 32) | 5, 2**63 - 1, -1], np.int64)


def test_words_and_counter_layout():
    words = philox._words(SEEDS, 37, step=11, purpose=2)
    expected = oracle_words(SEEDS, 10, 11, 2).reshape(len(SEEDS), -1)[:, :37]
    np.testing.assert_array_equal(words, expected)


@pytest.mark.parametrize("size", [1, 3, 4, 63, 64, 65, 1000, 12288])
def test_normals_against_float64(isa, size):
    got = philox_normal(SEEDS, (size,), step=999, purpose=1)
    assert got.shape == (len(SEEDS), size) and got.dtype == np.float32
    exact = oracle_normal(SEEDS, size, 999, 1)
    # log and sqrt within 2 ulp of a radius up to 5.9, cos and sin within 1 ulp of 1.
    np.testing.assert_allclose(got, exact, rtol=0, atol=1.5e-6)


def test_radius_near_zero_and_largest():
    """2^21 radii reach both ends of the logarithm; tests/cpp/test_exact_math.py has them all."""
    z = philox_normal(image_seeds(0, 64), (65536,)).astype(np.float64)
    exact = oracle_normal(image_seeds(0, 64), 65536, 0, 0)
    radius, expected = np.hypot(z[:, 0::2], z[:, 1::2]), np.hypot(exact[:, 0::2], exact[:, 1::2])
    assert expected.min() < 2e-3 and expected.max() > 5.2
    assert np.max(np.abs(radius / expected - 1)) < 4e-7  # relative, also where u is next to 1


def test_bits_do_not_depend_on_instruction_set_threads_or_batch():
    seeds = image_seeds(3, 5)
    threads, isa = C.num_threads(), C.cpu_isa()
    expected = philox_normal(seeds, (3, 65, 67), step=7, purpose=1)
    try:
        for name in ISAS:
            C.set_cpu_isa(name)
            for count in (1, 2, 5):
                C.set_num_threads(count)
                got = philox_normal(seeds, (3, 65, 67), step=7, purpose=1)
                np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    finally:
        C.set_num_threads(threads)
        C.set_cpu_isa(isa)
    one_by_one = np.concatenate(
        [philox_normal(seeds[i : i + 1], (3, 65, 67), step=7, purpose=1) for i in range(5)]
    )
    np.testing.assert_array_equal(one_by_one, expected)
    prefix = philox_normal(seeds, (100,), step=7, purpose=1)
    np.testing.assert_array_equal(prefix, expected.reshape(5, -1)[:, :100])


def test_stream_is_frozen():
    """Bits that saved seeds rely on: a change here changes everybody's images."""
    bits = philox_normal(image_seeds(42, 2, first=3), (1, 1, 5), step=2, purpose=1)
    assert [f"{b:08x}" for b in bits.view(np.uint32).ravel()] == FROZEN


def test_seed_step_and_purpose_all_matter():
    base = philox_normal([5], (4096,), step=1, purpose=1)
    others = [
        philox_normal([6], (4096,), step=1, purpose=1),
        philox_normal([5 | 1 << 32], (4096,), step=1, purpose=1),
        philox_normal([5], (4096,), step=2, purpose=1),
        philox_normal([5], (4096,), step=1, purpose=0),
    ]
    for other in others:
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.06  # 4 sigma


def test_distribution():
    """Moments and Kolmogorov-Smirnov of 2^22 values (1 % level; the data are fixed by the seed)."""
    z = philox_normal(image_seeds(1, 16), (2**18,)).astype(np.float64).ravel()
    n = z.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - moment) < 4 * math.sqrt(variance / n)
    values = np.sort(z)
    cdf = 0.5 * torch.special.erfc(torch.from_numpy(-values / math.sqrt(2))).numpy()
    rank = np.arange(n)
    distance = max(np.max(cdf - rank / n), np.max((rank + 1) / n - cdf))
    assert distance < 1.63 / math.sqrt(n)
    pairs = z.reshape(-1, 2)  # the two normals of one Box-Muller pair
    assert abs(np.mean(pairs[:, 0] * pairs[:, 1])) < 4 / math.sqrt(len(pairs))
    squares = (pairs**2 - 1) / math.sqrt(2)
    assert abs(np.mean(squares[:, 0] * squares[:, 1])) < 4 / math.sqrt(len(pairs))


def test_uniform_and_labels():
    u = philox_uniform(image_seeds(0, 100), 1001)
    assert u.shape == (100, 1001) and u.dtype == np.float32
    assert u.min() > 0 and u.max() <= 1 and abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.size)
    words = oracle_words(image_seeds(0, 100), 1, 0, 2)[:, 0, 0]
    np.testing.assert_array_equal(u[:, 0], np.float32(((words >> np.uint64(8)) + 0.5) * 2.0**-24))
    labels = philox_randint(image_seeds(9, 36000), 36)
    assert labels.dtype == np.int64 and labels.min() == 0 and labels.max() == 35
    counts = np.bincount(labels, minlength=36)
    assert np.sum((counts - 1000) ** 2 / 1000) < 66.6  # chi-squared, 35 degrees, 0.1 %
    np.testing.assert_array_equal(philox_randint(image_seeds(9, 5, first=7), 36), labels[7:12])
    assert set(philox_randint([1, 2, 3], 1)) == {0}


def test_seeds():
    seeds = image_seeds(2, 3, first=10)
    assert seeds.dtype == np.int64 and list(seeds) == [(2 << 32) | i for i in (10, 11, 12)]
    assert image_seeds(2**31 - 1, 1)[0] == (2**31 - 1) << 32
    assert len(image_seeds(0, 0)) == 0 and philox_normal([], (3, 2, 2)).shape == (0, 3, 2, 2)
    expected = philox_normal([1, 2], (3,))
    np.testing.assert_array_equal(philox_normal(torch.tensor([1, 2]), (3,)), expected)
    np.testing.assert_array_equal(philox_normal(np.array([1, 9, 2])[::2], (3,)), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image_seeds(-1, 1), "seed is -1; allowed: 0 to 2147483647"),
        (lambda: image_seeds(2**31, 1), "seed is 2147483648"),
        (lambda: image_seeds(0, 2, first=2**32 - 1), "image indices"),
        (lambda: philox_normal([0], (3, 0)), r"shape is \(3, 0\)"),
        (lambda: philox_normal([0], (3,), step=-1), "step is -1; allowed: 0 to 4294967295"),
        (lambda: philox_normal([0], (3,), purpose=2**32), "purpose is 4294967296"),
        (lambda: philox_normal([0.5], (3,)), "one-dimensional array of integers"),
        (lambda: philox_normal(3, (3,)), "one-dimensional array of integers"),
        (lambda: philox_randint([0], 0), "high is 0"),
        (lambda: philox_uniform([0], -1), "count is -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
