"""The tensors of a sharded run on disk: each process writes and reads its own shards.

torch.distributed.checkpoint does the work, in its safetensors form: nothing is pickled, no process
holds a whole tensor, and any number of processes can read what any other number wrote. It is
imported where it is used, for that takes as long as half of torch.
"""

import contextlib
import inspect
import warnings

import torch

from adm_rt.errors import CheckpointError


def supported():
    """Whether this torch has the safetensors form for shards (2.6 has not)."""
    from torch.distributed import checkpoint

    writer = getattr(checkpoint, "HuggingFaceStorageWriter", None)
    return writer is not None and "save_distributed" in inspect.signature(writer).parameters


def write(folder, tensors):
    """Write ``tensors`` by name, whole or in shards, into ``folder``; every process calls this.

    Raises the OSError of a process that could not write on all of them.
    """
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _failures():
        checkpoint.save(tensors, storage_writer=writer)


def shapes(folder):
    """The whole shape of every tensor in ``folder``, by name."""
    found = _reader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items()}


def read(folder, tensors, together):
    """Fill ``tensors`` by name, whole or in shards, from ``folder``.

    together: they are shards and every process calls this; else each reads for itself.
    """
    from torch.distributed import checkpoint

    with _failures():
        checkpoint.load(tensors, storage_reader=_reader(folder), no_dist=not together)


def _reader(folder):
    if not supported():
        raise CheckpointError(
            f"{folder} was written in shards, which torch {torch.__version__} cannot read; "
            "continue with the version that wrote it."
        )
    from torch.distributed import checkpoint

    return checkpoint.HuggingFaceStorageReader(str(folder))


@contextlib.contextmanager
def _failures():
    """Raise what went wrong in a process in the place of torch's collection of failures."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            if isinstance(cause, OSError):
                raise cause from error
            raise CheckpointError(f"the shards of rank {rank}: {cause}") from error
