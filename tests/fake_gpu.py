"""A GPU made of CPU memory, whose graphs are functions, and which knows what may be recorded."""

import contextlib
import functools
from unittest import mock

import torch

_WAITING = ("cpu", "numpy", "item", "tolist", "__bool__", "__float__", "__int__", "__array__")


@contextlib.contextmanager
def recording():
    """What a CUDA graph cannot record is an error: whatever waits for the GPU or feeds it."""

    def refused(name):
        def call(*arguments, **options):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")

        return call

    with contextlib.ExitStack() as stack:
        for name in _WAITING:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refused(name)))
        stack.enter_context(mock.patch.object(torch, "from_numpy", refused("from_numpy")))
        yield


class FakeGpu:
    """``TorchGpu`` on the CPU. A captured graph is the function itself, called at each replay."""

    device, stream, torch_device = "cuda:0", 5, torch.device("cpu")

    def __init__(self, identity="NVIDIA H200 sm_90"):
        self.identity, self.captures, self.replays, self.can_capture = identity, 0, 0, True
        self.branches = 0

    def from_numpy(self, values):
        return torch.from_numpy(values)

    def empty(self, shape, dtype=torch.float32):
        return torch.full(shape, 77, dtype=dtype)

    def times(self, count, t):
        return t.expand(count) if isinstance(t, torch.Tensor) else torch.full((count,), float(t))

    def scratch(self, size):
        return torch.empty(size, dtype=torch.uint8)

    def synchronize(self):
        pass

    def side_by_side(self, first, second):
        self.branches += 1
        aside = second()
        return first(), aside

    def capture(self, warm_up, functions):
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        warm_up()
        for function in functions:
            self.captures += 1
            with recording():
                function()
        return [functools.partial(self._replay, function) for function in functions]

    def _replay(self, function):
        self.replays += 1
        with recording():  # a replay runs no code of ours, so nothing of it may wait either
            function()
