"""What the TensorRT engine needs of the GPU, by way of torch: buffers, the stream, CUDA graphs."""

from __future__ import annotations

import numpy as np
import torch

from adm_rt.engines.torch_engine import resolve_device


class TorchGpu:
    """One CUDA device. Raises ValueError, with the way out, where there is none."""

    def __init__(self, device="auto"):
        if device == "cpu":
            raise ValueError(
                "device='cpu': the TensorRT engine runs on 'cuda' only; on the CPU use "
                "engine='native'"
            )
        if not torch.cuda.is_available():
            why = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
            raise ValueError(
                f"engine='tensorrt' needs an NVIDIA GPU that torch can use, but torch "
                f"{torch.__version__} {why}; on the CPU use engine='native'"
            )
        resolved = resolve_device(device)
        index = torch.cuda.current_device() if resolved.index is None else resolved.index
        self.torch_device = torch.device("cuda", index)
        self.device = str(self.torch_device)

    @property
    def identity(self):
        """What an engine is built for: name and compute capability."""
        properties = torch.cuda.get_device_properties(self.torch_device)
        return f"{properties.name} sm_{properties.major}{properties.minor}"

    @property
    def stream(self):
        """The current stream as an int."""
        return torch.cuda.current_stream(self.torch_device).cuda_stream

    def from_numpy(self, values: np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.torch_device)

    def empty(self, shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def full(self, count, value):
        return torch.full((count,), float(value), dtype=torch.float32, device=self.torch_device)

    def scratch(self, size):
        """Bytes; torch aligns to 512, TensorRT wants 256."""
        return self.empty((max(1, size),), torch.uint8)

    def synchronize(self):
        torch.cuda.synchronize(self.torch_device)

    def capture(self, warm_up, function):
        """Run ``function()`` once on a stream of its own while CUDA records it.

        warm_up: called before on that stream, so that everything is loaded and allocated. Returns
        (replay, what function returned): ``replay()`` runs the recorded kernels on the current
        stream and fills those tensors anew. Raises RuntimeError for what cannot be recorded.
        """
        stream = torch.cuda.Stream(self.torch_device)
        stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(stream):
            warm_up()
        torch.cuda.current_stream(self.torch_device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = function()
        return graph.replay, result
