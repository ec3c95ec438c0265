"""``adm-rt bench sample`` with tiny models: rows, comparison before timing, processes, planning."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_config

from adm_rt import benchmarking
from adm_rt.benchmarking import contenders, machine, sample, sampling_cases, worker, workloads
from adm_rt.benchmarking.contenders import CONTENDERS, Entry, Setup
from adm_rt.benchmarking.sampling_cases import BenchModel, Case
from adm_rt.benchmarking.worker import Worker, WorkerError

KEYS = {"name", "sizes", "device", "ours_ms", "baseline_ms", "ratio", "max_error"}
KEYS |= {"processor", "isa", "versions", "commit", "threads", "cores", "ours", "baseline"}
NATIVE = CONTENDERS["cpu"]["native"]
TINY = BenchModel(
    "tiny", tiny_config(noise_schedule="cosine"), tiny_config("classifier"), guidance_scale=2.0
)


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch):
    cases = [Case("tiny", kind, 2, True) for kind in sampling_cases.KINDS]
    monkeypatch.setattr(sampling_cases, "CASES", cases)
    monkeypatch.setattr(sampling_cases, "MODELS", {"tiny": TINY})
    table = {name: CONTENDERS["cpu"][name] for name in ("eager", "torch")}
    monkeypatch.setitem(CONTENDERS, "cpu", table)


@pytest.fixture
def setup(tmp_path):
    folders = {p: str(f) for p, f in sampling_cases.prepare(TINY, tmp_path).items()}
    return Setup(folders, {}, 1)


def run(*flags):
    return benchmarking.main(["sample", "--rounds", "1", *flags])


class Inline:
    """A ``Worker`` in this process: seconds instead of a minute where the process is not tested."""

    def __init__(self, name, cores, isa="auto", cache=None):
        self.name, self.server = name, worker._Server()

    def call(self, method, *args):
        try:
            return getattr(self.server, method)(*args)
        except Exception as error:
            raise WorkerError(f"{self.name}: {error}") from error

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Wrong(contenders.Eager):
    """An engine that is slightly wrong."""

    def denoise(self, x, t, y=None, low_res=None):
        return super().denoise(x, t, y) * 1.01


@pytest.mark.parametrize("predict_xstart", [False, True])
def test_rows(tmp_path, capsys, monkeypatch, predict_xstart):
    monkeypatch.setitem(
        sampling_cases.MODELS,
        "tiny",
        TINY._replace(
            diffusion=tiny_config(noise_schedule="cosine", predict_xstart=predict_xstart)
        ),
    )
    table = {"eager": CONTENDERS["cpu"]["eager"], "native": NATIVE}
    monkeypatch.setitem(CONTENDERS, "cpu", table)
    file = tmp_path / "rows.json"
    chart = tmp_path / "chart.png"
    assert run("--json", str(file), "--chart", str(chart)) == 0, capsys.readouterr()
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == [f"tiny {kind}" for kind in sampling_cases.KINDS]
    for row in rows:
        assert set(row) >= KEYS
        assert (row["ours"], row["baseline"], row["device"]) == ("native", "eager", "cpu")
        assert row["ours_ms"] > 0 and row["ratio"] == pytest.approx(
            row["baseline_ms"] / row["ours_ms"]
        )
        assert row["isa"] in ("portable", "avx2", "avx512")
    assert all(0 < row["max_error"] < 1e-4 for row in rows[:3])
    assert rows[3]["beyond_one_level"] == 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chart.png", "rows.json"]


def test_everybody_guides_at_every_step(setup):
    """Whatever the model's own settings are."""
    pipeline = contenders.torch_engine(setup)
    pipeline.settings["guidance_interval"] = (0, 1)
    arrays = sampling_cases.inputs(TINY, Case("tiny", "sample", 2, True))
    cfg = sampling_cases.configs(TINY)["diffusion"]
    ours, published = (
        workloads.request(contender, "sample", cfg, arrays, 2.0)()
        for contender in (pipeline, contenders.Eager(setup))
    )
    assert np.abs(ours.astype(int) - published).max() <= 1


def test_native_1_is_native_on_one_thread(monkeypatch):
    from adm_rt import _C

    monkeypatch.setattr(contenders, "native", lambda setup: _C.num_threads())
    before = _C.num_threads()
    try:
        _C.set_num_threads(3)
        assert contenders.native_one_thread(Setup({}, {}, 3)) == 1
    finally:
        _C.set_num_threads(before)


