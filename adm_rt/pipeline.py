"""Pipeline: networks + diffusion + sampler + engine -> SampleResult; ``sample`` in one call."""

from __future__ import annotations

from pathlib import Path

import adm_rt
from adm_rt import engines, request
from adm_rt.export.manifest import ExportedNetwork
from adm_rt.loading import load_parts
from adm_rt.locate import SETTINGS
from adm_rt.result import check_output
from adm_rt.trajectory import Stage, choose_batch_size, run_stage
from adm_rt.upscaling import Upscaler, check_stack

DEFAULT_STEPS = 25
DEFAULT_SAMPLER = "dpmpp_2m"
_FEW_STEPS = 50  # up to here the published scale of 25-step sampling is the default


def sample(
    model="glyphs32",
    num_images=None,
    classes=None,
    steps=DEFAULT_STEPS,
    sampler="auto",
    guidance_scale=None,
    classifier=None,
    engine="auto",
    device="auto",
    dtype="auto",
    batch_size="auto",
    seed=0,
    progress=True,
    callback=None,
    *,
    upsampler=None,
    preset=None,
    output=None,
    model_flags=None,
    **options,
):
    """Make images in one call: ``Pipeline.from_pretrained(model, ...)(num_images, ...)``.

    Without ``num_images`` it makes one per class or seed in a given list, else 16. ``output``
    saves the result there too (the path is checked first). ``model_flags`` are model flags that
    cannot be read from a ``.pt``. The rest is described in ``Pipeline``.
    """
    if output is not None:
        check_output(output, request.count_images(num_images, classes, options.get("seeds")))
    check_early(steps, sampler, guidance_scale, batch_size, seed, callback, num_images, options)
    pipeline = Pipeline.from_pretrained(
        model,
        classifier,
        upsampler,
        engine=engine,
        device=device,
        dtype=dtype,
        preset=preset,
        **(model_flags or {}),
    )
    result = pipeline(
        num_images,
        classes,
        steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        callback=callback,
        **options,
    )
    if output is not None:
        result.save(output)
    return result


