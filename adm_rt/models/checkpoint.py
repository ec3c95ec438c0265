"""Weights into modules and back: released ``.pt`` files and this package's model folders.

A ``.pt`` is only ever read with ``weights_only=True``: a pickle that holds code is refused, not
run. Its flags come from the weights (names and shapes), the rest from a preset or the caller. torch
is imported when a function needs it, so importing this module does not import torch.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from adm_rt.errors import CheckpointError
from adm_rt.models.config import (
    CLASSIFIER_ALIASES,
    ModelConfig,
    coerce_flag,
    nearest,
    normalize_flags,
)
from adm_rt.models.flag_inference import FREE_FLAGS, infer_config, resolve_config
from adm_rt.models.model_weights import ModelWeights
from adm_rt.models.parameter_shapes import parameter_shapes
from adm_rt.models.presets import preset as find_preset
from adm_rt.models.presets import preset_name
from adm_rt.models.weight_folder import (
    ModelInfo,
    file_sha256,
    is_model_folder,
    read_info,
    read_weights,
    replace_file,
    weights_digest,
    write_folder,
    write_manifest,
)

__all__ = [
    "ModelInfo",
    "convert",
    "convert_attention_order",
    "infer_config",
    "is_model_folder",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "module_of",
    "read_info",
    "read_weights",
    "save_model",
    "write_manifest",
]

ATTENTION_ORDERS = ("keep", "legacy", "new")
_MIN_TORCH = (2, 6)  # older weights_only loaders have known ways around them


def load_checkpoint(
    path: str | os.PathLike,
    preset: str | None = None,
    *,
    attention_order: str = "keep",
    verify: bool = True,
    **flags,
):
    """The network in a released ``.pt`` or a model folder: float32, on the CPU, in eval mode.

    ``preset`` is the name of a released model; without it the file's name and then the weights
    themselves are asked (``preset="none"`` asks neither). ``flags`` are ModelConfig fields or
    guided-diffusion's classifier flags. What the weights tell must agree with both; what they
    cannot tell (head count, attention order, noise schedule, rescale_timesteps, image size) is
    taken from ``flags``, then the preset. ``attention_order`` "legacy" or "new" permutes the qkv
    projections, exactly. ``verify`` checks a folder's sha256.

    Returns a UNet, SuperResUNet or NoisyClassifier; ``.cfg`` is its configuration and ``.info`` a
    ModelInfo. Raises CheckpointError: unreadable or unsafe file, a flag that disagrees with the
    weights, flags that are needed, or weights that do not fit.
    """
    info, weights = _load(path, preset, attention_order, verify, flags)
    return _module(info, weights)


def load_weights(
    path: str | os.PathLike,
    preset: str | None = None,
    *,
    attention_order: str = "keep",
    verify: bool = True,
    **flags,
) -> ModelWeights:
    """As ``load_checkpoint``, but without torch (a ``.pt`` needs it to be read).

    Returns ModelWeights: the configuration is read and checked now, the weights when they are
    asked for.
    """
    info, read, digest = _open(path, preset, attention_order, verify, flags)
    expected = digest()

    def unchanged():
        weights = read()
        if Path(path).is_dir() and digest() != expected:
            raise CheckpointError(f"{path} was replaced while it was being loaded. Load it again.")
        return weights

    return ModelWeights(info, unchanged, expected)


def load_model(folder: str | os.PathLike, verify: bool = True):
    """The network in a model folder, as ``load_checkpoint``; its config.json says everything."""
    info = read_info(folder, verify)
    return _module(info, read_weights(folder, verify)[1])


def save_model(
    folder: str | os.PathLike,
    model,
    dtype: str = "float32",
    class_names=None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``model`` (a module of this package, or (config, state_dict)) as a model folder.

    dtype "float32", "float16" or "bfloat16" is how the weights are stored; they are loaded to
    float32. class_names (one string per class) and metadata (JSON values) go to config.json; a
    loaded module's own are kept when they are not given. The folder appears complete or not at all;
    a non-empty one is replaced only with ``overwrite``. Raises CheckpointError.
    """
    if isinstance(model, tuple):
        config, state = model
    else:
        config, state = model.cfg, model.state_dict()
        own = getattr(model, "info", None)
        if own is not None:
            class_names = own.class_names if class_names is None else class_names
            metadata = own.metadata if metadata is None else metadata
    weights = {name: _array(tensor) for name, tensor in state.items()}
    return write_folder(folder, config, weights, dtype, class_names, metadata, overwrite)


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str | None = None,
    *,
    preset: str | None = None,
    attention_order: str = "keep",
    class_names=None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    **flags,
) -> Path:
    """Convert a ``.pt`` to a model folder, a folder to a ``.pt``, or either to another dtype.

    ``dst`` ending in ".pt" is written as a plain state_dict by ``torch.save``, else as a folder.
    ``dtype`` is by default float32 for a ``.pt`` source (as released) and what the folder had
    otherwise. A saved pipeline's classifier and upsampler are taken along into a folder; a ``.pt``
    holds one network. The rest as in ``load_checkpoint`` and ``save_model``.
    """
    dst = Path(dst)
    if dtype is not None and dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} is not known; allowed: float32, float16, bfloat16.")
    if os.path.realpath(src) == os.path.realpath(dst) and not overwrite:
        raise CheckpointError(
            f"{src} and {dst} are the same place. Choose another (convert in Python also takes "
            "overwrite=True)."
        )
    info, weights = _load(src, preset, attention_order, verify, flags)
    given_dtype, dtype = dtype, dtype or info.dtype
    if dst.suffix != ".pt":
        names = info.class_names if class_names is None else class_names
        notes = info.metadata if metadata is None else metadata
        parts = _parts_inside(src, notes)

        def add_parts(place):
            for part in parts:
                convert(Path(src) / part, place / part, given_dtype, verify=verify)

        return write_folder(
            dst, info.config, weights, dtype, names, notes, overwrite, add_parts if parts else None
        )
    import torch

    state = {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in weights.items()}
    with replace_file(dst, overwrite) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
    return dst


