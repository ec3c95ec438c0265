"""One training run from its arguments: data, network, task, trainer, final model folders."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from adm_rt import models
from adm_rt.data import BatchStream, open_dataset
from adm_rt.data.folder import ImageFolder
from adm_rt.diffusion import Diffusion
from adm_rt.engines.memory import require_memory
from adm_rt.models.config import (
    CLASSIFIER_ALIASES,
    KINDS,
    ModelConfig,
    nearest,
    normalize_flags,
)
from adm_rt.training import distributed
from adm_rt.training.config import TrainConfig
from adm_rt.training.evaluations import SampleGrid, Validation
from adm_rt.training.fine_tuning import read_initial, with_classes
from adm_rt.training.monitor import Monitor
from adm_rt.training.plan import memory_bytes, plan_lines
from adm_rt.training.tasks import ClassifierTask, DiffusionTask, UpsamplerTask
from adm_rt.training.trainer import Trainer

_SAMPLES = {"diffusion": 16, "upsampler": 8}  # of a grid; an upsampler's are one row


def train(
    what,
    data="glyphs",
    *,
    iterations,
    out,
    init=None,
    preset=None,
    callback=None,
    progress=True,
    val_data=None,
    val_images=1000,
    sample_count=None,
    sample_steps=25,
    sample_interval=None,
    class_cond=None,
    num_classes=None,
    class_dropout=0.0,
    noise_jitter=0.0,
    snr_weight=False,
    data_seed=1,
    random_crop=None,
    random_flip=None,
    on_bad="error",
    class_from=None,
    exif_rotation=None,
    workers=0,
    export_dtype="float16",
    **flags,
):
    """Train a model to ``iterations`` updates; a run that is in ``out`` is continued.

    - what: "diffusion", "classifier" or "upsampler". data: what ``adm_rt.data.open_dataset`` takes.
    - init: fine-tune these weights (zoo name, folder, ``.pt``); see ``fine_tuning.with_classes``.
      preset: take the model flags of a released model (with init: of the ``.pt``).
    - callback(step, values): after every update, with the batch's mean losses by name (those of an
      update that was skipped may not be finite); returning False ends the run, with a checkpoint
      and a final model.
    - val_data, val_images: of a classifier's validation; sample_count, sample_steps: of the grids
      of samples (None: 16, of an upsampler 8); both every ``sample_interval`` updates (None: every
      save_interval; 0: never).
    - class_cond: None uses labels if the data have them. num_classes: None counts them.
      class_dropout: the share of labels replaced by the null class, for classifier-free guidance.
      noise_jitter, snr_weight: see ``tasks.DiffusionTask``.
    - data_seed: of the order and of glyphs. random_crop, random_flip: None is as published (flips;
      crops for classifiers), and neither for glyphs and digits. on_bad, class_from, exif_rotation,
      workers: see adm_rt.data; the first three hold for val_data, too.
    - export_dtype: of the weights in the final folders.
    - flags: fields of ``TrainConfig`` (lr, batch_size, ...) and of ``ModelConfig``
      (num_channels, ...), which hold guided-diffusion's names.

    Returns the folder of the final model, ``<out>/final``, the average of the first ``ema_rate``;
    those of others are in ``<out>/final_ema_<rate>``. Raises ValueError or TypeError for an
    argument, MemoryError for a batch that does not fit, DataError, CheckpointError, NonFiniteError
    (20 updates in a row), ProcessLostError.
    """
    if what not in KINDS:
        raise ValueError(f"what={what!r} is not known; allowed: {', '.join(KINDS)}.")
    if val_data is not None and what != "classifier":
        raise ValueError(f"val_data is for classifiers; a {what} model shows samples instead.")
    denoising = {
        "class_dropout": class_dropout,
        "noise_jitter": noise_jitter,
        "snr_weight": snr_weight,
    }
    if what == "classifier" and (class_cond is not None or any(denoising.values())):
        raise ValueError(f"class_cond, {', '.join(denoising)} are not for classifiers.")
    config, model_flags = _split_flags(
        what, {"iterations": iterations, "out": os.fspath(out), **flags}
    )
    looks = what != "classifier" or val_data is not None
    interval = config.save_interval if sample_interval is None else sample_interval
    config = dataclasses.replace(config, sample_interval=interval if looks else 0)

    with distributed.process_group(config.device, config.timeout) as processes:
        built_in = isinstance(data, str) and data.partition(":")[0] in ("glyphs", "digits")
        null_class = model_flags.pop("null_class", False) or class_dropout > 0
        start = None if init is None else read_initial(init, what, preset, **model_flags)
        dataset = open_dataset(
            data,
            start.cfg.image_size if start else _image_size(what, model_flags, preset),
            random_crop=_or(random_crop, what == "classifier" and not built_in),
            random_flip=_or(random_flip, not built_in),
            on_bad=on_bad,
            class_from=class_from,
            exif_rotation=exif_rotation,
            seed=data_seed,
            class_cond=True if what == "classifier" else class_cond,
            num_classes=num_classes,
        )
        if class_dropout and dataset.num_classes is None:
            why = "class_cond=False" if class_cond is False else f"{dataset.name} has none"
            raise ValueError(f"class_dropout={class_dropout} needs labels: {why}. Set it to 0.")
        classes = {"class_cond": what != "classifier" and dataset.num_classes is not None}
        classes |= {"num_classes": dataset.num_classes, "null_class": null_class}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if start is not None:
                network, lines = with_classes(start, **classes)
                remarks = [f"init: {init}", *(f"init: {line}" for line in lines)]
            else:
                network = models.build(_new_config(what, preset, model_flags, classes))
                remarks = [] if preset is None else [f"preset: {preset}"]
        cfg = network.cfg
        share = -(-config.batch_size // processes.world_size)
        require_memory(
            4 * share * cfg.in_channels * cfg.image_size**2,
            f"batch_size={config.batch_size}: a process's images as float32",
            "; make it smaller",
        )
        stream = BatchStream(dataset, config.batch_size, data_seed, workers=workers)
        task = _task(cfg, stream, **denoising)
        task.batch(0, processes.rank, processes.world_size)  # bad data show before anything else
        evaluations = []
        if config.sample_interval and processes.is_main:
            if what == "classifier":
                reading = {"on_bad": on_bad}
                if isinstance(dataset, ImageFolder) and _is_folder(val_data):
                    reading |= {"class_from": class_from, "exif_rotation": exif_rotation}
                evaluations = [_validation(cfg, task, dataset, val_data, val_images, reading)]
            else:
                evaluations = [_grid(cfg, task, config, dataset, sample_count, sample_steps)]
        monitor = Monitor(
            config.out,
            config,
            task.diffusion.num_timesteps,
            progress=progress,
            evaluations=evaluations,
        )
        told = processes.is_main and progress
        memory = memory_bytes(network, config, processes.world_size) if told else None
        trainer = Trainer(network, task, config, monitor, callback)
        if told:
            words = ", ".join(e.summary for e in evaluations)
            print(
                "\n  ".join(plan_lines(trainer, cfg, dataset, stream, memory, remarks, words)),
                flush=True,
            )
        trainer.run(progress)
        stream.close()
        weights = trainer.ema_weights()
        final = Path(config.out) / "final"
        if processes.is_main:
            _export(final, cfg, weights, export_dtype, dataset)
            if progress:
                print(
                    f"adm-rt train: wrote {final} after {trainer.step:,} updates, "
                    f"{trainer.seconds:.0f} s"
                )
    return final


def _split_flags(what, flags):
    """(TrainConfig, model flags) out of one dict; ValueError names an unknown flag."""
    own = {f.name for f in dataclasses.fields(TrainConfig)}
    fields = set(ModelConfig.__dataclass_fields__) - {"kind", "use_fp16"}
    rest = normalize_flags(_known(flags, own, fields), what)
    if what == "upsampler" and "image_size" in rest:
        raise ValueError("image_size: an upsampler has large_size and small_size.")
    if what == "classifier" and "null_class" in rest:
        raise ValueError("null_class: a classifier is not given labels.")
    return TrainConfig(**{k: v for k, v in flags.items() if k in own}), rest


def _known(flags, own, fields):
    for name in flags:
        if name not in own | fields and not name.startswith("classifier_"):
            raise ValueError(
                f"unknown argument {name!r}: it is neither one of train(), nor of TrainConfig or "
                f"ModelConfig.{nearest(name, [*own, *fields])}"
            )
    return {k: v for k, v in flags.items() if k not in own}


def _image_size(what, flags, preset):
    name = "large_size" if what == "upsampler" else "image_size"
    if name in flags:
        return flags[name]
    if preset is not None:
        return models.preset(preset).image_size
    if what == "upsampler":
        raise ValueError("large_size and small_size: an upsampler needs both.")
    return ModelConfig.__dataclass_fields__["image_size"].default


def _new_config(what, preset, flags, classes):
    """The ModelConfig of a network with fresh weights."""
    if classes["num_classes"] is None:
        classes = {k: v for k, v in classes.items() if k != "num_classes"}
    if preset is not None:
        base = models.preset(preset)
        if base.kind != what:
            raise ValueError(f"preset={preset!r} is of kind {base.kind!r}, not {what!r}.")
        return base.replace(use_fp16=False, **flags, **classes)
    if what != "classifier":
        return ModelConfig(kind=what, **flags, **classes)
    # The published defaults of a classifier are not those of a denoiser.
    flags = {CLASSIFIER_ALIASES.get(name, name): value for name, value in flags.items()}
    return ModelConfig.classifier(**flags, num_classes=classes["num_classes"])


def _task(cfg, stream, **options):
    diffusion = Diffusion.from_config(cfg.diffusion_config())
    if cfg.kind == "classifier":
        return ClassifierTask(diffusion, stream, num_classes=cfg.num_classes)
    options["num_classes"] = cfg.num_classes
    if cfg.kind == "upsampler":
        return UpsamplerTask(diffusion, stream, cfg.small_size, cfg.class_cond, **options)
    return DiffusionTask(diffusion, stream, cfg.class_cond, **options)


def _is_folder(spec):
    return isinstance(spec, (str, os.PathLike)) and os.path.isdir(os.path.expanduser(spec))


def _validation(cfg, task, dataset, val_data, val_images, reading):
    held_out = open_dataset(
        val_data,
        cfg.image_size,
        class_cond=True,
        num_classes=cfg.num_classes,
        class_names=dataset.class_names,
        **reading,
    )
    return Validation(held_out, task.diffusion, cfg.num_classes, val_images)


def _grid(cfg, task, config, dataset, sample_count, sample_steps):
    if sample_count is None:
        sample_count = _SAMPLES[cfg.kind]
    for name, value in (("sample_count", sample_count), ("sample_steps", sample_steps)):
        if value < 1:
            raise ValueError(
                f"{name}={value} must be at least 1; sample_interval=0 makes no grids."
            )
    truth, labels = None, None
    if cfg.kind == "upsampler":
        count = min(sample_count, dataset.num_images or sample_count)
        truth, labels = dataset.get_many(range(count), range(count))
    return SampleGrid(
        config.out,
        cfg,
        task.diffusion,
        sample_count,
        sample_steps,
        truth=truth,
        truth_labels=labels,
    )


def _export(final, cfg, weights, dtype, dataset):
    names = dataset.class_names
    if names is not None and len(names) != cfg.num_classes:
        names = None
    for index, (rate, state) in enumerate(weights.items()):
        folder = final if index == 0 else final.with_name(f"final_ema_{rate}")
        models.save_model(folder, (cfg, state), dtype=dtype, class_names=names, overwrite=True)


def _or(value, default):
    return default if value is None else value
