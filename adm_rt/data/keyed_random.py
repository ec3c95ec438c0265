"""Random numbers of the data sets: pure functions of a key, with nothing to save and no order to
draw in, so that any worker, rank or resumed run gets the same.

The generator is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014). Shuffles are the swap-or-not network (Hoang, Morris & Rogaway, "An enciphering scheme
based on a card shuffle", CRYPTO 2012): any single place of a permutation of any size can be asked
for without making the permutation.
"""

from __future__ import annotations

import numpy as np

# `purpose` keeps the streams of one seed apart. The numbers are part of what a seed means.
GLYPH_DRAWS = 0
GLYPH_LABELS = 1
CROP_DRAWS = 2
EPOCH_ORDER = 3
DIGIT_SPLIT = 4

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(z: np.ndarray) -> np.ndarray:
    """The SplitMix64 output function of the state after z: uint64 [...] -> uint64 [...]."""
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _keys(seed: int, index: np.ndarray, count: int, purpose: int) -> np.ndarray:
    """uint64 [N, count], word k of the stream that belongs to (seed, index[n], purpose)."""
    key = mix(np.array([seed], np.uint64))
    stream = mix(key + mix(index) + np.uint64(purpose))[:, None]
    return mix(stream + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def uniform(seed: int, index: np.ndarray, count: int, purpose: int) -> np.ndarray:
    """float64 [N, count] in [0, 1) from (seed, index[n], k, purpose); index is uint64 [N]."""
    return (_keys(seed, index, count, purpose) >> np.uint64(11)) * 2.0**-53


def shuffled(
    positions: np.ndarray, size: int, seed: int, epoch: int, purpose: int = EPOCH_ORDER
) -> np.ndarray:
    """Entries `positions` of the permutation of 0 .. size - 1 that belongs to (seed, epoch).

    positions: integers [N] in [0, size). Returns int64 [N]. Costs O(N log size) time and O(N)
    memory whatever the size.
    """
    place = np.asarray(positions).astype(np.uint64)
    number = np.uint64(size)
    # Each round pairs the places by a random reflection and swaps every pair or not by a coin that
    # both share. About 6 log2(size) rounds make it indistinguishable from a uniform shuffle.
    rounds = max(32, 6 * int(size).bit_length())
    keys = _keys(seed, np.array([epoch], np.uint64), 2 * rounds, purpose)[0]
    for pivot, coins in zip(keys[:rounds] % number, keys[rounds:]):
        partner = (pivot + (number - place)) % number
        coin = mix(np.maximum(place, partner) ^ coins) & np.uint64(1)
        place = np.where(coin == 1, partner, place)
    return place.astype(np.int64)
