"""The random numbers of training: those of image i in step s are a function of (seed, s, i).

Philox (``adm_rt.ops.philox``) with the key (seed, i) and the counter word s, so a run gives the
same timesteps and noise on any number of processes, in microbatches of any size, after a resume.
Dropout is the exception: torch draws its masks, from a generator seeded by (seed, step, rank,
microbatch).
"""

import hashlib

import numpy as np
import torch

from adm_rt.ops.philox import philox_normal, philox_randint

# Purposes (a word of the counter): numbers drawn for one never meet those of another. The first 16
# belong to sampling.
TIMESTEP = 16
NOISE = 17
CLASS_DROPOUT = 18
LOW_RES_NOISE = 19
LOW_RES_LEVEL = 20
NOISE_AMPLITUDE = 21


class StepRandom:
    """Random numbers of the images ``first .. first + count - 1`` of update ``step``.

    ``random[a:b]`` are those of the images a to b - 1 of them. All tensors are on the CPU.
    """

    def __init__(self, seed, step, first, count):
        self.seed = seed
        self.step = step
        self.first = first
        self.count = count
        index = np.arange(first, first + count, dtype=np.int64) % 2**32
        self._seeds = np.int64(seed << 32) | index

    def __len__(self):
        return self.count

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.count)
        return StepRandom(self.seed, self.step, self.first + start, max(stop - start, 0))

    def timesteps(self, num, purpose=TIMESTEP):
        """Uniform integers in [0, num): int64 [n]."""
        return torch.from_numpy(philox_randint(self._seeds, num, self.step, purpose))

    def uniform(self, purpose):
        """Uniform numbers in (0, 1), multiples of 2**-32: float64 [n]."""
        draws = philox_randint(self._seeds, 2**31, self.step, purpose)
        return torch.from_numpy((draws + 0.5) / 2.0**31)

    def normal(self, shape, purpose=NOISE):
        """Standard normal numbers, float32 [n, *shape]; shape is that of one image."""
        return torch.from_numpy(philox_normal(self._seeds, shape, self.step, purpose))


def torch_seed(seed, step, rank, microbatch):
    """The seed of torch's generators for one microbatch: 63 bits mixed from all four numbers."""
    digest = hashlib.sha256(f"{seed},{step},{rank},{microbatch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
