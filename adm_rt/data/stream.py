"""The order in which training meets the images: a pure function of (seed, step)."""

from __future__ import annotations

import os
import weakref

import numpy as np

from adm_rt.data.arguments import check_integer
from adm_rt.data.keyed_random import shuffled
from adm_rt.data.workers import Workers

_MAX_WORKERS = 256
# Images of one job: enough that sets that draw many at once gain by it, few enough that Ctrl-C and
# the end of the program, which wait for the jobs that have begun, come soon.
_CHUNK = 16


class BatchStream:
    """Batches of a data set, numbered by the training step, for any number of processes.

    The images of all steps are one sequence: step s has its positions s * batch_size up to
    (s + 1) * batch_size - 1. A set of n images is met in epochs of n positions, each in an order of
    its own (the permutation of (seed, epoch)); a batch may run over from one epoch into the next,
    so every batch is full and no image is left out. An endless set is met in its own order. The
    position is also the `draw` of the image, so that it is cropped anew in every epoch.

    There is no state: a resumed run needs the step only, and rank r of w processes can ask for its
    share of any step. dataset: from open_dataset. batch_size: of all processes together.
    seed: of the order. workers: threads that prepare the next step meanwhile (0: none); values do
    not depend on it. shuffle=False: every epoch in the set's own order.
    """

    def __init__(self, dataset, batch_size: int, seed: int, *, workers: int = 0, shuffle=True):
        if not hasattr(dataset, "get_many"):
            raise TypeError(
                f"dataset must be what open_dataset gives, got {type(dataset).__name__}"
            )
        self.dataset = dataset
        self.batch_size = check_integer("batch_size", batch_size, 1, 2**31 - 1)
        self.seed = check_integer("seed", seed, 0, 2**63 - 1)
        self.workers = check_integer("workers", workers, 0, _MAX_WORKERS)
        self.shuffle = bool(shuffle)
        self._pool = None
        self._ahead = None  # (step, rank, world_size), futures

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps in which every image is met once; None for an endless set."""
        if self.dataset.num_images is None:
            return None
        return self.dataset.num_images / self.batch_size

    def describe(self) -> dict:
        """What the batches depend on beside batch_size, for JSON: see Dataset.describe."""
        return {
            "dataset": self.dataset.describe(),
            "data_order_seed": self.seed,
            "shuffle": self.shuffle,
        }

    def share(self, rank: int = 0, world_size: int = 1) -> tuple[int, int]:
        """(first, last + 1) of the places in a batch that are the rank's.

        Shares are contiguous, in rank order, and differ by at most one image; with more ranks than
        images some are empty.
        """
        world_size = check_integer("world_size", world_size, 1, 2**31 - 1)
        rank = check_integer("rank", rank, 0, world_size - 1)
        return self.batch_size * rank // world_size, self.batch_size * (rank + 1) // world_size

    def indices(self, step: int, rank: int = 0, world_size: int = 1):
        """(indices, draws), both int64 [n]: which images the rank meets in `step`."""
        step = check_integer("step", step, 0, (2**63 - 1) // self.batch_size - 1)
        first, stop = self.share(rank, world_size)
        positions = step * self.batch_size + np.arange(first, stop, dtype=np.int64)
        size = self.dataset.num_images
        if size is None:
            return positions, positions
        epochs, places = np.divmod(positions, size)
        if not self.shuffle:
            return places, positions
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            indices[rows] = shuffled(places[rows], size, self.seed, int(epoch))
        return indices, positions

    def batch(self, step: int, rank: int = 0, world_size: int = 1):
        """The rank's share of the batch of `step`.

        Returns (images float32 [n, 3, S, S] in [-1, 1], labels int64 [n], first): torch tensors,
        labels -1 where the set has none, and the place in the global batch of the first image.
        DataError names an image that cannot be read.
        """
        import torch

        images, labels = self._get(step, rank, world_size)
        # The published arithmetic: NumPy's float32 v / 127.5 - 1.
        values = images.transpose(0, 3, 1, 2).astype(np.float32, order="C")
        values /= np.float32(127.5)
        values -= np.float32(1)
        return torch.from_numpy(values), torch.from_numpy(labels), self.share(rank, world_size)[0]

    def close(self):
        """Stops the workers; the stream can still be used."""
        pool, self._pool, self._ahead = self._pool, None, None
        if pool is not None:
            pool.close()

    def _get(self, step, rank, world_size):
        if not self.workers:
            return self.dataset.get_many(*self.indices(step, rank, world_size))
        if self._pool is None or self._pool.pid != os.getpid():
            self._pool, self._ahead = Workers(self.workers), None
            weakref.finalize(self, self._pool.close)  # also at exit
        key = (step, rank, world_size)
        if self._ahead is not None and self._ahead[0] == key:
            futures = self._ahead[1]
        else:
            self._cancel()
            futures = self._submit(*key)
        self._ahead = ((step + 1, rank, world_size), self._submit(step + 1, rank, world_size))
        try:
            parts = [future.result() for future in futures]
        except BaseException:  # Ctrl-C too: nothing may go on in the background
            self._cancel()
            for future in futures:
                future.cancel()
            raise
        return tuple(np.concatenate(arrays) for arrays in zip(*parts))

    def _submit(self, step, rank, world_size):
        indices, draws = self.indices(step, rank, world_size)
        count = max(-(-len(indices) // _CHUNK), min(len(indices), self.workers), 1)
        chunks = zip(np.array_split(indices, count), np.array_split(draws, count))
        return [self._pool.submit(self.dataset.get_many, *chunk) for chunk in chunks]

    def _cancel(self):
        if self._ahead is not None:
            for future in self._ahead[1]:
                future.cancel()
            self._ahead = None
