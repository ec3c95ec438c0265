"""An exported folder: graphs and the manifest that says what they are (no torch, no onnx here).

manifest.json  {"format", "format_version", "ops_version", "opset", "dtype", "model", "classifier",
                "metadata", "networks", "versions"}
unet.onnx                    the denoiser
classifier_gradient.onnx     d log p(y | x_t) / d x_t, where a classifier was exported too
*.onnx.data                  weights of a graph that is larger than 2 GB

``model`` and ``classifier`` are all fields of a ModelConfig (the diffusion's among them),
``metadata`` is what a model folder says about sampling, and an entry of ``networks`` is {"file",
"bytes", "sha256", "data_file", "data_bytes", "data_sha256", "weights_sha256", "inputs", "outputs",
"nodes"}. Batch axes are "N". A manifest holds no path, date or machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adm_rt import __version__
from adm_rt.errors import CheckpointError
from adm_rt.export.nodes import OPS_VERSION
from adm_rt.models.config import ModelConfig
from adm_rt.models.weight_folder import file_sha256, replace_file

FORMAT = "adm_rt export"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
UNET, CLASSIFIER_GRADIENT = "unet", "classifier_gradient"
NETWORKS = (UNET, CLASSIFIER_GRADIENT)
DTYPES = ("float32", "float16", "bfloat16")
# what ``metadata`` may say: everything that does not name another model
METADATA = ("class_names", "guidance_scale", "few_step_guidance_scale", "guidance_interval")
METADATA += ("sampler",)

_KEYS = ("format", "format_version", "ops_version", "opset", "dtype", "model", "classifier")
_KEYS += ("metadata", "networks", "versions")
_ENTRY = ("file", "bytes", "sha256", "data_file", "data_bytes", "data_sha256", "weights_sha256")
_ENTRY += ("inputs", "outputs", "nodes")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 22
_AGAIN = "Export the model again (adm-rt export)."


@dataclasses.dataclass(frozen=True)
class ExportedNetwork:
    """One graph of an exported folder; stands where a module or a ``ModelWeights`` may stand.

    ``cfg``: the ModelConfig of the network (of the classifier, for its gradient). ``inputs`` and
    ``outputs``: name -> (dtype, dims), dims ints or "N". ``weights_sha256`` differs whenever the
    weights do, ``sha256`` whenever the file does.
    """

    name: str  # "unet" or "classifier_gradient"
    cfg: ModelConfig
    folder: Path
    dtype: str
    file: str
    bytes: int
    sha256: str
    data_file: str | None
    data_bytes: int | None
    data_sha256: str | None
    weights_sha256: str
    inputs: dict[str, tuple[str, tuple]]
    outputs: dict[str, tuple[str, tuple]]
    nodes: dict[str, int]

    @property
    def path(self) -> Path:
        return self.folder / self.file

    def verify(self) -> None:
        """Read the files and compare their sha256; CheckpointError for another."""
        self.check_files()
        for name, _, digest in self._files():
            try:
                found = file_sha256(self.folder / name)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {self.folder / name}: {error.strerror or error}."
                ) from error
            if found != digest:
                raise CheckpointError(
                    f"{self.folder / name} is damaged or was changed: its sha256 is not the "
                    f"manifest's. {_AGAIN}"
                )

    def check_files(self) -> None:
        """Whether the files are there with the right sizes; CheckpointError when not."""
        for name, size, _ in self._files():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, but the manifest names it. {_AGAIN}")
            if path.stat().st_size != size:
                raise CheckpointError(
                    f"{path} is damaged: it has {path.stat().st_size} bytes, but the manifest "
                    f"says {size}. {_AGAIN}"
                )

    def _files(self):
        yield self.file, self.bytes, self.sha256
        if self.data_file is not None:
            yield self.data_file, self.data_bytes, self.data_sha256


@dataclasses.dataclass(frozen=True)
class ExportManifest:
    """What an exported folder says: its networks, and ``metadata`` (keys: ``METADATA``)."""

    folder: Path
    dtype: str
    opset: int
    unet: ExportedNetwork
    classifier_gradient: ExportedNetwork | None
    metadata: dict[str, Any]
    versions: dict[str, str]

    @property
    def cfg(self) -> ModelConfig:
        return self.unet.cfg

    @property
    def networks(self) -> tuple[ExportedNetwork, ...]:
        return tuple(n for n in (self.unet, self.classifier_gradient) if n is not None)


def interface(name: str, cfg: ModelConfig):
    """(inputs, outputs) of a graph, each name -> (dtype, dims), the same in every export dtype.

    name: "unet" (``cfg`` of a diffusion model or upsampler) or "classifier_gradient" (``cfg`` of
    the classifier).
    """
    image = ("float32", ("N", cfg.in_channels, cfg.image_size, cfg.image_size))
    times, labels = ("float32", ("N",)), ("int64", ("N",))
    if name == CLASSIFIER_GRADIENT:
        return {"x": image, "t": times, "y": labels}, {"gradient": image}
    inputs = {"x": image, "t": times}
    if cfg.class_cond:
        inputs["y"] = labels
    if cfg.kind == "upsampler":
        low = ("N", cfg.in_channels, cfg.small_size, cfg.small_size)
        inputs["low_res"] = ("float32", low)
    out = ("N", cfg.out_channels, cfg.image_size, cfg.image_size)
    return inputs, {"output": ("float32", out)}


def is_exported_folder(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a folder whose manifest.json is one of ours, of any version."""
    path = Path(path) / MANIFEST_FILE
    if not path.is_file():
        return False
    try:
        return _read_json(path)[0].get("format") == FORMAT
    except CheckpointError:
        # Damaged: with a graph beside it, reading it shall say so.
        return any((path.parent / f"{name}.onnx").is_file() for name in NETWORKS)


