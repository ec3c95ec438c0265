"""LSUN databases (LMDB): the folder that LSUN's own download unpacks to."""

from __future__ import annotations

import io
import os

import numpy as np

from adm_rt.data.crop import lsun_crop
from adm_rt.data.dataset import Dataset, choose_classes
from adm_rt.data.image_file import read_image
from adm_rt.errors import DataError, MissingExtraError

# LMDB refuses to open a folder twice in one process, and a forked child may go on using the map.
_ENVIRONMENTS: dict[str, object] = {}


class LsunDatabase(Dataset):
    """Encoded images in the order of their keys, without labels.

    Centre crops are made as the published preparation makes them: one box resampling to
    `image_size` and the middle square; random crops are those of the other data sets.
    MissingExtraError without the lmdb package; DataError when the folder is no intact database.
    """

    def __init__(self, folder, image_size, *, class_cond=None, num_classes=None, **options):
        self.folder = os.fspath(folder)
        self._environment = _open(self.folder)
        hint = "LSUN has one database per class; unpack them into sub-folders of images instead"
        choose_classes(self.folder, None, num_classes, class_cond, hint)
        with self._environment.begin(buffers=True) as transaction:
            keys = [bytes(key) for key in transaction.cursor().iternext(keys=True, values=False)]
        if not keys:
            raise DataError(f"{self.folder}: the database is empty")
        super().__init__(self.folder, image_size, len(keys), **options)
        # One string and the ends of its parts: LSUN has up to millions of keys.
        self._keys = b"".join(keys)
        self._ends = np.cumsum([0, *map(len, keys)])

    def _key(self, index) -> bytes:
        return self._keys[self._ends[index] : self._ends[index + 1]]

    def _contents(self):
        yield self._keys
        yield self._ends.tobytes()

    def _where(self, index):
        return f"{self.folder}, key {self._key(index).decode('utf-8', 'backslashreplace')}"

    def _read(self, index):
        import lmdb

        try:
            with self._environment.begin() as transaction:
                value = transaction.get(self._key(index))
        except lmdb.Error as error:
            raise DataError(f"the database is damaged ({error})") from None
        return read_image(io.BytesIO(value)), None

    def _center_crop(self, image):
        return lsun_crop(image, self.image_size)


def is_database(path) -> bool:
    """Whether the folder holds an LMDB database."""
    return os.path.isfile(os.path.join(path, "data.mdb"))


def _open(folder):
    try:
        import lmdb
    except ImportError:
        raise MissingExtraError(
            f"{folder} is an LMDB database, and the lmdb package is not installed: "
            'pip install "adm_rt[lmdb]"'
        ) from None
    real = os.path.realpath(folder)
    if real not in _ENVIRONMENTS:
        try:
            environment = lmdb.open(real, readonly=True, lock=False, readahead=False, create=False)
        except lmdb.Error as error:
            raise DataError(f"{folder} is not a readable LMDB database: {error}") from None
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = os.path.getsize(os.path.join(real, "data.mdb"))
        if size < needed:  # reading past the end of the map would kill the process
            environment.close()
            raise DataError(
                f"{folder}: data.mdb is cut off, {size:,} of {needed:,} bytes; fetch it again"
            )
        _ENVIRONMENTS[real] = environment
    return _ENVIRONMENTS[real]
