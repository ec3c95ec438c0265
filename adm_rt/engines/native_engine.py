"""The native engine: networks as compiled plans on the CPU, without torch; NumPy arrays.

Everything is float32. An image's result is the same bits in every batch, on any number of threads
and in every run on one instruction set.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np

from adm_rt.engines.base import DTYPES, check_fit, check_images, check_labels, check_low_res
from adm_rt.engines.lowering import lower_embedding, lower_unet
from adm_rt.engines.lowering_classifier import lower_classifier_gradient
from adm_rt.engines.memory import require_memory
from adm_rt.engines.packed_cache import PackedPlans, is_on, packed_plans
from adm_rt.models.model_weights import ModelWeights
from adm_rt.ops._library import extension

FAST_VARIABLE = "ADM_RT_FAST"
_FAST_NOTE = (
    "fast: 3x3 convolutions of 64x64 pixels and more are F(6x6), with about four times the usual "
    "rounding error"
)
_MODULATION_BYTES = 32 << 20  # rows of the embedding plan that are kept per network


class NativeEngine:
    """Runs a UNet (or SuperResUNet) and the gradient of a NoisyClassifier; see ``Engine``.

    unet, classifier: ``ModelWeights`` or torch modules of this package (whose weights are copied:
    make a new engine after changing them). Engines of the same weights share their memory. Any
    number of threads may use one engine. Ctrl-C ends a call; the engine stays usable.

    fast: larger Winograd tiles (F(6x6), Lavin & Gray 2016) on images of 64x64 and more: fewer
    products, about four times the rounding error. None: whether ADM_RT_FAST is set to 1.
    """

    name = "native"
    device = "cpu"
    dtype = "float32"

    def __init__(self, unet, classifier=None, device="cpu", dtype="float32", fast=None):
        if device not in ("auto", "cpu"):
            raise ValueError(
                f"device={device!r}: the native engine runs on 'cpu'; use engine='torch' for others"
            )
        if dtype not in ("auto", *DTYPES):
            raise ValueError(
                f"dtype={dtype!r} is unknown; allowed: {', '.join(map(repr, ('auto', *DTYPES)))}"
            )
        if classifier is not None:
            check_fit(unet.cfg, classifier.cfg)
        self.notes = []
        if dtype not in ("auto", "float32"):
            self.notes.append(f"dtype={dtype} was asked for; float32 is used on the CPU")
        fast = _fast(fast)
        if fast:
            self.notes.append(_FAST_NOTE)
        self._unet = _Network(ModelWeights.of(unet), fast)
        self._classifier = None
        if classifier is not None:
            self._classifier = _Network(ModelWeights.of(classifier), fast)
        for network in (self._unet, self._classifier):
            if network is not None and network.plans.note:
                self.notes.append(network.plans.note)

    def from_numpy(self, values):
        return values

    def to_numpy(self, values):
        return values

    def prepare(self, timesteps):
        """Say which timesteps this thread will ask for, in order: their embeddings are made
        together. Changes no result."""
        for network in (self._unet, self._classifier):
            if network is not None:
                network.modulations.expect(timesteps)

    def image_bytes(self, guided=False):
        """Bytes of memory that one image of a batch takes, as planned."""
        networks = [self._unet, self._classifier if guided else None]
        return max(n.arena_bytes(1) for n in networks if n is not None)

    def packed_bytes(self):
        """Bytes of the packed weights."""
        networks = [n for n in (self._unet, self._classifier) if n is not None]
        return sum(blob.nbytes for n in networks for blob in n.plans.blobs.values())

    def denoise(self, x, t, y=None, low_res=None):
        cfg = self._unet.cfg
        x = check_images(x, "x", cfg.in_channels, cfg.image_size)
        check_low_res(low_res, cfg)
        inputs = {"x": x}
        if low_res is not None:
            inputs["low_res"] = check_images(
                low_res, "low_res", cfg.in_channels, cfg.small_size, len(x)
            )
        labels = check_labels(y, len(x), cfg.embedding_rows) if cfg.class_cond else None
        out = np.empty((len(x), cfg.out_channels, cfg.image_size, cfg.image_size), np.float32)
        self._unet.run(inputs, t, labels, {"out": out})
        return out

    def classifier_gradient(self, x, t, y):
        if self._classifier is None:
            raise ValueError("classifier_gradient needs a classifier; this engine was made without")
        cfg = self._classifier.cfg
        x = check_images(x, "x", cfg.in_channels, cfg.image_size)
        labels = check_labels(y, len(x), cfg.num_classes)
        gradient = np.empty_like(x)
        inputs = {"x": x, "y": labels.astype(np.float32)}
        self._classifier.run(inputs, t, None, {"gradient": gradient})
        return gradient

    def profile(self, x, t, y=None, low_res=None, network="unet"):
        """One run -> rows {"op", "shapes", "flops" of an image, "packed_bytes", "seconds"}.

        network: "unet" (as ``denoise``) or "classifier" (as ``classifier_gradient``).
        """
        ours = self._unet if network == "unet" else self._classifier
        ours.seconds = []
        try:
            self.denoise(x, t, y, low_res) if network == "unet" else self.classifier_gradient(
                x, t, y
            )
            rows = ours.plans.plans["body"].ops()
            return [{**row, "seconds": s} for row, s in zip(rows, ours.seconds, strict=True)]
        finally:
            ours.seconds = None


def planned_bytes(cfg, fast=None):
    """Bytes of memory that a model takes, from its shapes alone.

    -> {"packed_weights", "per_image" of a batch, "per_thread" at most}.
    """
    plans = [lowered.plan for lowered in _lower(cfg, _fast(fast)).values()]
    return {
        "packed_weights": sum(plan.packed_bytes for plan in plans),
        "per_image": max(plan.arena_bytes(1) for plan in plans),
        "per_thread": max(plan.thread_bytes for plan in plans),
    }


def _lower(cfg, fast):
    lower_body = lower_classifier_gradient if cfg.kind == "classifier" else lower_unet
    return {"embedding": lower_embedding(cfg), "body": lower_body(cfg, fast)}


def _fast(wanted):
    return is_on(os.environ.get(FAST_VARIABLE, "")) if wanted is None else bool(wanted)


class _Network:
    """The two plans of one network: (t, y) -> modulation, and the body."""

    def __init__(self, model: ModelWeights, fast: bool):
        self.cfg = model.cfg
        self.plans = packed_plans(model, lambda: _lower(model.cfg, fast))
        self.modulations = _Modulations(self.plans)
        self.seconds = None  # filled with the time of each op when it is a list

    def arena_bytes(self, batch):
        return max(plan.arena_bytes(batch) for plan in self.plans.plans.values())

    def _scratch_bytes(self):
        """What the threads' scratch memory may still grow by."""
        most = extension().num_threads() * max(p.thread_bytes for p in self.plans.plans.values())
        return max(0, most - extension().engine_scratch_bytes())

    def run(self, inputs, t, labels, outputs):
        batch = len(inputs["x"])
        require_memory(
            self.arena_bytes(batch) + self._scratch_bytes() - extension().engine_arena_bytes(),
            f"a batch of {batch} images",
            "; use a smaller batch_size",
        )
        inputs = {**inputs, "modulation": self.modulations.rows(t, labels, batch)}
        seconds = self.plans.run("body", batch, inputs, outputs, self.seconds is not None)
        if self.seconds is not None:
            self.seconds = seconds


