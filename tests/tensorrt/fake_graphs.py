"""Exported networks whose graphs the fake TensorRT understands."""

import fake_tensorrt
from tiny_models import tiny_config

from adm_rt.export.manifest import interface, read_manifest, write_manifest


def write_graphs(folder, unet_scale=0.5, gradient_scale=-0.1, cfgs=None, dtype="float16"):
    """An exported folder whose graphs are the fake's JSON. Returns its path."""
    folder.mkdir(parents=True)
    cfgs = cfgs or {
        "unet": tiny_config(),
        "classifier_gradient": tiny_config("classifier"),
    }
    scales = {"unet": unet_scale, "classifier_gradient": gradient_scale}
    networks = {}
    for name, cfg in cfgs.items():
        inputs, outputs = interface(name, cfg)
        shapes = {n: [-1 if d == "N" else d for d in dims] for n, (_, dims) in inputs.items()}
        ((output, (_, dims)),) = outputs.items()
        output = [output, [-1, *dims[1:]]]
        file = folder / f"{name}.onnx"
        file.write_text(fake_tensorrt.onnx_text(shapes, output, scales[name]))
        digest = f"{abs(hash((name, scales[name]))):064x}"[-64:]
        networks[name] = {"file": file.name, "weights_sha256": digest, "nodes": {}}
    write_manifest(
        folder,
        dtype=dtype,
        opset=23,
        cfg=cfgs["unet"],
        classifier_cfg=cfgs.get("classifier_gradient"),
        networks=networks,
        versions={"torch": "0", "onnx": "0"},
    )
    return folder


def exported(folder, **options):
    """(unet, classifier gradient) of ``write_graphs``."""
    manifest = read_manifest(write_graphs(folder, **options))
    return manifest.unet, manifest.classifier_gradient
