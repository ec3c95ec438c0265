"""Built TensorRT engines on disk: the cache folder, its files, and files from elsewhere.

An engine file is a line of magic, a line of JSON {"facts", "size", "sha256"} and the plan.
``facts`` are everything that decides the plan (weights, graph, versions, GPU, batch sizes, dtype);
the file's name is a hash of them. A plan is executable code to TensorRT, so only files are loaded
that this user made: the folder is ours with mode 0700, the file is ours and nobody else may write
it. Any other file has to be adopted with ``trust=True``.

Files are written aside and renamed. A damaged one is built again. Processes that want the same
engine wait for the first of them, and then read what it wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

from adm_rt.engines.packed_cache import CACHE_VARIABLE, cache_folder

MAGIC = b"adm_rt tensorrt engine 1\n"
SUFFIX = ".engine"

_MAX_HEADER = 1 << 20
_WAY_OUT = f"set {CACHE_VARIABLE} to a folder of yours, or to off to build anew every time"


class ForeignEngineError(ValueError):
    """An engine file that was not made here, and that nobody vouched for."""


def default_folder() -> Path | None:
    """``tensorrt`` in the cache of the native engine's packed weights; None: the cache is off."""
    folder = cache_folder()
    return None if folder is None else folder / "tensorrt"


def key_of(facts) -> str:
    """The name of an engine: a hash of its facts (JSON values)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def read_facts(file):
    """The facts in an engine file's header; nothing of the plan is used. Raises ValueError."""
    return _read_foreign(file, lambda opened: _read_header(opened)["facts"])


