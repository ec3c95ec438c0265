"""The onnx engine on graphs made by hand: the exported folder as a model, its checks, no torch."""

import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from tiny_models import TINY_CLASSES, tiny_network

import adm_rt
from adm_rt import Pipeline, cli, engines
from adm_rt.engines import onnx_engine
from adm_rt.errors import CheckpointError, EngineError, MissingExtraError
from adm_rt.export.manifest import MANIFEST_FILE, read_manifest
from adm_rt.trajectory import choose_batch_size

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'adm_rt[onnx]'")
pytest.importorskip("onnx", reason="needs onnx: pip install 'adm_rt[onnx]'")

import handmade_export  # noqa: E402  (needs onnx)

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A guided class-conditional model. Treat it as read-only."""
    return handmade_export.exported(tmp_path_factory.mktemp("onnx") / "tiny")


@pytest.fixture(scope="module")
def engine(folder):
    made = read_manifest(folder)
    return engines.create("onnx", made.unet, made.classifier_gradient)


def batch(count, size=16, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 3, size, size), np.float32)
    return x, rng.integers(0, len(TINY_CLASSES), count)


# ---- the engine ----


@pytest.mark.parametrize("count", [1, 2, 5])
def test_graphs_are_fed_and_answer(engine, count):
    x, y = batch(count)
    t = np.full(count, 417.25, np.float32)
    out = engine.denoise(x, 417.25, y)
    assert out.dtype == np.float32 and out.shape == (count, 6, 16, 16)
    np.testing.assert_allclose(out, handmade_export.denoiser(x, t, y), rtol=1e-6, atol=1e-6)
    gradient = engine.classifier_gradient(x, 417.25, y)
    assert gradient.dtype == np.float32
    np.testing.assert_allclose(gradient, handmade_export.gradient(x, t, y), rtol=1e-6, atol=1e-6)


def test_an_upsampler_and_a_model_without_classes(tmp_path):
    up = read_manifest(handmade_export.exported(tmp_path / "up", "upsampler")).unet
    engine = engines.create("onnx", up)
    x, y = batch(2, 32)
    low, _ = batch(2, 16, seed=1)
    t = np.full(2, 5, np.float32)
    expected = handmade_export.denoiser(x, t, y, low)
    np.testing.assert_allclose(engine.denoise(x, 5, y, low), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="low_res is missing"):
        engine.denoise(x, 5, y)
    plain = handmade_export.exported(
        tmp_path / "plain", classifier=False, class_cond=False, learn_sigma=False
    )
    engine = engines.create("onnx", read_manifest(plain).unet)
    x, y = batch(2)
    expected = handmade_export.denoiser(x, t, channels=3)
    np.testing.assert_allclose(engine.denoise(x, 5, y), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="needs a classifier; this engine was made without"):
        engine.classifier_gradient(x, 5, y)
    with pytest.raises(ValueError, match="not an upsampler"):
        engine.denoise(x, 5, y, x)


def test_it_is_an_engine(engine):
    assert isinstance(engine, engines.Engine)
    assert (engine.name, engine.device, engine.dtype) == ("onnx", "cpu", "float32")
    assert engine.notes == [] and engine.image_bytes() > 0
    assert engine.image_bytes(guided=True) >= engine.image_bytes()
    values = np.arange(3)
    assert engine.to_numpy(engine.from_numpy(values)) is values


def test_arguments_of_a_call(engine):
    x, y = batch(2)
    for arguments, message in (
        ((x[0], 1, y), r"x has shape \(3, 16, 16\); \[N, 3, 16, 16\] is needed"),
        ((x[:, :, :8], 1, y), r"x has shape \(2, 3, 8, 16\)"),
        ((x, 1), "y is missing: .*0..4"),
        ((x, 1, y[:1]), r"y has shape \(1,\)"),
        ((x, 1, np.array([0, 5])), "label 5 is not in 0..4"),
        ((x, 1, np.array([-1, 0])), "label -1 is not in 0..4"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.denoise(*arguments)


def test_threads_are_those_of_our_kernels(folder, monkeypatch):
    asked = []

    class Session:
        def __init__(self, path, options, providers):
            asked.append((options.intra_op_num_threads, options.inter_op_num_threads))
            raise ValueError("stop here")

    import onnxruntime

    from adm_rt import _C

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    before = _C.num_threads()
    try:
        _C.set_num_threads(3)
        with pytest.raises(EngineError, match="stop here"):
            engines.create("onnx", read_manifest(folder).unet)
    finally:
        _C.set_num_threads(before)
    assert asked == [(3, 1)]


def test_a_forked_child_is_told_instead_of_waiting_for_ever(engine):
    x, y = batch(1)
    engine.denoise(x, 1, y)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # no exceptions out of here: the child would go on with the tests
        try:
            engine.denoise(x, 1, y)
            os.write(writer, b"no error")
        except BaseException as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        assert "before the process was forked; make one in the child" in answer.read()
    os.waitpid(child, 0)


# ---- an exported folder as the model ----


def expected_images(folder, **request):
    """The same pipeline over a stand-in engine that computes the graphs' formulas."""
    made = read_manifest(folder)
    pipeline = Pipeline(made.unet, made.classifier_gradient, settings=made.metadata)

    class Formulas:
        def __getattr__(self, name):
            return getattr(pipeline_engine, name)

        def denoise(self, x, t, y=None, low_res=None):
            return handmade_export.denoiser(x, np.full(len(x), t, np.float32), y)

        def classifier_gradient(self, x, t, y):
            return handmade_export.gradient(x, np.full(len(x), t, np.float32), y)

    pipeline_engine = pipeline._engine
    pipeline._engine = Formulas()
    return pipeline(**request, **QUIET).images


