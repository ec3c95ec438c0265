"""How much memory a run needs and how much there is."""

from __future__ import annotations


def activation_bytes(cfg, gradient=False):
    """Rough float32 activation memory of one image, in bytes; with ``gradient``, kept for autograd.

    Forward alone holds the skip connections and a few maps of the widest level; autograd holds
    about eight maps per block. An estimate for engines that do not plan their memory, good to a
    factor of two.
    """
    levels = list(zip(cfg.level_channels, (cfg.image_size >> i for i in range(99)), strict=False))
    maps = [int(width) * side * side for width, side in levels]
    blocks = (cfg.num_res_blocks + 1) * sum(maps)
    if gradient:
        return 4 * 8 * blocks
    return 4 * (blocks * (cfg.kind != "classifier") + 8 * max(maps))


def free_memory(device="cpu"):
    """Free bytes on the device: CUDA's answer (4 GiB where no torch can ask for it), else
    MemAvailable, else 2 GiB."""
    if device.startswith("cuda"):
        try:
            import torch

            return torch.cuda.mem_get_info(device)[0]
        except (ImportError, AssertionError):  # no torch, or one without CUDA
            return 4 << 30
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return 2 << 30


def require_memory(needed, what, way_out=""):
    """MemoryError when ``needed`` bytes are more than are free.

    The system would hand them out and then kill the process that touches them.
    """
    if needed < _ALWAYS_THERE:
        return
    free = free_memory()
    if needed > free:
        raise MemoryError(
            f"{what} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free{way_out}"
        )


_ALWAYS_THERE = 64 << 20