class EngineCache:
    """Engine files of one folder. ``EngineCache(None)`` keeps nothing.

    ``notes``: one-line remarks on what was found. Facts are dicts of JSON values with at least
    "weights" (sha256 of the weights) and "gpu".
    """

    def __init__(self, folder):
        self.folder = None if folder is None else Path(folder)
        self.notes = []

    def path(self, facts) -> Path:
        return self.folder / (key_of(facts) + SUFFIX)

    def get(self, facts) -> bytes | None:
        """The plan for these facts, or None: there is none, or it is damaged or not ours."""
        if self.folder is None or not self._folder_is_ours():
            return None
        path = self.path(facts)
        try:
            found, plan = _read_own(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.notes.append(f"engine file {path.name} is not used and made again: {error}")
            return None
        return plan if found == facts else None

    def get_or_build(self, facts, build, waiting=None) -> bytes:
        """The plan for these facts, from disk, or from ``build()``, which is then kept.

        Of several processes one builds; ``waiting()`` is called in the others before they wait.
        Raises OSError before ``build`` is called when the folder cannot be written.
        """
        plan = self.get(facts)
        if plan is not None:
            return plan
        if self.folder is None:
            return build()
        self._make_folder()
        with self.lock(key_of(facts), waiting):
            plan = self.get(facts)  # another process may have made it meanwhile
            if plan is None:
                plan = build()
                try:
                    self.put(facts, plan)
                except OSError as error:  # a full disk must not cost a finished build
                    self.notes.append(f"the engine could not be kept: {error}")
        return plan

    def put(self, facts, plan):
        """Write an engine file, whole or not at all."""
        self._make_folder()
        _write_aside(self.path(facts), _header(facts, plan), plan)

    def forget(self, facts):
        """Remove an engine file that turned out to be useless."""
        if self.folder is not None:
            self.path(facts).unlink(missing_ok=True)

    def similar(self, facts, names):
        """Facts of the engines that differ from ``facts`` in nothing but ``names``, or not even
        there, in a fixed order."""
        if self.folder is None or not self._folder_is_ours():
            return []
        free, found = dict.fromkeys(names), []
        for path in sorted(self.folder.glob("*" + SUFFIX)):
            try:
                with _open_own(path) as file:
                    other = _read_header(file)["facts"]
            except (OSError, ValueError):
                continue
            if {**other, **free} == {**facts, **free}:
                found.append(other)
        return found

    def adopt(self, file, facts, trust=False) -> None:
        """Copy an engine file that was built elsewhere into the cache.

        file: written by ``adm-rt build-engine``. facts: those of the engine that is wanted here.
        Raises ForeignEngineError without ``trust`` (a plan is code: only from people you trust),
        ValueError when the file is damaged or for other weights, another GPU, version or dtype.
        """
        if not trust:
            raise ForeignEngineError(
                f"{file} was not built here. An engine file is executable code: pass trust=True "
                "(--trust) if you trust who made it, or build it from the model instead"
            )
        found, plan = _read_foreign(file, _read)
        different = [name for name in {**facts, **found} if found.get(name) != facts.get(name)]
        if different:
            name = min(different, key=[*facts, *found].index)
            raise ValueError(
                f"{file} is an engine for {name}={_short(found.get(name))}, but "
                f"{_short(facts.get(name))} is needed here; build one with adm-rt build-engine"
            )
        self.put(facts, plan)

    @staticmethod
    def copy(facts, plan, path):
        """Write an engine file elsewhere, to be adopted there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_aside(path, _header(facts, plan), plan)

    @contextlib.contextmanager
    def lock(self, name, waiting=None):
        """Only one process at a time is inside, for one name."""
        path = self.folder / f"{name}.lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)  # ends the lock

    # ---- the timing cache: what TensorRT measured, which makes the next build short ----

    def timing_cache(self, name) -> bytes:
        """What an earlier build with this library on this GPU measured; b"" when nothing."""
        if self.folder is None or not self._folder_is_ours():
            return b""
        try:
            with _open_own(self._timing_path(name)) as file:
                data = file.read()
        except (OSError, ValueError):
            return b""
        digest, _, body = data.partition(b"\n")
        return body if hashlib.sha256(body).hexdigest().encode() == digest else b""

    def put_timing_cache(self, name, data):
        if self.folder is not None:
            digest = hashlib.sha256(data).hexdigest().encode()
            _write_aside(self._timing_path(name), digest + b"\n", data)

    def _timing_path(self, name):
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}.timing"

    # ---- the folder ----

    def _make_folder(self):
        try:
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".probe", dir=self.folder)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        os.close(handle)
        os.unlink(name)
        self._folder_is_ours()

    def _folder_is_ours(self):
        """False when it is not there; PermissionError when others may put files into it."""
        try:
            status = os.lstat(self.folder)
        except OSError:
            return False
        why = ""
        if not stat.S_ISDIR(status.st_mode):
            why = "it is a link or a file, not a folder"
        elif status.st_uid != os.geteuid():
            why = f"it belongs to user {status.st_uid}, not to you"
        elif status.st_mode & 0o022:
            why = f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o}; chmod 700)"
        if why:
            raise PermissionError(
                f"cache folder {self.folder} is not safe for engines: {why}. {_sentence(_WAY_OUT)}"
            )
        if status.st_mode & 0o077:
            os.chmod(self.folder, 0o700)
        return True


def _unwritable(folder, error):
    return OSError(
        f"cache folder {folder} cannot be written: {error.strerror or error}. {_sentence(_WAY_OUT)}"
    )


def _sentence(text):
    return text[0].upper() + text[1:]


# ---- the file ----


def _header(facts, plan):
    digest = hashlib.sha256(plan).hexdigest()
    header = {"facts": facts, "size": len(plan), "sha256": digest}
    return MAGIC + json.dumps(header, sort_keys=True).encode() + b"\n"


def _write_aside(path, *parts):
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)  # mode 0600
    try:
        with open(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _open_own(path):
    """The opened file; ValueError when it is not a regular file that only this user can write."""
    file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        file.close()
        raise ValueError("it is not a file of yours")
    if status.st_mode & 0o022:
        file.close()
        raise ValueError("others may write to it")
    return file


def _read_own(path):
    with _open_own(path) as file:
        return _read(file)


def _read_header(file):
    file.seek(0)
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("it is no engine file of this version of adm_rt")
    try:
        header = json.loads(file.readline(_MAX_HEADER))
        if not isinstance(header["facts"], dict) or not isinstance(header["size"], int):
            raise TypeError
        header["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("it is damaged: its header cannot be read") from None
    return header


def _read(file):
    """(facts, plan); ValueError when the file is damaged."""
    header = _read_header(file)
    plan = file.read(header["size"] + 1)
    if len(plan) != header["size"]:
        raise ValueError(f"it is damaged: {len(plan)} bytes of {header['size']} are there")
    if hashlib.sha256(plan).hexdigest() != header["sha256"]:
        raise ValueError("it is damaged: its checksum is wrong")
    return header["facts"], plan


def _read_foreign(file, read):
    """``read`` of a file from elsewhere; ValueError that names it."""
    try:
        with open(file, "rb") as opened:
            return read(opened)
    except (OSError, ValueError) as error:
        why = (error.strerror or error) if isinstance(error, OSError) else error
        raise ValueError(
            f"engine file {file}: {why}; give a file of adm-rt build-engine --out"
        ) from error


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
