"""What the engines on CUDA need of the GPU, by way of torch: the device, buffers, CUDA graphs."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from adm_rt.ops._library import why_no_cuda_kernels


def resolve_device(device="auto"):
    """torch.device for "auto" | "cpu" | "cuda" | "cuda:N"; ValueError when it is not there.

    "auto" is CUDA where torch sees a GPU and our kernels for it are built.
    """
    if device == "auto":
        usable = torch.cuda.is_available() and not why_no_cuda_kernels()
        return torch.device("cuda" if usable else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r} is not a device; use 'auto', 'cpu' or 'cuda'"
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: this engine runs on 'cpu' and 'cuda' only")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            why = "it was built without CUDA" if torch.version.cuda is None else "it sees no GPU"
            raise ValueError(
                f"device={device!r} cannot be used: torch {torch.__version__} is here, but {why}; "
                "use device='cpu', or 'auto' to take whatever is there"
            )
        if (resolved.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices, "
                "numbered from 0"
            )
    return resolved


class TorchGpu:
    """One CUDA device, for an engine of that name.

    ``torch_device``; ``device``: its name, "cuda:0". Raises ValueError, with the way out, where
    there is none.
    """

    def __init__(self, device="auto", engine="tensorrt"):
        if device == "cpu":
            raise ValueError(
                f"device='cpu': the engine {engine!r} runs on 'cuda' only; on the CPU use "
                "engine='native'"
            )
        if not torch.cuda.is_available():
            why = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
            raise ValueError(
                f"engine={engine!r} needs an NVIDIA GPU that torch can use, but torch "
                f"{torch.__version__} {why}; on the CPU use engine='native'"
            )
        resolved = resolve_device(device)
        index = torch.cuda.current_device() if resolved.index is None else resolved.index
        self.torch_device = torch.device("cuda", index)
        self.device = str(self.torch_device)
        self._side = None

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

    def times(self, count, t):
        """float32 [count], all t: a number, or a tensor [1] on the device."""
        if isinstance(t, torch.Tensor):
            return t.expand(count)
        return torch.full((count,), float(t), dtype=torch.float32, device=self.torch_device)

    def scratch(self, size):
        """Bytes; torch aligns to 512, TensorRT wants 256."""
        return self.empty((max(1, size),), torch.uint8)

    def synchronize(self):
        torch.cuda.synchronize(self.torch_device)

    def side_by_side(self, first, second):
        """(first(), second()): the second on a stream beside the current one, which waits for it.

        While a graph is recorded these are two branches of it. The allocator gives memory that the
        second has freed only to what comes after the next fork, which waits for everything here.
        """
        current = torch.cuda.current_stream(self.torch_device)
        if self._side is None:
            self._side = torch.cuda.Stream(self.torch_device)
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                aside = second()
            here = first()
        finally:  # a recording must not end with a branch that is open
            current.wait_stream(self._side)
        return here, aside

    def capture(self, warm_up, functions):
        """Record each function, called once, as a CUDA graph -> list of replays.

        warm_up: called before on the same stream, so that everything is loaded and allocated. The
        graphs share one pool of memory: what is to outlive a replay lies in tensors that were there
        before. A replay runs the kernels on the current stream. Raises RuntimeError for what cannot
        be recorded.
        """
        with torch.cuda.device(self.torch_device):
            current = torch.cuda.current_stream()
            stream = torch.cuda.Stream()
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    warm_up()
                current.wait_stream(stream)
                pool, graphs = torch.cuda.graph_pool_handle(), []
                for function in functions:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream):
                        function()
                    graphs.append(graph)
            finally:  # a recording that breaks off can leave its stream the current one
                torch.cuda.set_stream(current)
        return [graph.replay for graph in graphs]


@contextlib.contextmanager
def chosen_convolutions(exact=False):
    """cuDNN times its algorithms for each new shape, among those that give the same bits again.

    exact: float32 convolutions are that, not TF32, which torch allows unless told otherwise.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    cudnn.benchmark, cudnn.deterministic = True, True
    if exact:
        cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before
