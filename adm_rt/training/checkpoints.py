"""Checkpoints of a training run: folders ``step_<n>`` that are there whole or not at all.

state.safetensors  every tensor of the run (in shards: shard-*.safetensors, one per process)
state.json         step, configuration, loss scale, counters
manifest.json      bytes and sha256 of the others, verified before anything is used

A checkpoint is written into ``.step_<n>.<pid>``, synced, and renamed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from pathlib import Path

import torch

from adm_rt.errors import CheckpointError
from adm_rt.training import shards

FORMAT_VERSION = 1
STATE_FILE = "state.safetensors"
FACTS_FILE = "state.json"
MANIFEST_FILE = "manifest.json"

_NAME = re.compile(r"step_(\d+)")
_TENSORS = re.compile(r"state\.safetensors|shard-[\w-]+\.safetensors")
_ASIDE = re.compile(r"\.step_\d+\.\d+(\.old)?")
_CHUNK = 1 << 22
_TAGS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Checkpoints:
    """The checkpoints in the folder ``out``, of which the newest ``keep`` are kept.

    ``hold()`` claims the folder for this process and removes what killed runs left half-written.
    """

    def __init__(self, out, keep):
        self.out = Path(out)
        self.keep = keep

    def __iter__(self):
        """(step, path) of every checkpoint, newest first."""
        found = []
        for path in self.out.glob("step_*"):
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
        return iter(sorted(found, reverse=True))

    @contextlib.contextmanager
    def hold(self):
        """Make the folder and keep other runs out of it; CheckpointError when one is in it."""
        with _write_errors(self.out, self):
            self.out.mkdir(parents=True, exist_ok=True)
            lock = open(self.out / ".lock", "a+")
        with lock:
            _claim(lock, self.out)
            for path in self.out.glob(".step_*"):
                if _ASIDE.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            yield

    def write(self, step, tensors, facts, whole=lambda tensor: tensor):
        """Write checkpoint ``step`` and drop old ones; returns its folder.

        tensors: by name; ``whole(tensor)`` gives the values of one, asked in their order. facts:
        JSON values. Raises CheckpointError when the disk is full or fails; nothing half-written
        stays and earlier checkpoints are untouched.
        """
        aside = self.begin(step)
        with self.writing(step, aside):
            files = {STATE_FILE: _write_tensors(aside / STATE_FILE, tensors, whole)}
            return self.commit(step, aside, facts, files)

    def begin(self, step):
        """A new folder, into which the state's files are written before ``commit``."""
        aside = self.out / f".step_{step:07d}.{os.getpid()}"
        with self.writing(step):
            aside.mkdir()
        return aside

    def commit(self, step, aside, facts, files=None):
        """Make the folder of ``begin`` checkpoint ``step``, drop old ones; returns its folder.

        facts: JSON values; files: manifest entries of what is in the folder (None: made here).
        """
        target = self.out / f"step_{step:07d}"
        old = aside.with_name(aside.name + ".old")
        with self.writing(step, aside):
            if files is None:
                files = {path.name: _entry(path) for path in sorted(aside.iterdir())}
            facts = {"format_version": FORMAT_VERSION, "step": step, **facts}
            files = {**files, FACTS_FILE: _write_json(aside / FACTS_FILE, facts)}
            _write_json(aside / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": files})
            _sync_folder(aside)
            if target.exists():  # damaged, or it would have been continued from
                os.rename(target, old)
            os.rename(aside, target)
            _sync_folder(self.out)
        shutil.rmtree(old, ignore_errors=True)
        # A newer one was found damaged, and this run will write it again.
        steps = [found for found, _ in self if found <= step]
        for found, path in self:
            if found not in steps[: self.keep]:
                shutil.rmtree(path, ignore_errors=True)
        return target

    @contextlib.contextmanager
    def writing(self, step, aside=None):
        """OSErrors become CheckpointErrors, and any error removes the folder ``aside``."""
        try:
            with _write_errors(self.out / f"step_{step:07d}", self):
                yield
        except BaseException:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
                shutil.rmtree(aside.with_name(aside.name + ".old"), ignore_errors=True)
            raise

    def newest(self, report):
        """Folder and facts of the newest undamaged checkpoint, or None where there is none.

        report: called with one line for every damaged one. Raises CheckpointError when all are
        damaged, or when one is of another format.
        """
        problems = []
        for _, path in self:
            try:
                facts = _verified_facts(path)
            except _Damaged as error:
                problems.append(str(error))
                report(f"checkpoint {path.name} is damaged and is not used: {error}")
                continue
            if facts.get("format_version") != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has format_version {facts.get('format_version')!r}; this version "
                    f"continues {FORMAT_VERSION}. Choose another out."
                )
            return path, facts
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.out} can be used: {problems[0]} To start anew, choose "
                "another out or remove them."
            )
        return None

    def names(self):
        """The checkpoints there are, for a message."""
        names = [path.name for _, path in self]
        return f"{', '.join(names)} in {self.out}" if names else "there was none yet"


