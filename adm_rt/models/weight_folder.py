"""A model on disk: a folder of config.json, model.safetensors and manifest.json (no torch here).

config.json    {"format", "format_version", "config": flags, "dtype", "class_names", "metadata"}
manifest.json  {"format_version", "files": {name: {"bytes", "sha256"}}}

Safetensors checks its header but not its payload, so the manifest's sha256 of every file is
verified on load. Folders are written beside their place and renamed into it: a reader sees the old
model or the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adm_rt.errors import CheckpointError
from adm_rt.models.config import ModelConfig
from adm_rt.models.parameter_shapes import compare_shapes, parameter_shapes
from adm_rt.models.safetensors_file import DTYPES, read_safetensors, write_safetensors

FORMAT = "adm_rt model"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)

_MAX_JSON = 1 << 22
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a model folder says about itself beside the weights."""

    config: ModelConfig
    class_names: tuple[str, ...] | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"


def read_info(folder: str | os.PathLike, verify: bool = True) -> ModelInfo:
    """config.json of a model folder; with ``verify`` its sha256 is checked first.

    Raises CheckpointError naming the file that is missing, damaged or not understood.
    """
    folder = _existing(folder)
    if verify:
        _verify(folder, only=(CONFIG_FILE,))
    return _parse_info(folder / CONFIG_FILE)