def write_manifest(
    folder: str | os.PathLike,
    *,
    dtype: str,
    opset: int,
    cfg: ModelConfig,
    classifier_cfg: ModelConfig | None = None,
    networks: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any] | None = None,
    versions: Mapping[str, str],
) -> Path:
    """Describe the graphs that lie in ``folder``; call it last, before the folder is renamed.

    networks: "unet" (and "classifier_gradient") -> {"file", "weights_sha256", "nodes": {op:
    count}}, with "data_file" where the weights lie in a file of their own. Sizes, sha256, inputs
    and outputs are found here. metadata: other keys than ``METADATA`` are left out. versions: of
    "torch" and "onnx"; adm_rt's own is added. Raises ValueError for what reading would refuse.
    """
    folder = Path(folder)
    configs = {UNET: cfg, CLASSIFIER_GRADIENT: classifier_cfg}
    entries = {}
    for name, given in networks.items():
        if configs.get(name) is None:
            raise ValueError(f"networks has {name!r}, but there is no configuration for it")
        inputs, outputs = interface(name, configs[name])
        data = given.get("data_file")
        entries[name] = {
            "file": given["file"],
            "bytes": (folder / given["file"]).stat().st_size,
            "sha256": file_sha256(folder / given["file"]),
            "data_file": data,
            "data_bytes": None if data is None else (folder / data).stat().st_size,
            "data_sha256": None if data is None else file_sha256(folder / data),
            "weights_sha256": given["weights_sha256"],
            "inputs": inputs,
            "outputs": outputs,
            "nodes": dict(sorted(given["nodes"].items())),
        }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "ops_version": OPS_VERSION,
        "opset": int(opset),
        "dtype": dtype,
        "model": cfg.to_dict(),
        "classifier": None if classifier_cfg is None else classifier_cfg.to_dict(),
        "metadata": {k: v for k, v in (metadata or {}).items() if k in METADATA},
        "networks": entries,
        "versions": {"adm_rt": __version__, **versions},
    }
    data = _json_bytes(manifest)
    try:
        _parse(folder / MANIFEST_FILE, json.loads(data))
    except CheckpointError as error:
        raise ValueError(f"the manifest would not be readable: {error}") from error
    with replace_file(folder / MANIFEST_FILE, overwrite=True) as temporary:
        temporary.write_bytes(data)
    return folder / MANIFEST_FILE