def _parts_inside(src, metadata) -> list[str]:
    """Folders inside ``src`` that its metadata names as its classifier and upsampler."""
    named = [metadata.get(part) for part in ("classifier", "upsampler")]
    # A listed name cannot be a path that leads out of the folder.
    inside = os.listdir(src) if Path(src).is_dir() else []
    return [name for name in sorted(inside) if name in named and is_model_folder(Path(src) / name)]


def convert_attention_order(
    config: ModelConfig, weights: dict[str, Any], order: str
) -> tuple[ModelConfig, dict[str, Any]]:
    """The same network with qkv channels in ``order`` ("legacy" or "new"): an exact permutation.

    Legacy rows are head, {q,k,v}, channel; new rows are {q,k,v}, head, channel. weights: name ->
    array or tensor; those that are not touched are handed on, not copied. The classifier's pooling
    head is always in the new order and stays as it is.
    """
    _check_order(order)
    if order == "keep" or (order == "new") == config.use_new_attention_order:
        return config, dict(weights)
    out = {}
    for name, value in weights.items():
        if name.endswith((".qkv.weight", ".qkv.bias")):
            heads = config.heads(value.shape[0] // 3, upsample=name.startswith("output_blocks"))
            split = (heads, 3) if order == "new" else (3, heads)
            width = value.shape[0] // (3 * heads)
            rows = value.reshape(*split, width, *value.shape[1:])
            value = rows.swapaxes(0, 1).reshape(value.shape)
        out[name] = value
    return config.replace(use_new_attention_order=order == "new"), out


# ---- reading ----


def _load(path, preset, attention_order, verify, flags) -> tuple[ModelInfo, dict[str, np.ndarray]]:
    info, read, _ = _open(path, preset, attention_order, verify, flags)
    return info, read()


def _open(path, preset, attention_order, verify, flags):
    """(ModelInfo, a function that reads the weights, a function that gives their digest)."""
    _check_order(attention_order)
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if path.is_dir():
        info = read_info(path, verify)
        config = _checked_folder_config(path, info.config, preset, flags)

        def raw():
            return read_weights(path, verify)[1]

        def digest():
            return weights_digest(path)
    else:
        state = _read_pt(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        name, origin = _chosen_preset(path, preset)
        config, name = resolve_config(
            shapes, flags, name, origin, str(path), search=preset != "none"
        )
        if name and not origin:
            warnings.warn(
                f"{path}: names and shapes are those of the released model {name!r}; head count, "
                "attention order and schedule are taken from it. Pass preset= to say so yourself.",
                stacklevel=5,
            )
        info = ModelInfo(config, metadata={"source": path.name, "preset": name} if name else {})

        def raw():
            return _state_arrays(path, state, config)

        def digest():
            return file_sha256(path)

    converted, _ = convert_attention_order(config, {}, attention_order)

    def read():
        weights = convert_attention_order(config, raw(), attention_order)[1]
        return {k: np.ascontiguousarray(v) for k, v in weights.items()}

    return ModelInfo(converted, info.class_names, info.metadata, info.dtype), read, digest


def _state_arrays(path, state, config):
    """Finite float32 copies of a ``.pt`` file's tensors: it stays mapped, and may change."""
    weights = {k: np.array(_array(state[k])) for k in parameter_shapes(config)}
    for key, array in weights.items():
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{path}: weight {key!r} has NaN or infinite values; the model is not usable."
            )
    return weights


def _chosen_preset(path: Path, preset: str | None) -> tuple[str | None, str]:
    if preset is None:
        name = preset_name(path)
        return name, "by the file's name" if name else ""
    if preset == "none":
        return None, ""
    find_preset(preset)  # ValueError with the known names
    return preset_name(preset), "given"


def _checked_folder_config(path, config: ModelConfig, preset, flags) -> ModelConfig:
    """config.json's flags, with those changed that do not touch what the weights mean."""
    given = {k: coerce_flag(k, v) for k, v in normalize_flags(flags, config.kind).items()}
    own = config.to_dict()
    spelt = {k: CLASSIFIER_ALIASES.get(k) for k in given}  # as the caller wrote it
    wanted = {f"flag {spelt[k] if spelt[k] in flags else k}": (k, v) for k, v in given.items()}
    if preset not in (None, "none"):
        base = find_preset(preset).replace(**{k: v for k, v in given.items() if k != "kind"})
        wanted |= {f"preset {preset!r}: {k}": (k, v) for k, v in base.to_dict().items()}
    for origin, (name, value) in wanted.items():
        if name not in FREE_FLAGS and own[name] != value:
            raise CheckpointError(
                f"{origin}={value!r} disagrees with {path / 'config.json'}, which says "
                f"{own[name]!r}. Leave it out: the folder knows its flags."
            )
    return config.replace(**{k: v for k, v in given.items() if k in FREE_FLAGS})


def _read_pt(path: Path) -> dict[str, Any]:
    """name -> CPU tensor of a ``.pt`` file, read without running anything in it."""
    import torch

    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < _MIN_TORCH:
        raise CheckpointError(
            f"torch {torch.__version__} cannot read {path} safely: install torch>=2.6."
        )
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(8)[:1] == b"<":
                raise CheckpointError(
                    f"{path} is a web page, not weights; the download failed. Fetch it again."
                )
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_zip(path)
        with warnings.catch_warnings():  # of torch's, about files that are refused anyway
            warnings.simplefilter("ignore")
            # Mapped, not read: weights are then in memory once.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # damaged files raise many types, from zip, pickle and torch
        raise _refused(path, error) from None
    return _checked_state(path, state, size)


def _check_zip(path: Path) -> None:
    # torch.save stores without compression; anything else could unpack to any size.
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path} is a compressed archive, which torch.save never writes. Unpack it: "
                    "the .pt file is inside, or this is another kind of file."
                )


