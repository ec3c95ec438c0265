"""A released architecture whole: the graphs of 64x64_diffusion against the module, and built.

1.2 GB of random weights. `adm-rt bench export` compares at batch 1, 2 and 5, with its classifier.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from graph_checks import assert_parity

from adm_rt.benchmarking.sampling_cases import random_weights
from adm_rt.models import preset
from adm_rt.models.checkpoint import module_of
from adm_rt.models.model_weights import ModelWeights
from adm_rt.models.weight_folder import ModelInfo

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from adm_rt.export import export_model  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights():
    cfg = preset("64x64_diffusion")
    state = random_weights(cfg)
    return ModelWeights(ModelInfo(cfg), lambda: state, "random")


@pytest.fixture(scope="module")
def network(weights):
    return module_of(weights)


@pytest.fixture(scope="module")
def half(weights, tmp_path_factory):
    """The path of the float16 graph."""
    folder = tmp_path_factory.mktemp("half") / "out"
    return export_model(weights, folder, dtype="float16") / "unet.onnx"


def test_float32(weights, network, tmp_path):
    folder = export_model(weights, tmp_path / "out")
    assert_parity(network, folder / "unet.onnx", batches=(2,))


def test_float16(network, half):
    assert_parity(network, half, "float16", batches=(1,))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'adm_rt[test-tensorrt]'",
)
def test_tensorrt_rtx_builds_it_in_float16(half):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    program = ROOT / "tests" / "tensorrt" / "rtx_build.py"
    done = subprocess.run(
        [sys.executable, str(program), "functions", str(half), "1,8,16"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[0])
    assert report["plugins"] == 0 and report["layers"] > 300
    assert report["bytes"] > half.stat().st_size  # all of its weights are inside
