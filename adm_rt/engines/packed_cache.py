"""Packed weights of the native engine: made once per process, and kept on disk when they are large.

A cache file is a header of JSON and the blobs of a model's plans, each from a page's start. Its
name is a hash of everything that decides its bytes: the weights' digest, the network's flags, the
ops and their sizes, the instruction set, the version of the packed format. It is written beside its
place and renamed, read on all threads, and checked by a checksum of every blob; one that is damaged
is made again. Together the files take ``limit_bytes()`` at most: those that were not used for
longest make room for a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

from adm_rt.engines.memory import require_memory
from adm_rt.engines.plan_builder import LoweredPlan
from adm_rt.models.model_weights import ModelWeights
from adm_rt.ops._library import extension

# To be raised when an op packs its weights in another way without needing another number of bytes.
PACK_VERSION = 1
CACHE_VARIABLE = "ADM_RT_CACHE"
LIMIT_VARIABLE = "ADM_RT_CACHE_GB"
DEFAULT_LIMIT_GB = 20.0
MIN_CACHED_BYTES = 32 << 20  # packing less than this takes no time

# Flags of training and of the diffusion process: no plan depends on them.
_OTHER_FLAGS = frozenset(
    "dropout use_checkpoint use_fp16 diffusion_steps noise_schedule timestep_respacing "
    "predict_xstart rescale_timesteps sigma_small rescale_learned_sigmas use_kl".split()
)

_PAGE = 4096
_MAX_HEADER = 1 << 16
_OFF = ("", "off", "0", "no", "none", "false")
_SUFFIX, _UNFINISHED = ".packed", ".tmp"
_ABANDONED_SECONDS = 86400  # nobody writes a file for a day

_packed: weakref.WeakValueDictionary[str, PackedPlans] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def _forget_lock():
    global _lock  # a thread of the parent may have held it
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_lock)


class PackedPlans:
    """Plans by name and the packed weights of each; shared by all engines of one model."""

    def __init__(self, plans: Mapping[str, LoweredPlan], blobs: Mapping[str, object], note: str):
        self.plans = {name: lowered.plan for name, lowered in plans.items()}
        self.blobs = dict(blobs)
        self.note = note  # one line on the cache, or ""

    def run(self, name, batch, inputs, outputs, profile=False):
        """Run one plan: name -> float32 arrays [batch, ...]; ``outputs`` are written."""
        return self.plans[name].run(batch, inputs, outputs, self.blobs[name], profile)


def packed_plans(model: ModelWeights, lower) -> PackedPlans:
    """The packed plans of ``model``, from this process, the cache, or its weights.

    ``lower()`` gives name -> LoweredPlan, and is a function of the model's configuration. Raises
    CheckpointError when the weights have to be read and are damaged, MemoryError.
    """
    plans = lower()
    key = _key(model, plans)
    with _lock:  # two engines of one model must not pack it twice
        found = _packed.get(key)
        if found is None:
            found = _packed[key] = _load_or_pack(model, key, plans)
        return found


def is_on(text):
    """Whether the value of an environment variable means yes."""
    return text.strip().lower() not in _OFF


def cache_folder() -> Path | None:
    """Where packed weights are kept: ADM_RT_CACHE, else in the user's cache; None when off."""
    given = os.environ.get(CACHE_VARIABLE)
    if given is not None:
        return Path(given).expanduser() if is_on(given) else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "adm_rt"


def limit_bytes() -> int:
    """What the files may take together: ADM_RT_CACHE_GB, else 20 GB. ValueError for no number."""
    text = os.environ.get(LIMIT_VARIABLE, "").strip() or str(DEFAULT_LIMIT_GB)
    try:
        limit = float(text)
        if not 0 <= limit < 1e9:
            raise ValueError
    except ValueError:
        raise ValueError(f"{LIMIT_VARIABLE}={text!r}: give gigabytes, such as 20 or 2.5") from None
    return int(limit * 1e9)


def cache_report():
    """JSON-ready facts for ``adm-rt info``."""
    folder = cache_folder()
    if folder is None:
        return {"folder": None, "why": f"{CACHE_VARIABLE}={os.environ[CACHE_VARIABLE]}"}
    files = _files(folder)
    return {
        "folder": str(folder),
        "files": len(files),
        "GB": round(sum(status.st_size for _, status in files) / 1e9, 2),
        "limit_GB": round(limit_bytes() / 1e9, 2),
    }


