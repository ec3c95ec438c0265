"""The upsampling half of a pipeline: small uint8 images to large ones."""

from __future__ import annotations

import adm_rt
from adm_rt import request
from adm_rt.trajectory import Stage, choose_batch_size, run_stage


class Upscaler:
    """An upsampler and the engine that runs it; ``name`` is what metadata calls it."""

    def __init__(self, network, engine, name):
        self.cfg, self.engine, self.name = network.cfg, engine, name

    def upscale(
        self,
        images,
        labels,
        class_names,
        model,
        steps,
        sampler,
        seed,
        seeds,
        batch_size,
        progress,
        callback,
    ):
        """``Pipeline.upscale``; class_names and model (its name) belong to the pipeline."""
        cfg = self.cfg
        images = request.check_images(images, cfg.small_size)
        count = request.count_images(len(images), labels, seeds, "labels")
        seeds = request.resolve_seeds(seed, seeds, count)
        if labels is not None:
            labels = request.resolve_classes(
                labels, count, seeds, cfg.num_classes, class_names, model, "labels"
            )
        self.check_labels(labels)
        stage = self.stage(steps, sampler, batch_size, count, ("steps", "sampler"))
        request.check_callable("callback", callback)
        metadata = {"adm_rt": adm_rt.__version__, "model": model}
        return self.run(*stage, images, labels, seeds, metadata, progress, callback)

    def stage(self, steps, sampler, batch_size, count, names):
        """(Stage, batch size, metadata); names: the arguments that errors speak of."""
        cfg = self.cfg
        run = request.sampler_function(sampler, names[1])
        diffusion = request.respaced_diffusion(cfg, steps, names[0])
        request.warn_of_unused_sections(run, diffusion, names[0])
        stage = Stage(
            title="upsampling",
            engine=self.engine,
            sampler=run,
            diffusion=diffusion,
            image_shape=(cfg.in_channels, cfg.image_size, cfg.image_size),
            options={},
        )
        batch = choose_batch_size(batch_size, count, self.engine)
        about = {
            "model": self.name,
            "sampler": sampler,
            "steps": steps if isinstance(steps, str) else int(steps),
            "batch_size": batch,
            "device": self.engine.device,
            "dtype": self.engine.dtype,
        }
        return stage, batch, about

    def run(self, stage, batch, about, images, labels, seeds, metadata, progress, callback):
        """Run a stage on images uint8 [N, h, w, 3]; returns SampleResult."""
        stage.low_images = images
        inner = labels if self.cfg.class_cond else None
        output = run_stage(stage, request.stage_seeds(seeds), inner, batch, progress, callback)
        metadata["upsampler"] = {**about, "timesteps": output.timesteps}
        return output.result(labels, seeds, metadata)

    def check_labels(self, labels):
        """ValueError unless there are labels that a class-conditional upsampler knows."""
        if not self.cfg.class_cond:
            return
        if labels is None:
            raise ValueError(
                f"labels are missing: the upsampler is class-conditional, give one in "
                f"0..{self.cfg.num_classes - 1} per image"
            )
        if labels.max() >= self.cfg.num_classes:
            raise ValueError(
                f"labels: {labels.max()} is out of range for the upsampler's "
                f"{self.cfg.num_classes} classes"
            )


def check_stack(base, upsampler):
    """ValueError unless the upsampler takes what the base model makes (both ModelConfig)."""
    if base.image_size != upsampler.small_size:
        raise ValueError(
            f"upsampler: it enlarges {upsampler.small_size}x{upsampler.small_size} images, but "
            f"the model makes {base.image_size}x{base.image_size}"
        )