def read_weights(
    folder: str | os.PathLike, verify: bool = True
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Configuration and float32 weights (name -> array) of a model folder, without torch.

    ``verify`` checks every file against the manifest's sha256. Names, shapes and the total size are
    compared with what the configuration needs before any weight is allocated; a weight that is not
    finite is an error. Raises CheckpointError naming the file.
    """
    folder = _existing(folder)
    if verify:
        _verify(folder)
    cfg = _parse_info(folder / CONFIG_FILE).config
    return cfg, read_safetensors(folder / WEIGHTS_FILE, parameter_shapes(cfg))


def write_folder(
    folder: str | os.PathLike,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    dtype: str = "float32",
    class_names=None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    add_parts: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model folder in one step; on any error the place is as it was.

    weights: name -> float array, stored as ``dtype`` ("float32", "float16" or "bfloat16").
    ``overwrite`` replaces a model folder (its other files, such as a model card, stay); a folder
    that is not a model is never replaced. ``add_parts(place)`` puts further folders into it before
    it appears. Raises CheckpointError.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; allowed: {', '.join(DTYPES)}.")
    folder = Path(folder)
    difference = compare_shapes(parameter_shapes(config), {k: v.shape for k, v in weights.items()})
    if difference:
        raise CheckpointError(
            f"cannot write {folder}: weights do not fit the config: {difference}."
        )
    info = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "dtype": dtype,
        "class_names": _checked_names(class_names, config),
        "metadata": dict(metadata or {}),
    }
    with replace_folder(folder, overwrite) as place:
        (place / CONFIG_FILE).write_bytes(_json_bytes(info))
        write_safetensors(place / WEIGHTS_FILE, weights, dtype)
        write_manifest(place)
        if add_parts is not None:
            add_parts(place)
    return folder


def write_manifest(folder: str | os.PathLike) -> None:
    """Write manifest.json for the files now in ``folder`` (after a deliberate change of one)."""
    folder = Path(folder)
    files = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = folder / name
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    with replace_file(folder / MANIFEST_FILE, overwrite=True) as temporary:
        temporary.write_bytes(_json_bytes(manifest))


# ---- atomic replacement ----


@contextlib.contextmanager
def replace_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the block succeeds."""
    folder = Path(os.path.realpath(folder))
    old = _replaceable(folder, overwrite)
    with _write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        with _write_errors(folder):
            place = work / "new"
            place.mkdir()
            yield place
            if old:
                _copy_others(folder, place)
            for path in place.rglob("*"):
                if path.is_file():
                    _sync(path)
            _sync(place)
            if old:
                os.rename(folder, work / "old")
            try:
                os.rename(place, folder)
            except BaseException:
                if old:
                    os.rename(work / "old", folder)
                raise
            _sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def replace_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block succeeds."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise CheckpointError(f"cannot write {path}: it is a folder.")
    if path.exists() and not overwrite:
        raise CheckpointError(
            f"cannot write {path}: it exists. Choose another name (save_model and convert in "
            "Python also take overwrite=True)."
        )
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _replaceable(folder: Path, overwrite: bool) -> bool:
    """Whether something has to be moved away; CheckpointError when that is not allowed."""
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        raise CheckpointError(f"cannot write {folder}: it exists and is not a folder.")
    with _write_errors(folder):
        if not any(folder.iterdir()):
            return False
    if not overwrite:
        raise CheckpointError(
            f"cannot write {folder}: it is not empty. Choose another folder (save_model and "
            "convert in Python also take overwrite=True, to replace the model in it)."
        )
    if not is_model_folder(folder):
        raise CheckpointError(
            f"cannot write {folder}: it holds something that is not an adm_rt model, which "
            "is never overwritten. Choose another folder."
        )
    return True


def is_model_folder(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a folder with a model's config.json and weights."""
    path = Path(path)
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def _copy_others(old: Path, new: Path) -> None:
    for entry in old.iterdir():
        if entry.name in OWN_FILES or os.path.lexists(new / entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


@contextlib.contextmanager
def _write_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {place}: {error.strerror or error}. Choose a place that is writable and "
            "has room; nothing was changed."
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some file systems cannot sync a folder; the rename is still atomic.
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


# ---- JSON and manifest ----


def _json_bytes(value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be plain JSON values: {error}") from error


def _read_json(path: Path) -> tuple[dict, bytes]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, more than a {path.name} can have."
            )
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {_short(error)}. {_FETCH}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object. {_FETCH}")
    return value, data


_FETCH = "Fetch or convert the model again."


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _existing(folder) -> Path:
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a model folder (a folder with {CONFIG_FILE}).")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a model folder: {name} is missing.")
    return folder


def weights_digest(folder: str | os.PathLike) -> str:
    """The manifest's sha256 of a folder's weights, which are not read; their size is checked.

    Without a manifest it is computed. Raises CheckpointError for a damaged manifest.
    """
    folder = _existing(folder)
    if not (folder / MANIFEST_FILE).is_file():
        return file_sha256(folder / WEIGHTS_FILE)
    files = _read_manifest(folder / MANIFEST_FILE)
    _check_size(folder / WEIGHTS_FILE, files[WEIGHTS_FILE])
    return files[WEIGHTS_FILE]["sha256"]


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _verify(folder: Path, only=None) -> None:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, so the weights cannot be checked. {_FETCH} (verify=False reads "
            "them unchecked.)"
        )
    files = _read_manifest(path)
    for name in only or files:
        target = folder / name
        _check_size(target, files[name])
        try:
            digest = file_sha256(target)
        except OSError as error:
            raise CheckpointError(f"cannot read {target}: {error.strerror or error}.") from error
        if digest != files[name]["sha256"]:
            raise CheckpointError(
                f"{target} is damaged: its sha256 is not the manifest's. {_FETCH} If you changed "
                "the file on purpose, call adm_rt.models.weight_folder.write_manifest(folder)."
            )


def _read_manifest(path: Path) -> dict[str, dict]:
    """The manifest's entries: file name -> {"bytes", "sha256"}."""
    manifest, data = _read_json(path)
    version, files = manifest.get("format_version"), manifest.get("files")
    if version != FORMAT_VERSION or not isinstance(files, dict):
        raise CheckpointError(f"{path} has format_version {version!r}, known: {FORMAT_VERSION}.")
    if set(files) != {CONFIG_FILE, WEIGHTS_FILE} or data != _json_bytes(manifest):
        raise CheckpointError(f"{path} is damaged: it is not as it was written. {_FETCH}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise CheckpointError(f"{path} is damaged: bad entry for {name}. {_FETCH}")
    return files


def _check_size(target: Path, entry: dict) -> None:
    try:
        size = target.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {target}: {error.strerror or error}.") from error
    if size != entry["bytes"]:
        raise CheckpointError(
            f"{target} is damaged: it has {size} bytes, but the manifest says "
            f"{entry['bytes']}. {_FETCH}"
        )


def _parse_info(path: Path) -> ModelInfo:
    value, _ = _read_json(path)
    if value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {value.get('format')!r} version {value.get('format_version')!r}; "
            f"this version of adm_rt reads {FORMAT!r} version {FORMAT_VERSION}."
        )
    flags, metadata = value.get("config"), value.get("metadata") or {}
    if not isinstance(flags, dict) or not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path} is damaged: 'config' and 'metadata' must be objects. {_FETCH}"
        )
    try:
        cfg = ModelConfig.from_dict(flags)
        names = _checked_names(value.get("class_names"), cfg)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return ModelInfo(
        cfg, tuple(names) if names else None, metadata, str(value.get("dtype", "float32"))
    )


def _checked_names(names, cfg: ModelConfig) -> list[str] | None:
    if names is None:
        return None
    names = list(names)
    if len(names) != cfg.num_classes or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"class_names has {len(names)} entries, but the model has {cfg.num_classes} classes; "
            "give one string per class."
        )
    return names