@pytest.mark.parametrize("engine_name", ["auto", "onnx"])
def test_sampling_from_a_folder(folder, engine_name):
    request = {"num_images": 3, "classes": ["A", "E"], "steps": "ddim5", "seed": 4}
    result = adm_rt.sample(folder, engine=engine_name, **request, **QUIET)
    assert result.images.shape == (3, 16, 16, 3) and result.labels.tolist() == [0, 4, 0]
    about = result.metadata
    assert (about["engine"], about["model"], about["dtype"]) == ("onnx", "tiny", "float32")
    # the folder's own defaults
    assert (about["sampler"], about["guidance_scale"]) == ("ddim", 2.0)
    assert about["classifier"] == "tiny/classifier_gradient.onnx"
    expected = expected_images(folder, **request)
    assert np.abs(result.images.astype(int) - expected).max() <= 1
    assert result.images.std() > 1


def test_the_classifier_can_be_left_out(folder):
    pipeline = Pipeline.from_pretrained(folder, "none")
    assert pipeline.classifier is None
    assert pipeline(1, steps="ddim2", **QUIET).metadata["guidance_scale"] == 0.0


def test_upsamplers_are_loaded_beside_a_folder_and_as_the_model(folder, tmp_path):
    up = handmade_export.exported(tmp_path / "up", "upsampler")
    stack = Pipeline.from_pretrained(folder, upsampler=up)
    result = stack(1, "B", steps="ddim2", **QUIET)
    assert result.images.shape == (1, 32, 32, 3) and "upsampler" in result.metadata
    assert result.metadata["upsampler"]["model"] == "up"
    alone = Pipeline.from_pretrained(up)
    assert alone.engine.name == "onnx" and alone.unet is None
    small = np.zeros((1, 16, 16, 3), np.uint8)
    assert alone.upscale(small, [1], steps="ddim2", **QUIET).images.shape == (1, 32, 32, 3)


def test_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["sample", "--model", str(folder), "-n", "2", "--steps", "ddim2", "--quiet"]
    assert cli.main([*line, "--engine", "onnx", "-o", "two.npz"]) == 0, capsys.readouterr().err
    assert cli.main([*line, "--engine", "torch"]) == 1
    error = capsys.readouterr().err
    assert "engine='torch' cannot run an exported folder" in error and "'onnx'" in error
    assert os.listdir() == ["two.npz"]


def test_info_about_a_folder(folder, capsys):
    assert cli.main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    for line in ("exported: True", "dtype: float32", "ops_version: 1", "kind: diffusion"):
        assert line in text
    assert "classifier_gradient" in text and "Mul: 3" in text


def test_sampling_from_a_folder_needs_neither_torch_nor_onnx(folder, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from adm_rt.cli import main\n"
        "sys.exit(main(['sample', '--model', sys.argv[1], '-n', '2', '--steps', 'ddim2', "
        "'--threads', '1', '--quiet', '-o', sys.argv[2]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "two.npz")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["two.npz"]


# ---- bad input ----


def test_without_onnxruntime_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r'pip install "adm_rt\[onnx\]"'):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["torch", "native"])
def test_engines_that_want_weights_say_so(folder, name):
    with pytest.raises(
        ValueError, match=f"engine='{name}' cannot run an exported folder.*'auto' or 'onnx'"
    ):
        Pipeline.from_pretrained(folder, engine=name)
    with pytest.raises(ValueError, match="cannot run an exported folder"):
        engines.create(name, read_manifest(folder).unet)


