"""What the tests of exported graphs share: inputs, running a graph, comparing it with torch."""

import numpy as np
import torch

from adm_rt.models.classifier_gradient import ClassifierGradient

BATCHES = (1, 2, 5)
LIMITS = {"float32": 2e-5, "float16": 2e-2}  # of the largest value or of 1, whichever is less


def unet_inputs(cfg, count, seed=0):
    """name -> array of a UNet's graph; every image has its own timestep."""
    g = torch.Generator().manual_seed(seed)
    given = {
        "x": torch.randn(count, cfg.in_channels, cfg.image_size, cfg.image_size, generator=g),
        "t": torch.rand(count, generator=g) * 999,
    }
    if cfg.class_cond or cfg.kind == "classifier":
        rows = cfg.embedding_rows or cfg.num_classes
        given["y"] = torch.randint(0, rows, (count,), generator=g)
    if cfg.kind == "upsampler":
        given["low_res"] = torch.rand(count, cfg.in_channels, *[cfg.small_size] * 2, generator=g)
    return {name: tensor.numpy() for name, tensor in given.items()}


def torch_output(network, given, loss_scale=1.0):
    """What the graph of ``network`` (for a classifier: of its gradient) shall give."""
    if network.cfg.kind == "classifier":
        network = ClassifierGradient(network, loss_scale)
    with torch.no_grad():
        return network(**{name: torch.from_numpy(a) for name, a in given.items()}).numpy()


def session(path):
    """An ONNX Runtime session on the CPU of a file (a path) or of a model's bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        path if isinstance(path, bytes) else str(path), options, providers=["CPUExecutionProvider"]
    )


def assert_parity(network, path, dtype="float32", batches=BATCHES):
    """The graph at ``path`` equals ``network``, within ``LIMITS[dtype]``, at every batch size."""
    running = session(path)
    for count in batches:
        given = unet_inputs(network.cfg, count, seed=count)
        expected = torch_output(network, given)
        (found,) = running.run(None, given)
        assert found.dtype == np.float32 and found.shape == expected.shape
        error = np.abs(found - expected).max() / min(1.0, np.abs(expected).max())
        assert error <= LIMITS[dtype], f"batch {count}: {error:.2e}"