def _key(model, plans):
    ops = {name: lowered.plan.ops() for name, lowered in plans.items()}
    flags = {k: v for k, v in model.cfg.to_dict().items() if k not in _OTHER_FLAGS}
    facts = [PACK_VERSION, extension().cpu_isa(), model.digest, flags, ops]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _load_or_pack(model, key, plans):
    total = sum(lowered.plan.packed_bytes for lowered in plans.values())
    folder = cache_folder() if total >= MIN_CACHED_BYTES else None
    path = None if folder is None else folder / f"{key[:40]}{_SUFFIX}"
    limit = limit_bytes()
    require_memory(total, "the packed weights")
    if path is not None:
        blobs = _read(path, key, plans)
        if blobs is not None:
            return PackedPlans(plans, blobs, _note(path, total))
    weights = model.state_dict()
    blobs = {}
    for name, lowered in plans.items():
        blobs[name] = extension().PackedWeights(lowered.plan.packed_bytes)
        lowered.pack(weights, blobs[name], threads=extension().num_threads())
    del weights
    if path is None:
        return PackedPlans(plans, blobs, "")
    if total > limit:
        note = f"packed weights are not kept: {total / 1e9:.2f} GB are over {LIMIT_VARIABLE}"
        return PackedPlans(plans, blobs, note)
    try:
        _make_room(folder, limit - total, path)
        _write(path, key, blobs)
    except OSError as error:
        note = f"packed weights could not be kept in {folder}: {error.strerror or error}"
        return PackedPlans(plans, blobs, note)
    return PackedPlans(plans, blobs, _note(path, total))


def _note(path, total):
    return (
        f"packed weights take {total / 1e9:.2f} GB in {path.parent} ({CACHE_VARIABLE}=off keeps "
        f"none, a folder moves them; {LIMIT_VARIABLE} bounds all of them)"
    )


# ---- the folder ----


def _files(folder, suffix=_SUFFIX):
    """(path, status) of the files there, the least recently used first."""
    found = []
    for path in folder.glob(f"*{suffix}"):
        try:
            found.append((path, path.stat()))
        except OSError:  # gone meanwhile
            continue
    return sorted(found, key=lambda file: file[1].st_mtime)


def _make_room(folder, room, path):
    """Delete files until the others than ``path`` take ``room`` bytes, and what was never
    finished."""
    for unfinished, status in _files(folder, _UNFINISHED):
        if time.time() - status.st_mtime > _ABANDONED_SECONDS:
            unfinished.unlink(missing_ok=True)
    files = [(other, status.st_size) for other, status in _files(folder) if other != path]
    taken = sum(size for _, size in files)
    for other, size in files:
        if taken <= room:
            return
        other.unlink(missing_ok=True)
        taken -= size


# ---- the file ----


def _layout(sizes):
    """name -> (offset, bytes) of the blobs in a file, and the file's size."""
    offset, places = _MAX_HEADER, {}
    for name, size in sizes.items():
        places[name] = (offset, size)
        offset += -(-size // _PAGE) * _PAGE
    return places, offset


def _write(path, key, blobs):
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    places, size = _layout({name: blob.nbytes for name, blob in blobs.items()})
    header = {"key": key, "checksums": {name: blob.checksum() for name, blob in blobs.items()}}
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=_UNFINISHED, dir=path.parent)  # 0600
    try:
        with open(handle, "wb") as file:
            file.write(json.dumps(header).encode())
            for name, (offset, _) in places.items():
                file.seek(offset)
                file.write(memoryview(blobs[name]))
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path, key, plans):
    """The blobs, or None when there is no such file or it is damaged."""
    places, size = _layout({name: lowered.plan.packed_bytes for name, lowered in plans.items()})
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size != size or status.st_uid != os.geteuid():
                return None
            header = json.loads(file.read(_MAX_HEADER).rstrip(b"\0"))
        if not isinstance(header, dict) or header.get("key") != key:
            return None
        blobs = {
            name: extension().PackedWeights(str(path), offset, bytes_)
            for name, (offset, bytes_) in places.items()
        }
        checksums = {name: blob.checksum() for name, blob in blobs.items()}
    except (OSError, ValueError, RuntimeError):
        return None
    if checksums != header.get("checksums"):
        return None
    with contextlib.suppress(OSError):  # a folder that is read-only
        os.utime(path)
    return blobs