class _Modulations:
    """Rows of the embedding plan by (t, y); those of expected timesteps are made together."""

    def __init__(self, plans: PackedPlans):
        self._plans = plans
        plan = plans.plans["embedding"]
        self._width = plan.shape(plan.outputs["modulation"])[2]
        self._capacity = max(1, _MODULATION_BYTES // (4 * self._width))
        self._rows: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._expected = threading.local()

    def expect(self, timesteps):
        self._expected.timesteps = tuple(float(t) for t in timesteps)

    def rows(self, t, labels, batch):
        """[batch, M] for one timestep and int64 labels [batch] (None without classes)."""
        t = float(t)
        own = np.zeros(1, np.int64) if labels is None else labels
        found = self._find([(t, int(label)) for label in own])
        if found is None:
            # Not under the lock: a child forked meanwhile would inherit it locked, and other
            # threads need not wait.
            self._make(t, sorted({int(label) for label in own}), labels is not None)
            found = self._find([(t, int(label)) for label in own])
        if found is None:  # more labels than are kept, or another thread's rows came between
            return self._compute([(t, int(label)) for label in own], labels is not None)
        rows = np.stack(found)
        return rows if labels is not None else np.repeat(rows, batch, axis=0)

    def _find(self, keys):
        with self._lock:
            if not all(key in self._rows for key in keys):
                return None
            for key in keys:
                self._rows.move_to_end(key)
            return [self._rows[key] for key in keys]

    def _make(self, t, labels, has_labels):
        coming = getattr(self._expected, "timesteps", ())
        coming = coming[coming.index(t) :] if t in coming else (t,)
        count = max(1, self._capacity // 2 // len(labels))
        pairs = [(time, label) for time in coming[:count] for label in labels]
        if len(pairs) > self._capacity:
            return
        rows = self._compute(pairs, has_labels)
        with self._lock:
            for pair, row in zip(pairs, rows, strict=True):
                self._rows[pair] = row.copy()  # of its own: a slice would keep all of them alive
                self._rows.move_to_end(pair)
            while len(self._rows) > self._capacity:
                self._rows.popitem(last=False)

    def _compute(self, pairs, has_labels):
        values = np.array(pairs, np.float64)
        inputs = {"t": np.ascontiguousarray(values[:, 0], np.float32)}
        if has_labels:
            inputs["y"] = np.ascontiguousarray(values[:, 1], np.float32)
        rows = np.empty((len(pairs), self._width), np.float32)
        self._plans.run("embedding", len(pairs), inputs, {"modulation": rows})
        return rows