def read_manifest(folder: str | os.PathLike, verify: bool = False) -> ExportManifest:
    """What an exported folder holds; sizes are checked, with ``verify`` the sha256 of every file.

    Raises CheckpointError naming the file that is missing, damaged, changed, or made for another
    version of the format or of the ops.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not an exported folder: it is not a folder.")
    if not path.is_file():
        raise CheckpointError(f"{folder} is not an exported folder: {MANIFEST_FILE} is missing.")
    value, data = _read_json(path)
    manifest = _parse(path, value)
    if data != _json_bytes(value):
        raise CheckpointError(f"{path} is damaged: it is not as it was written. {_AGAIN}")
    for network in manifest.networks:
        network.verify() if verify else network.check_files()
    return manifest


# ---- JSON ----


def _json_bytes(value) -> bytes:
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the manifest must be plain JSON values: {error}") from error


def _read_json(path: Path) -> tuple[dict, bytes]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{path} is larger than a manifest can be ({_MAX_BYTES} bytes).")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is damaged: {why}. {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object. {_AGAIN}")
    return value, data


def _parse(path: Path, value: dict) -> ExportManifest:
    if value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {value.get('format')!r} version {value.get('format_version')!r}; "
            f"this version of adm_rt reads {FORMAT!r} version {FORMAT_VERSION}."
        )
    if value.get("ops_version") != OPS_VERSION:
        versions = value.get("versions")
        made_by = versions.get("adm_rt") if isinstance(versions, dict) else "another version"
        raise CheckpointError(
            f"{path}: the graphs use version {value.get('ops_version')!r} of adm_rt's ops (they "
            f"were exported by adm_rt {made_by}), but this is adm_rt {__version__} with version "
            f"{OPS_VERSION}. Export the model again with this version, or use the version that "
            "exported it."
        )
    if set(value) != set(_KEYS):
        raise _damaged(path, f"its keys are not {', '.join(_KEYS)}")
    if value["dtype"] not in DTYPES:
        raise _damaged(path, f"dtype {value['dtype']!r} is not one of {', '.join(DTYPES)}")
    if type(value["opset"]) is not int or value["opset"] < 1:
        raise _damaged(path, f"opset {value['opset']!r} is not a number")
    for key in ("metadata", "networks", "versions"):
        if not isinstance(value[key], dict):
            raise _damaged(path, f"{key!r} is not an object")
    configs = {UNET: _config(path, value, "model", ("diffusion", "upsampler"))}
    if value["classifier"] is not None:
        configs[CLASSIFIER_GRADIENT] = _config(path, value, "classifier", ("classifier",))
    if set(value["networks"]) != set(configs):
        raise _damaged(
            path, f"networks are {sorted(value['networks'])} where {sorted(configs)} are described"
        )
    networks = {
        name: _network(path, name, value["networks"][name], cfg, value["dtype"])
        for name, cfg in configs.items()
    }
    names = [n for entry in value["networks"].values() for n in (entry["file"], entry["data_file"])]
    names = [n for n in names if n is not None]
    if len(set(names)) != len(names):
        raise _damaged(path, "two networks share a file")
    return ExportManifest(
        folder=path.parent,
        dtype=value["dtype"],
        opset=value["opset"],
        unet=networks[UNET],
        classifier_gradient=networks.get(CLASSIFIER_GRADIENT),
        metadata=_metadata(path, value["metadata"], configs),
        versions={str(k): str(v) for k, v in value["versions"].items()},
    )


def _config(path, value, key, kinds) -> ModelConfig:
    if not isinstance(value[key], dict):
        raise _damaged(path, f"{key!r} is not an object")
    try:
        cfg = ModelConfig.from_dict(value[key])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {key}: {error}") from error
    if cfg.kind not in kinds:
        raise _damaged(path, f"{key!r} is of kind {cfg.kind!r}")
    return cfg


def _network(path, name, entry, cfg, dtype) -> ExportedNetwork:
    if not isinstance(entry, dict) or set(entry) != set(_ENTRY):
        raise _damaged(path, f"the entry of {name} does not have the keys {', '.join(_ENTRY)}")
    for key in ("file", "data_file"):
        file = entry[key]
        if key == "data_file" and file is None:
            continue
        # A plain name: a manifest must not be able to name a file outside its folder.
        if not isinstance(file, str) or not _NAME.fullmatch(file) or file == MANIFEST_FILE:
            raise _damaged(path, f"{key} of {name}, {str(file)[:80]!r}, is not a plain file name")
    has_data = entry["data_file"] is not None
    for prefix in ("", "data_") if has_data else ("",):
        size = entry[prefix + "bytes"]
        if type(size) is not int or size < 0:
            raise _damaged(path, f"{prefix}bytes of {name} is not a size")
        if not _is_sha256(entry[prefix + "sha256"]):
            raise _damaged(path, f"{prefix}sha256 of {name} is not one")
    if not _is_sha256(entry["weights_sha256"]):
        raise _damaged(path, f"weights_sha256 of {name} is not a sha256")
    inputs, outputs = interface(name, cfg)
    for key, expected in (("inputs", inputs), ("outputs", outputs)):
        found = entry[key]
        if found != {n: [kind, list(dims)] for n, (kind, dims) in expected.items()}:
            raise _damaged(path, f"{key} of {name} are not those of its configuration")
    nodes = entry["nodes"]
    if not isinstance(nodes, dict) or any(type(n) is not int or n < 0 for n in nodes.values()):
        raise _damaged(path, f"nodes of {name} are not counts")
    return ExportedNetwork(
        name=name,
        cfg=cfg,
        folder=path.parent,
        dtype=dtype,
        **{key: entry[key] for key in _ENTRY if key not in ("inputs", "outputs")},
        inputs=inputs,
        outputs=outputs,
    )


def _metadata(path, metadata, configs) -> dict[str, Any]:
    unknown = set(metadata) - set(METADATA)
    if unknown:
        raise _damaged(path, f"metadata has the unknown key {sorted(unknown)[0]!r}")
    names = metadata.get("class_names")
    if names is not None:
        # A model without classes may have a classifier that names them.
        cfg = configs[UNET] if configs[UNET].class_cond else configs.get(CLASSIFIER_GRADIENT)
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise _damaged(path, "class_names is not a list of strings")
        if cfg is not None and len(names) != cfg.num_classes:
            raise _damaged(path, f"class_names has {len(names)} entries for {cfg.num_classes}")
    return dict(metadata)


def _is_sha256(value) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _damaged(path, why) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}. {_AGAIN}")