class Pipeline:
    """A denoiser, the classifier that guides it, and an upsampler that may follow.

    Each is a torch module of ``adm_rt.models``, a ``ModelWeights``, or an ``ExportedNetwork``
    (the classifier: of its gradient); any of ``unet`` and ``upsampler`` may be None, not both.
    ``settings``: the model's defaults: ``guidance_scale``, ``sampler``, ``class_names``.
    ``engine``, ``device``, ``dtype``: see ``engines.create``. Attributes: ``name``,
    ``notes`` (one-line remarks), ``num_classes``.
    """

    def __init__(
        self,
        unet=None,
        classifier=None,
        upsampler=None,
        *,
        name="model",
        settings=None,
        engine="auto",
        device="auto",
        dtype="auto",
        sources=None,
    ):
        if unet is None and upsampler is None:
            raise ValueError("Pipeline needs a model: give unet, upsampler or both")
        if unet is not None and unet.cfg.kind != "diffusion":
            raise ValueError(f"unet is of kind {unet.cfg.kind!r}; a diffusion model is needed")
        if upsampler is not None and upsampler.cfg.kind != "upsampler":
            raise ValueError(f"upsampler is of kind {upsampler.cfg.kind!r}, not an upsampler")
        if unet is None and classifier is not None:
            raise ValueError("classifier: an upsampler alone is not guided; leave it out")
        if unet is not None and upsampler is not None:
            check_stack(unet.cfg, upsampler.cfg)
        self.name = name
        self.settings = dict(settings or {})
        self.unet, self.classifier, self.upsampler = unet, classifier, upsampler
        self._sources = dict(sources or {})
        self.notes = []
        self._engine = self._upscaler = None
        if unet is not None:
            self._engine = engines.create(engine, unet, classifier, device=device, dtype=dtype)
            self.notes += self._engine.notes
        if upsampler is not None:
            own = engines.create(engine, upsampler, device=device, dtype=dtype)
            self._upscaler = Upscaler(upsampler, own, self._sources.get("upsampler", name))
            self.notes += [n for n in own.notes if n not in self.notes]
        if any(m is not None and m.cfg.use_fp16 for m in (unet, classifier, upsampler)) and (
            self.engine.dtype == "float32"
        ):
            self.notes.append("the model asks for use_fp16; float32 is used")

    @property
    def engine(self):
        """The engine that runs the base model (the upsampler's when there is no base)."""
        return self._engine or self._upscaler.engine

    @property
    def class_names(self):
        """Names of the classes in order, or None."""
        return self.settings.get("class_names")

    @property
    def num_classes(self):
        """Number of classes of the base model, or of its classifier; None without both."""
        if self.unet is not None and self.unet.cfg.class_cond:
            return self.unet.cfg.num_classes
        if self.classifier is not None:
            return self.classifier.cfg.num_classes
        return None

    @classmethod
    def from_pretrained(
        cls,
        model,
        classifier=None,
        upsampler=None,
        *,
        engine="auto",
        device="auto",
        dtype="auto",
        preset=None,
        **flags,
    ):
        """Load a pipeline.

        model, classifier, upsampler: a name from the zoo, a folder made by ``save_pretrained`` or
        ``adm-rt convert``, or a released ``.pt``. ``classifier=None`` takes the model's own default
        where it has one, ``"none"`` does without. model and upsampler may also be folders made by
        ``adm-rt export``, which the engine "onnx" runs (as does "auto") and which bring the
        classifier that was exported with them. preset: the released model whose flags hold,
        when the file name does not tell. flags: guided-diffusion's model flags; those that start
        with ``classifier_`` go to the classifier, and ``image_size`` to both.

        Raises ValueError for anything unknown or not fitting together, CheckpointError for a
        damaged file; both before any weight is used.
        """
        parts = load_parts(model, classifier, upsampler, engine, device, dtype, preset, flags)
        return cls(**parts, engine=engine, device=device, dtype=dtype)

    def save_pretrained(self, folder, dtype="float32"):
        """Write the pipeline to a new folder that ``from_pretrained`` reads back.

        The base model lies in ``folder``, others in ``folder/classifier`` and
        ``folder/upsampler``. dtype: "float32" or "float16" on disk. Raises ValueError when the
        folder cannot be written or is not empty.
        """
        from adm_rt.models import save_model
        from adm_rt.models.weight_folder import replace_folder

        if any(isinstance(n, ExportedNetwork) for n in (self.unet, self.upsampler)):
            raise ValueError(
                f"{self.name} is an exported folder: a graph cannot be made into weights again; "
                "save the model that was exported"
            )
        parts = {"classifier": self.classifier, "upsampler": self.upsampler}
        if self.unet is None:
            base, parts = self.upsampler, {}
        else:
            base = self.unet
        parts = {name: network for name, network in parts.items() if network is not None}
        settings = {k: v for k, v in self.settings.items() if k in SETTINGS} | {p: p for p in parts}
        names = settings.pop("class_names", None)
        with replace_folder(Path(folder), overwrite=False) as place:
            save_model(place, base, dtype=dtype, class_names=names, metadata=settings)
            for name, network in parts.items():
                save_model(place / name, network, dtype=dtype)
        return Path(folder)

    def __call__(
        self,
        num_images=None,
        classes=None,
        *,
        steps=DEFAULT_STEPS,
        sampler="auto",
        guidance_scale=None,
        eta=0.0,
        thresholding="static",
        quantile=0.995,
        guidance_interval="auto",
        guidance_every=1,
        cfg_scale=None,
        seed=0,
        seeds=None,
        batch_size="auto",
        upsampler_steps=None,
        upsampler_sampler=None,
        progress=True,
        callback=None,
    ):
        """Make images; every argument is checked before any work.

        - num_images: how many; default one per entry of ``seeds`` or ``classes``, else 16.
        - classes: None (uniform, a function of each image's seed), an index, a name, or a list of
          these, repeated when shorter than ``num_images``.
        - steps: a number of steps, or a respacing string: "25", "ddim25", "90,60,60,20,20", ""
          (all).
        - sampler: "dpmpp_2m", "ddpm", "ddim", "unipc"; "auto" is the one that the model's own
          config.json names, else "dpmpp_2m".
        - guidance_scale: strength of classifier guidance; None takes the model's default, 0 never
          runs the classifier. guidance_interval: (low, high) timesteps of the original process
          outside which there is no guidance; "auto" is the one in the model's config.json, if any,
          None guides at all steps. guidance_every: evaluate the gradient every k steps.
        - cfg_scale: classifier-free guidance, for models trained with a null class; 1 is off.
        - eta: DDIM's noise, 0..1. thresholding of x0: "static" (clamp to [-1, 1]), "dynamic" (by
          ``quantile``), "none".
        - seed: image i has the Philox seed ``(seed << 32) | i``; seeds: one per image instead.
          An image does not depend on ``batch_size`` beyond 1 of 255 levels.
        - upsampler_steps, upsampler_sampler: like steps and sampler, which are their defaults.
          Guidance, eta and thresholding are the base model's only.
        - callback(step, total, t, x0): after each step of each batch; x0 float32 [n, 3, H, W] is
          the running prediction. Returning False stops, and what is there is returned.

        Returns SampleResult. Raises ValueError or TypeError for an argument, NonFiniteError when
        an image stops being finite, SamplingInterrupted (a KeyboardInterrupt) on Ctrl-C.
        """
        if self.unet is None:
            raise ValueError(
                f"{self.name} is an upsampler: call upscale(images), or use adm-rt upscale"
            )
        cfg = self.unet.cfg
        sampler = self._sampler(sampler)
        count = request.count_images(num_images, classes, seeds)
        given_seeds, seeds = seeds, request.resolve_seeds(seed, seeds, count)
        diffusion = request.respaced_diffusion(cfg, steps)
        run = request.sampler_function(sampler)
        request.warn_of_unused_sections(run, diffusion)
        guidance_scale = self._guidance_scale(guidance_scale, diffusion.num_timesteps)
        interval = self._guidance_interval(guidance_interval)
        if sampler == "ddim" and guidance_scale and interval is None:
            request.warn_of_first_guided_step(diffusion, steps)
        num_classes = self.num_classes if cfg.class_cond or guidance_scale else None
        labels = request.resolve_classes(
            classes, count, seeds, num_classes, self.class_names, self.name
        )
        stage = Stage(
            title="sampling",
            engine=self._engine,
            sampler=run,
            diffusion=diffusion,
            image_shape=(cfg.in_channels, cfg.image_size, cfg.image_size),
            guidance_scale=guidance_scale,
            options={
                "eta": _check_eta(eta, sampler),
                "clip": request.check_choice("thresholding", thresholding, request.THRESHOLDING),
                "quantile": request.check_number("quantile", quantile, 0.0, 1.0),
                "guidance_interval": interval,
                "guidance_every": request.check_count("guidance_every", guidance_every),
                **self._classifier_free(cfg_scale),
            },
        )
        batch = choose_batch_size(batch_size, count, self._engine, bool(guidance_scale))
        request.check_callable("callback", callback)
        metadata = {
            "adm_rt": adm_rt.__version__,
            "model": self.name,
            "classifier": self._sources.get("classifier", "unnamed") if guidance_scale else None,
            "engine": self._engine.name,
            "device": self._engine.device,
            "dtype": self._engine.dtype,
            "sampler": sampler,
            "steps": steps if isinstance(steps, str) else int(steps),
            "guidance_scale": stage.guidance_scale,
            **{k: v for k, v in stage.options.items() if k not in ("clip", "null_label")},
            "thresholding": thresholding,
            "seed": int(seed) if given_seeds is None else None,
            "batch_size": batch,
            "diffusion": cfg.diffusion_config() | {"timestep_respacing": str(steps)},
        }
        up = None
        if self.upsampler is not None:
            up = self._upscaler.stage(
                steps if upsampler_steps is None else upsampler_steps,
                sampler if upsampler_sampler is None else upsampler_sampler,
                batch_size,
                count,
                ("upsampler_steps", "upsampler_sampler"),
            )
            self._upscaler.check_labels(labels)
        elif upsampler_steps is not None or upsampler_sampler is not None:
            raise ValueError("upsampler_steps / upsampler_sampler: this pipeline has no upsampler")

        output = run_stage(stage, seeds, labels, batch, progress, callback)
        metadata["timesteps"] = output.timesteps
        if up is None or output.stopped:
            return output.result(labels, seeds, metadata)
        return self._upscaler.run(*up, output.images, labels, seeds, metadata, progress, callback)

    def upscale(
        self,
        images,
        labels=None,
        *,
        steps=DEFAULT_STEPS,
        sampler=DEFAULT_SAMPLER,
        seed=0,
        seeds=None,
        batch_size="auto",
        progress=True,
        callback=None,
    ):
        """Enlarge uint8 images [N, h, w, 3] with the upsampler; labels as ``classes`` above.

        Arguments as in ``__call__``; the result equals what the whole stack makes from the same
        seeds and labels. A class-conditional upsampler needs labels.
        """
        if self.upsampler is None:
            raise ValueError(
                f"{self.name} has no upsampler; load one with upsampler=..., or as the model itself"
            )
        return self._upscaler.upscale(
            images,
            labels,
            self.class_names,
            self.name,
            steps,
            sampler,
            seed,
            seeds,
            batch_size,
            progress,
            callback,
        )

    def _sampler(self, name):
        return self.settings.get("sampler", DEFAULT_SAMPLER) if name == "auto" else name

    def _guidance_scale(self, scale, steps):
        if scale is None:
            if self.classifier is None:
                return 0.0
            few = self.settings.get("few_step_guidance_scale")
            many = self.settings.get("guidance_scale", 1.0)
            return float(few if few is not None and steps <= _FEW_STEPS else many)
        scale = request.check_number(
            "guidance_scale", scale, 0.0, way_out=" (0 switches guidance off)"
        )
        if scale and self.classifier is None:
            raise ValueError(
                f"guidance_scale={scale:g} needs a classifier, and {self.name} was loaded without "
                "one; give classifier=..., or guidance_scale=0"
            )
        return scale

    def _guidance_interval(self, interval):
        if isinstance(interval, str) and interval == "auto":
            interval = self.settings.get("guidance_interval")
        return request.check_interval(interval, self.unet.cfg.diffusion_steps)

    def _classifier_free(self, scale):
        if scale is None:
            return {"cfg_scale": None, "null_label": None}
        scale = request.check_number("cfg_scale", scale, 0.0, way_out=" (1 is no extra guidance)")
        if not self.unet.cfg.null_class:
            raise ValueError(
                f"cfg_scale={scale:g}: {self.name} was trained without a null class, so it has no "
                "classifier-free guidance; use guidance_scale with a classifier"
            )
        return {"cfg_scale": scale, "null_label": self.unet.cfg.num_classes}

    def __repr__(self):
        parts = [f"{k}={v!r}" for k, v in self._sources.items() if k != "model"]
        return f"Pipeline({', '.join([repr(self.name), *parts, repr(self.engine.device)])})"