def saved_shapes(path):
    """Name -> shape of all tensors of the (verified) checkpoint folder ``path``."""
    from safetensors import safe_open

    with _read_errors(path):
        if _in_shards(path):
            return shards.shapes(path)
        with safe_open(path / STATE_FILE, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def fill(path, tensors, assign, together):
    """Fill ``tensors`` by name from the (verified) checkpoint folder ``path``.

    ``assign(target, value)`` copies a whole tensor; together: see ``shards.read``.
    """
    from safetensors import safe_open

    with _read_errors(path):
        if _in_shards(path):
            return shards.read(path, tensors, together)
        with safe_open(path / STATE_FILE, "pt") as file:
            for name, target in tensors.items():
                assign(target, file.get_tensor(name))


def _in_shards(path):
    return any(
        _TENSORS.fullmatch(entry.name) for entry in path.iterdir() if entry.name != STATE_FILE
    )


@contextlib.contextmanager
def _read_errors(path):
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}. Every process of a run must see the "
            "folder out."
        ) from error


class _Damaged(Exception):
    """A checkpoint is not as it was written; the message says how."""


def _verified_facts(path):
    """The facts of a checkpoint whose files are as they were written."""
    facts = None
    try:
        if not (path / MANIFEST_FILE).exists():
            facts = json.loads((path / FACTS_FILE).read_bytes())
            if "format_version" not in facts:
                return facts  # of a version that wrote no manifest: refused as such
            raise _Damaged(f"{MANIFEST_FILE} is missing.")
        files = json.loads((path / MANIFEST_FILE).read_bytes())["files"]
        if FACTS_FILE not in files or not any(_TENSORS.fullmatch(name) for name in files):
            raise _Damaged(f"{MANIFEST_FILE} names no state.")
        for name, entry in files.items():
            if name != FACTS_FILE and not _TENSORS.fullmatch(name):
                raise _Damaged(f"{MANIFEST_FILE} names {name!r}.")
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise _Damaged(f"{name} has {size} bytes, not {entry['bytes']}.")
            if _entry(path / name)["sha256"] != entry["sha256"]:
                raise _Damaged(f"{name} is not as it was written (sha256).")
        return json.loads((path / FACTS_FILE).read_bytes())
    except OSError as error:
        name = Path(error.filename or path).name
        raise _Damaged(f"{name} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damaged(f"{MANIFEST_FILE} or {FACTS_FILE} is not what was written.") from error


def _entry(path):
    """The manifest's entry of the file ``path``."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


class _HashedFile:
    """A new file that is hashed while it is written and synced before it is closed."""

    def __init__(self, path):
        self._file = open(path, "xb")
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data):
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def finish(self):
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def _write_tensors(path, tensors, whole):
    """A safetensors file, one tensor in memory at a time; returns its manifest entry."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TAGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = _HashedFile(path)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        values = whole(tensor).detach().cpu().contiguous().reshape(-1)
        file.write(memoryview(values.view(torch.uint8).numpy()))
    return file.finish()


def _write_json(path, value):
    file = _HashedFile(path)
    file.write((json.dumps(value, indent=2) + "\n").encode())
    return file.finish()


def _sync_folder(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some file systems cannot sync a folder; the rename is still atomic
    finally:
        os.close(handle)


def _claim(lock, out):
    try:
        import fcntl
    except ImportError:  # no POSIX locks here: two runs in one folder go unnoticed
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read(20).strip() or "unknown"
        raise CheckpointError(
            f"another run (process {owner}) is training into {out}. Wait for it, end it, or "
            "choose another out."
        ) from None
    except OSError:
        return  # a file system without locks
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()


@contextlib.contextmanager
def _write_errors(place, checkpoints):
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {place}: {error.strerror or error}. Earlier checkpoints are intact "
            f"({checkpoints.names()}): make room and start the same run again to continue."
        ) from error
