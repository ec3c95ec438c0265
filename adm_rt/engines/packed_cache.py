"""Packed weights of the native engine: made once per process, and kept on disk when they are large.

A cache file is a header of JSON and the blobs of a model's plans, each from a page's start. Its
name is a hash of everything that decides its bytes: the weights' digest, the configuration, the ops
and their sizes, the instruction set, the version of the packed format. It is written beside its
place and renamed, read by mapping it, and checked by a checksum of every blob; one that is damaged
is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
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
MIN_CACHED_BYTES = 32 << 20  # packing less than this takes no time

_PAGE = 4096
_MAX_HEADER = 1 << 16
_OFF = ("", "off", "0", "no", "none", "false")

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


def cache_folder() -> Path | None:
    """Where packed weights are kept: ADM_RT_CACHE, else in the user's cache; None when off."""
    given = os.environ.get(CACHE_VARIABLE)
    if given is not None:
        return None if given.strip().lower() in _OFF else Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "adm_rt"


def _key(model, plans):
    ops = {name: lowered.plan.ops() for name, lowered in plans.items()}
    facts = [PACK_VERSION, extension().cpu_isa(), model.digest, model.cfg.to_dict(), ops]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _load_or_pack(model, key, plans):
    total = sum(lowered.plan.packed_bytes for lowered in plans.values())
    folder = cache_folder() if total >= MIN_CACHED_BYTES else None
    path = None if folder is None else folder / f"{key[:40]}.packed"
    if path is not None:
        blobs = _read(path, key, plans)
        if blobs is not None:
            return PackedPlans(plans, blobs, _note(path, total))
    require_memory(total, "the packed weights")
    weights = model.state_dict()
    blobs = {}
    for name, lowered in plans.items():
        blobs[name] = extension().PackedWeights(lowered.plan.packed_bytes)
        lowered.pack(weights, blobs[name], threads=extension().num_threads())
    del weights
    if path is None:
        return PackedPlans(plans, blobs, "")
    try:
        _write(path, key, blobs)
    except OSError as error:
        note = f"packed weights could not be kept in {folder}: {error.strerror or error}"
        return PackedPlans(plans, blobs, note)
    return PackedPlans(plans, blobs, _note(path, total))


def _note(path, total):
    return (
        f"packed weights take {total / 1e9:.2f} GB in {path.parent} ({CACHE_VARIABLE}=off keeps "
        "none, a folder moves them)"
    )


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
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)  # mode 0600
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
    """The mapped blobs, or None when there is no such file or it is damaged."""
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
    return blobs if checksums == header.get("checksums") else None
