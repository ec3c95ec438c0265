"""From graphs to TensorRT engines: out of the cache, by refitting another engine, or built."""

from __future__ import annotations

import contextlib
import sys

from adm_rt.engines import tensorrt_plugins
from adm_rt.engines.tensorrt_adapter import Profile
from adm_rt.engines.tensorrt_cache import read_facts
from adm_rt.errors import EngineError

DEFAULT_PROFILE = Profile(1, 8, 32)  # 32: the largest batch that is chosen automatically


class EngineBuilder:
    """Engines for the networks of ``Sources``, from the cache, by refitting, or built.

    gpu: what the engine is for, e.g. "NVIDIA H200 sm_90". compute_capability: "8.9" to build for
    another GPU (TensorRT-RTX only). ``notes``: one-line remarks. See ``TensorRTEngine``.
    """

    def __init__(
        self, library, cache, sources, gpu, *, refit=False, ops="auto", compute_capability=None
    ):
        self.library, self.cache, self.sources = library, cache, sources
        self.gpu, self.refit, self.compute_capability = gpu, bool(refit), compute_capability
        self.ops, why = tensorrt_plugins.choose_ops(library, ops)
        self.notes = [why] if why else []

    def replace_sources(self, sources):
        self.sources.close()
        self.sources = sources

    def facts(self, name, profile):
        """Everything that decides an engine; the key of its file."""
        return {
            **self.sources.facts(name),
            "library": str(self.library),
            "gpu": self._targets()[0],
            "batch": str(profile),
            "refit": self.refit,
            "ops": self.ops,
        }

    def _targets(self):
        """What engines for this GPU are made for, the own kind first."""
        if not self.library.is_rtx:
            return [self.gpu]
        if self.compute_capability is not None:
            return [f"sm_{str(self.compute_capability).replace('.', '')}"]
        # Its engines run on every GPU of the range they were built for.
        return ["any", self.gpu.rpartition(" ")[2]]

    def engine(self, name, batch, wanted=None):
        """The LoadedEngine for a batch; ``wanted`` is the profile to use, None: see choose."""
        if wanted is not None and not wanted.covers(batch):
            raise ValueError(
                f"batch={wanted}: the engine runs batches of {wanted.least} to {wanted.most} "
                f"images, not {batch}; give another batch_size or profile"
            )
        return self.load(self.choose(name, batch, wanted))

    def choose(self, name, batch, wanted=None):
        """Facts of the engine to use: of the narrowest in the cache, else of the one to build."""
        if wanted is None:
            wanted = DEFAULT_PROFILE if DEFAULT_PROFILE.covers(batch) else Profile(*[batch] * 3)
            free = ("batch", "refit", "gpu")
        else:
            free = ("refit", "gpu")
        facts, found = self.facts(name, wanted), []
        for other in self.cache.similar(facts, free):
            profile = Profile.parse(other["batch"])
            usable = other["gpu"] in self._targets() and (other["refit"] or not self.refit)
            if usable and profile.covers(batch):
                # The narrowest, then what cannot be refitted, which may be faster.
                rank = (profile.most - profile.least, other["refit"], abs(profile.tuned - batch))
                found.append((rank, len(found), other))
        return min(found)[2] if found else facts

    def load(self, facts):
        """The LoadedEngine of some facts; one that this library refuses is built again."""
        with tensorrt_plugins.registered(self.library, self.ops):
            plan = self.plan(facts)
            try:
                return self.library.load(plan)
            except EngineError as error:
                self.cache.notes.append(
                    f"{facts['network']}: the cached engine is built again: {error}"
                )
                self.cache.forget(facts)
            return self.library.load(self.plan(facts))

    def adopt(self, file, trust=False):
        """Take an engine file of ``adm-rt build-engine`` on another machine into the cache.

        Returns (network, Profile). Raises as ``EngineCache.adopt``.
        """
        given = read_facts(file)
        name, profile = given.get("network"), Profile.parse(given.get("batch"))
        if name not in self.sources.names:
            raise ValueError(
                f"{file} is an engine of {name!r}; there is {', '.join(self.sources.names)}"
            )
        own = {"refit": given.get("refit"), "ops": given.get("ops")}  # both run here, whichever
        self.cache.adopt(file, {**self.facts(name, profile), **own}, trust)
        return name, profile

    def plan(self, facts):
        """The serialised engine, from the cache, by refitting another, or built."""
        with tensorrt_plugins.registered(self.library, self.ops):
            return self.cache.get_or_build(
                facts, lambda: self._refitted(facts) or self.build(facts).plan, _wait
            )

    def build(self, facts, listing=False):
        """``Built`` without looking at the cache of engines (that of timings is used)."""
        name, profile = facts["network"], Profile.parse(facts["batch"])
        file = self.sources.file(name)
        timing, times = f"{self.library} {self.gpu}", None
        # TensorRT-RTX measures nothing while it builds, and asks for a GPU to read a timing cache.
        if not self.library.is_rtx:
            times = self.cache.timing_cache(timing)
        say(f"building the TensorRT engine of {name} for batches of {profile}; this takes a while")
        with tensorrt_plugins.registered(self.library, self.ops):
            built = self.library.build(
                file,
                profile,
                refit=facts["refit"],
                timing_cache=times,
                compute_capability=self.compute_capability,
                listing=listing,
            )
        if built.timing_cache is not None:
            with contextlib.suppress(OSError):  # it only saves time
                self.cache.put_timing_cache(timing, built.timing_cache)
        return built

    def _refitted(self, facts):
        """The plan of a cached engine of other weights with these ones, or None."""
        name = facts["network"]
        for found in self.cache.similar(facts, ("weights",)):
            plan = self.cache.get(found) if found["refit"] else None
            if plan is None:
                continue
            try:
                engine = self.library.load(plan)
                why = engine.refit(self.sources.file(name))
                if not why:
                    return engine.serialize()
            except EngineError as error:
                why = str(error)
            self.cache.notes.append(f"{name}: a cached engine could not be refitted ({why}): built")
            return None
        return None


def say(text):
    print(f"adm-rt: {text}", file=sys.stderr, flush=True)


def _wait():
    say("another process is building this TensorRT engine; waiting for it")