def test_float64_says_whose_error_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "Worker", Inline)
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sampling_cases, "CASES", sampling_cases.CASES[:3])
    assert run("--float64", "--json", str(file)) == 0
    forward, gradient, step = json.loads(file.read_text())
    for row in (forward, gradient):
        for name in ("rms_error", "baseline_rms_error"):
            assert 1e-8 < row["float64"][name] < 1e-5
    assert "float64" not in step


def test_wrong_results_are_not_timed(monkeypatch, tmp_path, capsys):
    """An error of ours: no row, exit code 1. Of a rival: the others are measured all the same."""
    monkeypatch.setattr(sample, "Worker", Inline)
    wrong = Entry(f"{__name__}:Wrong", "wrong", 1.0)
    monkeypatch.setitem(CONTENDERS["cpu"], "openvino", wrong)
    file = tmp_path / "rows.json"
    assert run("--only", "forward", "--clock", "cpu", "--json", str(file)) == 0
    assert [row["baseline"] for row in json.loads(file.read_text())] == ["eager"]
    assert "openvino: differs from eager PyTorch by 0.0" in capsys.readouterr().out
    monkeypatch.setitem(CONTENDERS["cpu"], "torch", wrong)
    assert run("--only", "forward", "--contenders", "torch", "--json", str(file)) == 1
    assert json.loads(file.read_text()) == []
    assert "torch: differs from eager PyTorch" in capsys.readouterr().err


def test_a_dead_process_is_named_with_its_last_words(setup):
    with Worker("eager", machine.free_cores()[:1]) as process:
        process._process.kill()
        with pytest.raises(WorkerError, match="eager: its process ended .killed"):
            process.call("usage")
    with Worker("torch", machine.free_cores()[:1]) as process:
        with pytest.raises(WorkerError, match="torch: ModuleNotFoundError: .*no_such_module"):
            process.call("load", "no_such_module:Engine", setup)
        assert process.call("usage")["peak_mb"] > 0  # it is still there


def test_workers_are_pinned_and_keep_freed_memory():
    cores = machine.free_cores()[-1:]
    with Worker("eager", cores, "avx2") as process:
        if hasattr(os, "sched_getaffinity"):
            process.call("usage")  # it has started
            assert os.sched_getaffinity(process._process.pid) == set(cores)
        environ = Path(f"/proc/{process._process.pid}/environ")
        if environ.exists():
            text = environ.read_text()
            for setting in (
                "MALLOC_MMAP_MAX_=0",
                "OMP_NUM_THREADS=1",
                "ADM_RT_CPU_ISA=avx2",
                "ADM_RT_CACHE=off",
            ):
                assert setting in text


def test_graphs_compute_what_eager_computes(setup, tmp_path):
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra 'bench')")
    import torch

    graphs = {part: str(tmp_path / f"{part}_graph" / "graph.onnx") for part in setup.folders}
    for part, file in graphs.items():
        contenders.export_onnx(part, setup.folders[part], file)
    eager = contenders.Eager(setup)
    rivals = [
        rival(setup._replace(graphs=graphs))
        for rival in (contenders.OnnxRuntime, contenders.OpenVino)
    ]
    for batch in (1, 3):  # a graph is compiled again for each
        arrays = sampling_cases.inputs(TINY, Case("tiny", "forward", batch, True))
        x, y = arrays["x"], arrays["y"]
        tx, ty = torch.from_numpy(x), torch.from_numpy(y)
        forward, gradient = eager.denoise(tx, 417.0, ty), eager.classifier_gradient(tx, 417.0, ty)
        for rival in rivals:
            assert sample.errors(rival.denoise(x, 417.0, y), forward.numpy()).maximum < 1e-4
            result = rival.classifier_gradient(x, 417.0, y)
            assert sample.errors(result, gradient.numpy()).maximum < 1e-4


def test_random_weights_make_ordinary_outputs(setup):
    """Not zero, not huge: an error anywhere must show."""
    import torch

    eager = contenders.Eager(setup)
    arrays = sampling_cases.inputs(TINY, Case("tiny", "forward", 2, True))
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    assert 0.1 < eager.denoise(x, 417.0, y).std() < 3
    assert eager.classifier_gradient(x, 417.0, y).abs().max() > 1e-4
    for network in eager.networks.values():
        assert all(parameter.std() > 0.01 for parameter in network.parameters())
    again = sampling_cases.random_weights(TINY.diffusion)
    for name, parameter in eager.networks["diffusion"].named_parameters():
        assert np.array_equal(parameter.detach().numpy(), again[name])


