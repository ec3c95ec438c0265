"""What a run is going to do and need, in a few lines, before it begins."""

from __future__ import annotations

import torch

from adm_rt.models.checkpoint import empty_module
from adm_rt.trajectory import free_memory

_LARGE = 20_000_000  # parameters


def plan_lines(trainer, cfg, dataset, stream, memory, remarks=(), looks=""):
    """The plan of ``trainer`` (not started) as lines of text.

    cfg: the network's ModelConfig; memory: from ``memory_bytes``; remarks: further lines, on
    initial weights; looks: what is evaluated now and then.
    """
    config, processes = trainer.config, trainer.processes
    parameters = sum(p.numel() for p in trainer.parameters.values())
    size = f"{cfg.image_size}x{cfg.image_size}"
    if cfg.kind == "upsampler":
        size = f"{cfg.small_size}x{cfg.small_size} -> {size}"
    epoch = stream.steps_per_epoch
    count = "images without end" if epoch is None else f"{dataset.num_images:,} images"
    classes = "no classes" if not dataset.num_classes else f"{dataset.num_classes} classes"
    epochs = ""
    if epoch is not None:
        epochs = f", {epoch:,.1f} updates an epoch, {config.iterations / epoch:,.1f} epochs"
    threads = f"{torch.get_num_threads()} threads"
    where = str(processes.device) if processes.device.type != "cpu" else f"CPU, {threads}"
    if processes.world_size > 1:
        where += f", {processes.world_size} processes ({config.parallel})"
    lines = [
        f"adm-rt train: {cfg.kind} {size}, {parameters:,} parameters",
        f"data: {dataset.name}, {count}, {classes}{epochs}",
        f"run: {config.iterations:,} updates of {config.batch_size} images, {config.precision}, "
        f"{where}, into {config.out}",
        _memory_line(memory, processes),
        *remarks,
    ]
    return [*lines, f"looks: {looks} every {config.sample_interval:,} updates"] if looks else lines


def memory_bytes(network, config, world_size=1):
    """(state, activations) in bytes of one process, for float32; before FSDP takes ``network``.

    State: weights, gradients, AdamW's two moments and the averages. Activations: what autograd
    keeps of one microbatch, counted; a convolution's work space and bf16 are not in it.
    """
    state = 4 * sum(p.numel() for p in network.parameters()) * (4 + len(config.ema_rates))
    if config.parallel == "fsdp":
        state //= world_size
    images = -(-config.batch_size // world_size)
    images = min(images, config.microbatch or images)
    return state, images * saved_bytes(network)


def saved_bytes(network):
    """Bytes that autograd keeps of one image's forward pass; ``network`` is left as it was.

    A large network is run on the meta device, where shapes are all there is; for a small one that
    would take longer than running it.
    """
    cfg = network.cfg
    if sum(p.numel() for p in network.parameters()) > _LARGE:
        network = empty_module(cfg).train()
    device = next(network.parameters()).device
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that none has its address
        return tensor

    side = cfg.image_size
    inputs = [torch.zeros(1, cfg.in_channels, side, side, device=device)]
    inputs.append(torch.zeros(1, device=device))
    if cfg.kind == "upsampler":
        inputs.append(torch.zeros(1, 3, cfg.small_size, cfg.small_size, device=device))
    if cfg.class_cond:
        inputs.append(torch.zeros(1, dtype=torch.int64, device=device))
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),  # of dropout
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        network(*inputs)
    return sum(size for size, _ in kept.values())


def _memory_line(memory, processes):
    state, activations = memory
    free = free_memory(str(processes.device))
    line = (
        f"memory: about {_gigabytes(state + activations)} a process ({_gigabytes(state)} for "
        f"weights, gradients, moments and averages), {_gigabytes(free)} are free"
    )
    if state + activations > free:
        line += "; TOO LITTLE: try --microbatch, --use-checkpoint true or a smaller --batch-size"
    return line


def _gigabytes(count):
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"
