"""docs/export.md: its commands run; docs/run_without_torch.py makes what our samplers make."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adm_rt import cli
from adm_rt.diffusion import Diffusion
from adm_rt.pipeline import Pipeline
from adm_rt.request import respaced_diffusion
from adm_rt.samplers import SAMPLERS
from adm_rt.trajectory import to_uint8

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'adm_rt[onnx]'")
pytest.importorskip("onnx", reason="needs onnx: pip install 'adm_rt[onnx]'")

DOCS = Path(__file__).parents[2] / "docs"
PAGE, SCRIPT = DOCS / "export.md", DOCS / "run_without_torch.py"
HEADING = "## Export and run without PyTorch"


def commands():
    """The commands of the section, in order."""
    section = PAGE.read_text().split(HEADING)[1]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_the_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = commands()
    assert len(lines) >= 4
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "adm-rt":
            assert cli.main(arguments) == 0, (line, capsys.readouterr().err)
            continue
        assert (program, arguments[0]) == ("python", "docs/run_without_torch.py")
        check = (
            "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "
            "run_name='__main__'); assert not {'torch', 'onnx', 'adm_rt'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", check, str(SCRIPT), *arguments[1:]],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"glyphs32_onnx", "adm.png", "samples.npz", "samples.ppm"}
    with np.load("samples.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 20
    assert labels.tolist() == [10, 13, 22]
    head, _, pixels = (tmp_path / "samples.ppm").read_bytes().partition(b"255\n")
    assert head == b"P6 96 32 " and pixels == np.concatenate(list(images), axis=1).tobytes()


def script():
    spec = importlib.util.spec_from_file_location("run_without_torch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_is_short_and_imports_nothing_else():
    text = SCRIPT.read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported == {"json", "sys", "pathlib", "numpy", "onnxruntime"}
    assert len(text.splitlines()) <= 50


def test_the_script_equals_our_ddim(tmp_path):
    """Against the native engine: neither the graphs nor the runtime are shared."""
    folder = tmp_path / "exported"
    assert cli.main(["export", "glyphs32", "--out", str(folder)]) == 0
    pipeline = Pipeline.from_pretrained("glyphs32", engine="native")
    x = np.random.default_rng(1).standard_normal((2, 3, 32, 32), np.float32)
    y, scale = np.array([5, 30]), 1.5
    diffusion = respaced_diffusion(pipeline.unet.cfg, "ddim25")
    expected = to_uint8(SAMPLERS["ddim"](pipeline.engine, x, diffusion, y, scale))
    ours = script().sample(folder, x, y, scale=scale)
    apart = np.abs(ours.astype(int) - expected)
    assert apart.max() <= 1 and expected.std() > 20, f"{(apart > 1).mean():.2%}, {apart.max()}"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("flags", [{}, {"predict_xstart": True}, {"rescale_timesteps": True}])
def test_the_script_on_other_diffusions(tmp_path, schedule, flags):
    """On graphs made by hand, whose formulas our sampler runs too."""
    import handmade_export

    steps = 500 if flags.get("rescale_timesteps") else 1000
    config = {"noise_schedule": schedule, "diffusion_steps": steps, **flags}
    folder = handmade_export.exported(tmp_path / "tiny", learn_sigma=False, **config)

    class Formulas:
        def denoise(self, x, t, y=None, low_res=None):
            times = np.full(len(x), t, np.float32)
            return handmade_export.denoiser(x, times, y, channels=3)

        def classifier_gradient(self, x, t, y):
            return handmade_export.gradient(x, np.full(len(x), t, np.float32), y)

    x = np.random.default_rng(2).standard_normal((2, 3, 16, 16), np.float32)
    y = np.array([1, 4])
    diffusion = Diffusion(
        steps=steps,
        noise_schedule=schedule,
        timestep_respacing="ddim25",
        learn_sigma=False,
        **flags,
    )
    expected = to_uint8(SAMPLERS["ddim"](Formulas(), x, diffusion, y, 0.5))
    ours = script().sample(folder, x, y, scale=0.5)
    apart = np.abs(ours.astype(int) - expected)
    assert apart.max() <= 1 and expected.std() > 5, f"{(apart > 1).mean():.2%}, {apart.max()}"