def test_errors():
    expected = np.array([0.0, -4.0, 3.0])
    assert sample.errors(expected, expected) == (0, 0, None)
    found = sample.errors(np.array([1.0, -4.0, 3.0]), expected)
    assert found.maximum == 0.25 and found.rms == pytest.approx((1 / 25) ** 0.5)
    images = np.array([0, 10, 255, 7], np.uint8)
    found = sample.errors(np.array([1, 12, 255, 7], np.uint8), images)
    assert found.maximum == pytest.approx(2 / 255) and found.beyond_one_level == 0.25
    with pytest.raises(ValueError, match="shape"):
        sample.errors(expected, images)


def test_groups_fit_into_memory():
    need = {"eager": 2, "native": 3, "torch": 2, "onnxruntime": 4, "openvino": 4}
    names = list(need)
    assert sample.groups(names, "native", need, 15) == ([names], [])
    parts, left_out = sample.groups(names, "native", need, 10)
    assert left_out == []
    assert parts == [
        ["eager", "native", "torch"],
        ["eager", "native", "onnxruntime"],
        ["eager", "native", "openvino"],
    ]
    parts, left_out = sample.groups(names, "native", need, 8)
    assert parts == [["eager", "native", "torch"]] and left_out == ["onnxruntime", "openvino"]
    assert sample.groups(names, "native", need, 4) == ([], names)


def test_list_and_selection(capsys, monkeypatch):
    cases = [Case("tiny", "forward", 1, True), Case("tiny", "sample", 4, False)]
    monkeypatch.setattr(sampling_cases, "CASES", cases)
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "tiny forward 1: batch 1, 16x16; memory about" in out and "tiny sample 4" in out
    parsed = argparse.Namespace(only="", all=False, list=False)
    assert sample.select(parsed) == cases[:1]
    parsed.all = True
    assert sample.select(parsed) == cases
    parsed.only = "sample"
    assert sample.select(parsed) == cases[1:]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--only", "nothing"], "--only 'nothing' is part of no case; there are: tiny forward 2"),
        (["--contenders", "tensorrt"], "--contenders tensorrt: known are eager, torch"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "many"], "--threads 'many'"),
        (["--threads", "4097"], "--threads 4097: there are"),
        (["--cores", "4097"], "--cores 4097: allowed here are"),
        (["--device", "cuda", "--isa", "avx2"], "--isa is for --device cpu"),
        (["--device", "cuda", "--dtype", "half"], "--dtype half is unknown; allowed: float32"),
        (["--device", "cuda", "--contenders", "native"], "known are ours, released, float16"),
        (["--device", "cuda", "--only", "8x8"], "part of no case; there are: 64x64_diffusion 1"),
        (["--json", "/nonexistent/rows.json"], "/nonexistent"),
        (["--chart", "/nonexistent/chart.png"], "--chart /nonexistent/chart.png"),
    ],
)
def test_bad_arguments(flags, text, capsys):
    assert benchmarking.main(["sample", *flags]) == 1
    assert text in capsys.readouterr().err


def test_what_is_not_installed_is_said(monkeypatch):
    entry = CONTENDERS["cpu"]["eager"]._replace(needs=("torch", "no_such_package"))
    monkeypatch.setitem(CONTENDERS["cpu"], "eager", entry)
    assert "no_such_package is not installed (pip install" in contenders.missing("eager")
    assert run() == 1


def test_each_request_has_a_timestep_of_its_own():
    """Else an engine that keeps embeddings would be timed without them."""
    seen = []

    class Engine:
        def from_numpy(self, values):
            return values

        to_numpy = from_numpy

        def denoise(self, x, t, y):
            seen.append(t)
            return x

    cfg = TINY.diffusion
    arrays = sampling_cases.inputs(TINY, Case("tiny", "forward", 1, True))
    forward = workloads.request(Engine(), "forward", cfg, arrays, 1.0)
    forward(), forward(), forward()
    middle = float(workloads.diffusion_of(cfg).timestep_map[workloads.MIDDLE])
    assert seen == pytest.approx([middle, middle + 1e-3, middle + 2e-3], abs=1e-9)


@pytest.mark.parametrize("warm", [True, False])
def test_a_warm_request_comes_first_and_is_not_timed(warm, monkeypatch):
    server, seconds, calls = worker._Server(), [0.0], []

    def request():
        calls.append(1)
        seconds[0] += 10.0 if len(calls) == 1 else 1.0  # the first is the slow one

    server._request = request
    monkeypatch.setattr(worker.time, "perf_counter", lambda: seconds[0])
    assert server.sample(2, "wall", warm) == (1.0 if warm else 5.5)
    assert len(calls) == 2 + warm
