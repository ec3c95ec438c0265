"""Streams, forks and recordings of TorchGpu, against a torch.cuda that writes down its calls."""

import contextlib

import pytest
import torch

from adm_rt.engines.torch_engine import TorchEngine
from adm_rt.engines.torch_gpu import TorchGpu, chosen_convolutions


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """The part of torch.cuda that is used here. ``log``: what was done, in order."""

    def __init__(self):
        self.log, self.made = [], 0
        self.now = Stream(self, "main")

    def make_stream(self, device=None):
        self.made += 1
        return Stream(self, f"stream{self.made}")

    def current_stream(self, device=None):
        return self.now

    def set_stream(self, stream):
        self.now = stream

    @contextlib.contextmanager
    def on(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        self.log.append(f"record {graph.number} in {pool} on {stream.name}")
        before, self.now = self.now, stream
        yield  # an error leaves the stream the current one, as torch does when the end fails
        self.now = before
        self.log.append(f"recorded {graph.number}")

    def make_graph(self):
        graphs = sum(line.startswith("record ") for line in self.log)
        return type(
            "Graph", (), {"number": graphs, "replay": lambda _: self.log.append("replay")}
        )()


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "current_stream": fake.current_stream,
        "set_stream": fake.set_stream,
        "Stream": fake.make_stream,
        "stream": fake.on,
        "device": lambda device: contextlib.nullcontext(),
        "graph": fake.graph,
        "CUDAGraph": fake.make_graph,
        "graph_pool_handle": lambda: "pool",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def noted(cuda, text):
    return lambda: cuda.log.append(f"{text} on {cuda.now.name}") or text


def test_functions_are_recorded_in_one_pool_after_a_warm_up_on_their_stream(cuda):
    replays = TorchGpu("cuda:1").capture(
        noted(cuda, "warm up"), [noted(cuda, "first"), noted(cuda, "second")]
    )
    assert cuda.log == [
        "stream1 waits for main",
        "warm up on stream1",
        "main waits for stream1",
        "record 0 in pool on stream1",
        "first on stream1",
        "recorded 0",
        "record 1 in pool on stream1",
        "second on stream1",
        "recorded 1",
    ]
    assert cuda.now.name == "main"
    replays[1]()
    assert cuda.log[-1] == "replay" and len(replays) == 2


def test_a_recording_that_breaks_off_gives_the_stream_back(cuda):
    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    for warm_up, function in ((noted(cuda, "warm up"), fails), (fails, noted(cuda, "first"))):
        with pytest.raises(RuntimeError, match="not permitted"):
            TorchGpu("cuda").capture(warm_up, [function])
        assert cuda.now.name == "main"


def test_the_second_runs_aside_and_is_waited_for(cuda):
    gpu = TorchGpu("cuda")
    for _ in range(2):
        cuda.log.clear()
        assert gpu.side_by_side(noted(cuda, "a"), noted(cuda, "b")) == ("a", "b")
        assert cuda.log == [
            "stream1 waits for main",
            "b on stream1",
            "a on main",
            "main waits for stream1",
        ]
        assert cuda.now.name == "main"


@pytest.mark.parametrize("which", [0, 1])
def test_a_branch_that_fails_is_joined_all_the_same(cuda, which):
    def fails():
        raise RuntimeError("no memory")

    functions = [noted(cuda, "a"), noted(cuda, "b")]
    functions[which] = fails
    with pytest.raises(RuntimeError, match="no memory"):
        TorchGpu("cuda").side_by_side(*functions)
    assert cuda.log[-1] == "main waits for stream1" and cuda.now.name == "main"


def test_times(cuda, monkeypatch):
    gpu = TorchGpu("cuda")
    t = torch.tensor([7.5])
    assert gpu.times(3, t).tolist() == [7.5] * 3
    assert gpu.times(3, t).data_ptr() == t.data_ptr()  # what the table says at each replay


def test_convolutions_are_chosen_by_time_among_those_that_repeat():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    for exact in (False, True):
        with pytest.raises(KeyError), chosen_convolutions(exact):
            assert cudnn.benchmark and cudnn.deterministic
            assert cudnn.allow_tf32 == (before[2] and not exact)
            raise KeyError
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_the_engine_that_asked_is_named():
    with pytest.raises(ValueError, match="engine='torch' needs an NVIDIA GPU.*native"):
        TorchGpu("cuda", TorchEngine.name)
    with pytest.raises(ValueError, match="device='cpu': the engine 'tensorrt' runs on 'cuda'"):
        TorchGpu("cpu")
