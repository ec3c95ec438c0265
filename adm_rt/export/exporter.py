"""Networks -> a folder of ONNX graphs with a manifest, which needs no PyTorch to be run."""

from __future__ import annotations

from pathlib import Path

from adm_rt.engines.base import LOSS_SCALES, check_fit
from adm_rt.errors import CheckpointError, MissingExtraError
from adm_rt.export import manifest
from adm_rt.export.classifier_graph import classifier_gradient_graph
from adm_rt.export.nodes import OPSET
from adm_rt.export.onnx_file import node_counts, write_onnx
from adm_rt.export.unet_graph import unet_graph
from adm_rt.models.model_weights import ModelWeights, content_digest
from adm_rt.models.weight_folder import replace_folder

_MIN_ONNX = (1, 18)  # knows opset 23


def export_model(unet, folder, classifier=None, dtype="float32", loss_scale=None, metadata=None):
    """Write ``unet`` (and d log p(y | x_t) / d x_t of ``classifier``) as ONNX graphs.

    unet: a UNet, SuperResUNet or ModelWeights; classifier: a NoisyClassifier, its ModelWeights, or
    None. dtype: "float32", "float16" or "bfloat16", of the networks' trunks: inputs, outputs,
    embeddings, norms' weights and the classifier's head stay float32. loss_scale: what the
    classifier's gradient is multiplied by inside its graph, best a power of two (None: 128 for
    float16, else 1). metadata: JSON values about sampling (``manifest.METADATA``); None takes the
    model's.

    ``folder`` must not exist or be empty; it appears complete or not at all. Returns its path.

    Raises ValueError for an unknown dtype, a bad loss_scale, a model that is no denoiser, a
    classifier that does not fit it; CheckpointError when the folder cannot be written or a weight
    is beyond the dtype; MissingExtraError without onnx.
    """
    folder = Path(folder)
    if dtype not in manifest.DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; allowed: {', '.join(manifest.DTYPES)}")
    require_onnx()
    unet = ModelWeights.of(unet)
    if unet.cfg.kind == "classifier":
        raise ValueError(
            "the model is a classifier; export its gradient with the diffusion model that it guides"
        )
    graphs = {manifest.UNET: unet_graph(unet.cfg, dtype)}
    weights = {manifest.UNET: unet}
    if classifier is not None:
        classifier = ModelWeights.of(classifier)
        if unet.cfg.kind == "upsampler":
            raise ValueError("classifier: an upsampler is not guided; leave it out")
        check_fit(unet.cfg, classifier.cfg)
        scale = LOSS_SCALES[dtype] if loss_scale is None else loss_scale
        name = manifest.CLASSIFIER_GRADIENT
        graphs[name] = classifier_gradient_graph(classifier.cfg, dtype, scale)
        weights[name] = classifier
    elif loss_scale is not None:
        raise ValueError(f"loss_scale={loss_scale} is for a classifier's gradient; none was given")
    if metadata is None:
        metadata = _metadata(unet.info)
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(
            f"cannot write {folder}: it is not empty. Choose another folder, or remove this one."
        )
    with replace_folder(folder, overwrite=False) as place:
        networks = {
            name: _write_network(place, name, graph, weights[name])
            for name, graph in graphs.items()
        }
        manifest.write_manifest(
            place,
            dtype=dtype,
            opset=OPSET,
            cfg=unet.cfg,
            classifier_cfg=None if classifier is None else classifier.cfg,
            networks=networks,
            metadata=metadata,
            versions=_versions(),
        )
    return folder


def require_onnx():
    """MissingExtraError, with the pip command, when onnx is missing or too old."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(
            "exporting needs the package onnx: pip install 'adm_rt[onnx]'"
        ) from error
    version = tuple(int(part) for part in onnx.__version__.split(".")[:2])
    if version < _MIN_ONNX:
        raise MissingExtraError(
            f"onnx {onnx.__version__} does not know opset {OPSET}: pip install --upgrade "
            "'adm_rt[onnx]'"
        )


def _write_network(place, name, graph, weights):
    """The manifest's entry of one graph, which is written into the folder ``place``."""
    state = weights.state_dict()
    file = f"{name}.onnx"
    inputs, outputs = manifest.interface(name, weights.cfg)
    data = write_onnx(graph, state, place / file, inputs, outputs)
    entry = {
        "file": file,
        "weights_sha256": content_digest(state),
        "nodes": node_counts(graph),
    }
    return entry if data is None else {**entry, "data_file": data.name}


def _metadata(info):
    names = {} if info.class_names is None else {"class_names": list(info.class_names)}
    return {**info.metadata, **names}


def _versions():
    import onnx

    return {"onnx": onnx.__version__}