def test_arguments_that_a_folder_cannot_take(folder, tmp_path):
    for arguments, message in (
        ({"classifier": "glyphs32_classifier"}, "a classifier cannot be added to; export both"),
        ({"preset": "64x64_diffusion"}, "preset: .* knows its configuration"),
        ({"num_channels": 64}, "num_channels: .* knows its configuration"),
        ({"dtype": "float16"}, "dtype='float16': .* exported in float32; use dtype='auto'"),
        ({"dtype": "half"}, "dtype"),
        ({"device": "gpu"}, "device='gpu' is not a device"),
        ({"device": "cuda"}, "device='cuda' cannot be used: .*onnxruntime-gpu"),
        ({"upsampler": "none", "engine": "onxx"}, "engine='onxx' is unknown; .*'onnx'"),
    ):
        with pytest.raises(ValueError, match=message):
            Pipeline.from_pretrained(folder, **arguments)
    for arguments in ({"model": "glyphs32", "classifier": folder}, {"model": folder / "unet.onnx"}):
        with pytest.raises(ValueError, match="exported folder"):
            Pipeline.from_pretrained(**arguments)
    with pytest.raises(ValueError, match="cannot be made into weights again"):
        Pipeline.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert os.listdir(tmp_path) == []


def test_half_of_a_pair_is_refused(folder):
    with pytest.raises(ValueError, match="one is exported and the other is not"):
        engines.create("onnx", read_manifest(folder).unet, tiny_network("classifier"))


def test_a_changed_graph_is_not_run(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / "unet.onnx").read_bytes())
    data[-1] ^= 1
    (copy / "unet.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match="unet.onnx is damaged or was changed.*sha256"):
        Pipeline.from_pretrained(copy)
    (copy / MANIFEST_FILE).write_text(
        (copy / MANIFEST_FILE).read_text().replace('"ops_version": 1', '"ops_version": 9')
    )
    with pytest.raises(CheckpointError, match="use version 9 of adm_rt's ops.*Export the model"):
        Pipeline.from_pretrained(copy)


def rewritten(folder, data):
    """A copy whose unet.onnx is ``data``, and whose manifest agrees with it."""
    import hashlib
    import json

    path = folder / MANIFEST_FILE
    value = json.loads(path.read_text())
    value["networks"]["unet"]["bytes"] = len(data)
    value["networks"]["unet"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "unet.onnx").write_bytes(data)
    path.write_text(json.dumps(value, indent=2) + "\n")
    return read_manifest(folder).unet


def test_a_graph_that_onnxruntime_refuses_or_that_is_another(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(EngineError, match="onnxruntime .* cannot load .*unet.onnx"):
        engines.create("onnx", rewritten(copy, b"no graph"))
    other = (folder / "classifier_gradient.onnx").read_bytes()
    with pytest.raises(CheckpointError, match="outputs are not those that its manifest names"):
        engines.create("onnx", rewritten(copy, other))


def test_bfloat16_needs_a_gpu(tmp_path):
    half = handmade_export.exported(tmp_path / "half", dtype="bfloat16")
    with pytest.raises(ValueError, match="bfloat16, which ONNX Runtime has no CPU kernels for"):
        Pipeline.from_pretrained(half)
    half = handmade_export.exported(tmp_path / "half16", dtype="float16")
    (note,) = Pipeline.from_pretrained(half).notes
    assert "casts on the CPU" in note


def fake_runtime(providers, starts):
    """onnxruntime with these providers; sessions start with CUDA or fall back to the CPU."""
    import onnxruntime

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            self.asked = providers
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [p if isinstance(p, str) else p[0] for p in self.asked][not starts :]

    return types.SimpleNamespace(
        get_available_providers=lambda: providers,
        InferenceSession=Session,
        SessionOptions=onnxruntime.SessionOptions,
        __version__="1.99",
    )


def test_the_cuda_provider_where_there_is_one(folder, monkeypatch):
    """Stand-ins: no GPU is needed to see which provider is asked for."""
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    made = read_manifest(folder)

    def create(device, starts=True, driver=True):
        monkeypatch.setattr(onnx_engine, "_onnxruntime", lambda: fake_runtime(both, starts))
        monkeypatch.setattr(onnx_engine, "driver_is_there", lambda: driver)
        return engines.create("onnx", made.unet, made.classifier_gradient, device=device)

    engine = create("cuda:1")
    assert engine.device == "cuda:1"
    with monkeypatch.context() as patch:  # a GPU's memory without a torch that could ask for it
        patch.setitem(sys.modules, "torch", None)
        assert choose_batch_size("auto", 3, engine, guided=True) == 3
    chosen = {"device_id": "1", "use_tf32": "0"}
    assert engine._unet._session.asked[0] == ("CUDAExecutionProvider", chosen)
    assert create("auto").device == "cuda:0" and create("cpu").device == "cpu"
    assert create("auto", driver=False).device == "cpu"
    fallen = create("auto", starts=False)
    assert fallen.device == "cpu" and "does not start; the CPU is used" in fallen.notes[0]
    with pytest.raises(ValueError, match="device='cuda' cannot be used.*does not start"):
        create("cuda", starts=False)