def _refused(path: Path, error: Exception) -> CheckpointError:
    # torch's own text advises weights_only=False, which would run the code: it is not passed on.
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return CheckpointError(
            f"{path} is refused: it holds more than weights (it would call {code[1]!r}), and "
            "nothing in it was run. Ask its maker for a plain state_dict of tensors or safetensors."
        )
    return CheckpointError(
        f"{path} is no readable .pt file, or is damaged ({type(error).__name__}). Check its size "
        "against the source and fetch it again; a state_dict saved by torch.save is expected."
    )


def _checked_state(path: Path, state, size: int) -> dict[str, Any]:
    import torch

    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state_dict.")
    nested = [k for k, v in state.items() if isinstance(v, dict)]
    if nested:
        raise CheckpointError(
            f"{path} holds state_dicts inside it ({', '.join(map(str, nested[:4]))}). Save the one "
            f"you want alone: torch.save(torch.load(...)[{str(nested[0])!r}], 'model.pt')."
        )
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: entry {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor."
            )
        if tensor.layout != torch.strided or tensor.dtype not in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float64,
        ):
            raise CheckpointError(
                f"{path}: weight {name[:80]!r} is {tensor.dtype}, {tensor.layout}; floating-point "
                "dense weights are expected."
            )
        total += tensor.numel() * tensor.element_size()
    if total > size:
        # Views of one small storage could claim any size.
        raise CheckpointError(f"{path} is damaged: {total} bytes of weights in a file of {size}.")
    return state


# ---- modules ----


def _array(tensor) -> np.ndarray:
    """float32 NumPy copy or view of a tensor or array."""
    if isinstance(tensor, np.ndarray):
        return tensor.astype(np.float32, copy=False)
    import torch

    return tensor.detach().to("cpu", torch.float32).numpy()


def empty_module(config: ModelConfig, build=None):
    """The network of ``config`` on torch's meta device: shapes and names, no memory, no values.

    build: what makes it of ``config``; None for ``models.build``.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    from adm_rt import models

    class NoInitialisation(TorchFunctionMode):
        # normal_ on the meta device would import torch._dynamo, which takes seconds.
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if getattr(function, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in kwargs else args[0]
            return function(*args, **kwargs)

    with torch.device("meta"), NoInitialisation():
        return (build or models.build)(config)


def module_of(model):
    """The torch module of a ``ModelWeights``; a module is returned as it is."""
    if not isinstance(model, ModelWeights):
        return model
    return _module(model.info, model.state_dict())


def _module(info: ModelInfo, weights: dict[str, np.ndarray]):
    import torch

    module = empty_module(info.config)
    state = {
        name: torch.from_numpy(np.require(w, requirements="CW")) for name, w in weights.items()
    }
    module.load_state_dict(state, assign=True)
    module.info = info
    return module.eval()


def _check_order(order: str) -> None:
    if order not in ATTENTION_ORDERS:
        raise ValueError(
            f"attention_order={order!r} is not known; allowed: {', '.join(ATTENTION_ORDERS)}."
            + nearest(order, ATTENTION_ORDERS)
        )
