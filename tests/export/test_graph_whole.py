"""A released architecture whole: the graph of 64x64_diffusion against the module."""

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


@pytest.mark.slow
def test_64x64_diffusion(tmp_path):
    """1.2 GB of random weights; `adm-rt bench export` does it at batch 1, 2 and 5."""
    cfg = preset("64x64_diffusion")
    state = random_weights(cfg)
    weights = ModelWeights(ModelInfo(cfg), lambda: state, "random")
    folder = export_model(weights, tmp_path / "out")
    assert_parity(module_of(weights), folder / "unet.onnx", batches=(2,))