load = Pipeline.from_pretrained


def check_early(steps, sampler, guidance_scale, batch_size, seed, callback, num_images, options):
    """The checks that need no model, so that a typing error does not wait for weights to load."""
    if sampler != "auto":
        request.sampler_function(sampler)
    if guidance_scale is not None:
        request.check_number("guidance_scale", guidance_scale, 0.0)
    if not isinstance(steps, str):
        request.check_count("steps", steps)
    if batch_size != "auto":
        request.check_count("batch_size", batch_size)
    if num_images is not None:
        request.check_count("num_images", num_images, 1, request.MAX_IMAGES)
    request.check_count("seed", seed, 0, 2**31 - 1)
    request.check_callable("callback", callback)
    known = Pipeline.__call__.__kwdefaults__
    for name in options:
        request.check_choice("argument", name, tuple(known))


def _check_eta(eta, sampler):
    from adm_rt.samplers import SAMPLERS

    eta = request.check_number("eta", eta, 0.0, 1.0)
    if eta and not SAMPLERS[sampler].uses_eta:
        takers = ", ".join(repr(n) for n, s in SAMPLERS.items() if s.uses_eta)
        raise ValueError(
            f"eta={eta:g}: {sampler!r} has no eta, leave it 0; samplers with it: {takers}"
        )
    return eta
