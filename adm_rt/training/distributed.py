"""The processes of one training run: who they are, what they tell each other, FSDP2.

Only RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read, which torchrun sets and
every other launcher can; CUDA_VISIBLE_DEVICES is left to CUDA.
"""

import contextlib
import dataclasses
import datetime
import os
import sys
import warnings

import torch
import torch.distributed as dist

from adm_rt.engines.base import UNUSED_GPU
from adm_rt.errors import ProcessLostError
from adm_rt.ops._library import why_no_cuda_kernels


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of the run. ``started``: the process group was made here."""

    rank: int
    world_size: int
    device: torch.device
    started: bool = False

    @property
    def is_main(self):
        """Whether this is rank 0, which alone prints, logs and writes."""
        return self.rank == 0

    def gather_numbers(self, *numbers):
        """Integers of every process: a list by rank of lists."""
        if self.world_size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return [numbers.tolist() for numbers in everyone]

    def gather_columns(self, table, counts):
        """Tables [k, counts[rank]] of every process, side by side in the order of ranks: on CPU."""
        if self.world_size == 1:
            return table.cpu()
        wide = table.new_zeros(table.shape[0], max(counts))
        wide[:, : table.shape[1]] = table
        everyone = [torch.empty_like(wide) for _ in range(self.world_size)]
        dist.all_gather(everyone, wide)
        return torch.cat([part[:, :n] for part, n in zip(everyone, counts)], 1).cpu()

    def from_main(self, value):
        """Rank 0's ``value`` (picklable) on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def close(self):
        """End the process group if it was started here."""
        if self.started and dist.is_initialized():
            dist.destroy_process_group()


def start(device="auto", timeout=600.0):
    """Join the processes that the environment names, or the process group that is there already.

    device: "auto", "cpu" or "cuda"; timeout: seconds one waits for the others. Returns
    ``Processes``. Raises ValueError for an environment or device that cannot be.
    """
    rank, world_size = environment()
    device = _device(device, world_size)
    if dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size(), device)
    if world_size == 1:
        return Processes(0, 1, device)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(
                f"WORLD_SIZE={world_size}, but {name} is not set: start the processes with "
                "torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
            )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_loss(f"rank {rank} at the start"):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
    return Processes(rank, world_size, device, started=True)


@contextlib.contextmanager
def process_group(device="auto", timeout=600.0):
    """``start(device, timeout)`` for the length of a block; gives ``Processes``."""
    processes = start(device, timeout)
    try:
        yield processes
    except Exception:
        raise  # the others may be gone, and closing would wait for them
    except BaseException:
        processes.close()  # Ctrl-C or SIGTERM, on which all have agreed
        raise
    processes.close()


def environment():
    """(rank, world_size) by RANK and WORLD_SIZE; (0, 1) where they are not set."""
    rank, world_size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} must be in [0, WORLD_SIZE={world_size}).")
    return rank, world_size


def _integer(name, default):
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} in the environment is not a number.")
    return int(text)


def _device(name, world_size):
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} must be 'auto', 'cpu' or 'cuda'.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device; 'cpu' always works.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if name == "auto" and (missing := why_no_cuda_kernels()):
        print(f"adm-rt: {UNUSED_GPU}{missing}", file=sys.stderr, flush=True)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = _integer("LOCAL_RANK", 0) if world_size > 1 and count > 1 else 0
    if index >= count:
        raise ValueError(
            f"LOCAL_RANK={index}, but this machine shows {count} CUDA devices: start at most "
            f"{count} processes on it."
        )
    return torch.device("cuda", index)


_LOST = ("connection", "timed out", "timeout", "peer", "gloo", "nccl", "socket")


@contextlib.contextmanager
def process_loss(place):
    """Turn torch's error about a process that is gone or silent into ``ProcessLostError``.

    place: where the run was, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(w in str(error).lower() for w in _LOST)
        if not lost or isinstance(error, ProcessLostError):
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        raise ProcessLostError(
            f"{place}: another process of the run is gone or does not answer ({reason})"
        ) from error


# ---- FSDP2: weights, gradients and optimiser state in shards ----


def can_shard(device):
    """Whether this torch's FSDP2 runs on ``device``: that of 2.6 does not on the CPU."""
    return device.type != "cpu" or hasattr(torch.cpu.Stream, "record_event")


def shard(model, processes):
    """Apply ``fully_shard`` to every residual and attention block, then to the whole ``model``.

    Raises ValueError where this torch cannot.
    """
    if not can_shard(processes.device):
        raise ValueError(
            f"parallel='fsdp': torch {torch.__version__} cannot shard on the CPU. Use "
            "parallel='ddp', CUDA devices or a newer torch."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from adm_rt.models.blocks import AttentionBlock, ResBlock

    # An attention block's output is a view, but nothing in the networks changes a tensor in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for module in model.modules():
        if isinstance(module, AttentionBlock | ResBlock):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    """``tensor`` with all its shards; every process has to call this, for the same tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def assign(target, value):
    """Copy ``value`` (whole, the same on every process) into ``target``, which may be in shards."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
