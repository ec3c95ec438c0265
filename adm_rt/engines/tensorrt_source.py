"""Where an engine's graphs come from: an exported folder, or networks that are exported on demand.

Nothing is exported while the engines that are wanted lie in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from pathlib import Path

import adm_rt
from adm_rt.export.manifest import (
    CLASSIFIER_GRADIENT,
    NETWORKS,
    OPS_VERSION,
    UNET,
    ExportedNetwork,
    read_manifest,
)
from adm_rt.models.model_weights import ModelWeights


class Sources:
    """The graphs of one engine: ``names``, ``facts(name)``, and ``file(name)`` when needed.

    unet, classifier: both ``ExportedNetwork``, or both modules or ``ModelWeights`` (classifier may
    be None). dtype: of the networks; an exported folder's own, where ValueError names another.
    What was exported is removed when every network is ``done``, or by ``close``.
    """

    def __init__(self, unet, classifier, dtype):
        self._given = {UNET: unet}
        if classifier is not None:
            self._given[CLASSIFIER_GRADIENT] = classifier
        kinds = {isinstance(given, ExportedNetwork) for given in self._given.values()}
        if len(kinds) > 1:
            raise ValueError(
                "unet and classifier: one is exported and the other is not; export them together "
                "(adm-rt export MODEL --classifier C --out FOLDER)"
            )
        self._exported = kinds == {True}
        if self._exported and dtype not in ("auto", unet.dtype):
            raise ValueError(
                f"dtype={dtype!r}: the exported folder {unet.folder} holds {unet.dtype} graphs; "
                f"use dtype='auto', or export the model again with --dtype"
            )
        self.dtype = unet.dtype if self._exported else "float16" if dtype == "auto" else dtype
        if not self._exported:
            self._given = {name: ModelWeights.of(given) for name, given in self._given.items()}
        self._stack = contextlib.ExitStack()
        self._made = None  # the manifest of what was exported here
        self._done = set()

    @property
    def names(self):
        return list(self._given)

    def cfg(self, name):
        return self._given[name].cfg

    def facts(self, name):
        """What decides the graph: JSON values, "weights" among them."""
        given = self._given[name]
        facts = {
            "network": name,
            "weights": _file_digest(given) if self._exported else given.digest,
            "dtype": self.dtype,
            "config": given.cfg.to_dict(),
            "ops_version": OPS_VERSION,
        }
        # A folder's graph is what it is; one made here depends on who makes it.
        return facts if self._exported else {**facts, "exporter": adm_rt.__version__}

    def file(self, name) -> Path:
        """The ONNX file, checked; exports all networks on the first call where there is none."""
        if self._exported:
            self._given[name].verify()
            return self._given[name].path
        if self._made is None:
            from adm_rt.export import export_model

            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="adm_rt-")))
            unet, classifier = (self._given.get(name) for name in NETWORKS)
            export_model(unet, folder / "exported", classifier, dtype=self.dtype)
            self._made = read_manifest(folder / "exported")
        return getattr(self._made, name).path

    def done(self, name):
        """The engine of a network is there; another one may still be asked for."""
        self._done.add(name)
        if self._done == set(self._given):
            self.close()

    def close(self):
        self._stack.close()
        self._made = None


def _file_digest(network):
    digests = [network.sha256, network.data_sha256 or ""]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
