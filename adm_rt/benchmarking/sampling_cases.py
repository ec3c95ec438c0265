"""What ``adm-rt bench sample`` runs: models, cases, random weights, inputs. No torch here."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adm_rt.engines.memory import activation_bytes
from adm_rt.locate import locate
from adm_rt.models import ModelConfig, list_presets, preset
from adm_rt.models.parameter_shapes import count_parameters, parameter_shapes
from adm_rt.models.weight_folder import is_model_folder, read_info, write_folder

STEPS = 25  # of every diffusion here; a "step" case is the one in the middle
KINDS = ("forward", "gradient", "step", "sample")


class BenchModel(NamedTuple):
    """A denoiser and maybe its classifier: shipped (a zoo name) or with random weights."""

    name: str
    diffusion: ModelConfig | None = None
    classifier: ModelConfig | None = None
    zoo: str | None = None
    guidance_scale: float = 1.0


class Case(NamedTuple):
    """One row of the table before it is measured.

    kind: "forward" (the UNet), "gradient" (of the classifier), "step" (both and the ddpm update),
    "sample" (25 of these from noise to uint8). default: part of the run without --all or --only.
    """

    model: str
    kind: str
    batch: int
    default: bool

    @property
    def name(self):
        return f"{self.model} {self.kind}"

    def sizes(self, model):
        cfg = configs(model)["diffusion"]
        text = f"batch {self.batch}, {cfg.image_size}x{cfg.image_size}"
        return text + (f", {STEPS} steps" if self.kind == "sample" else "")


MODELS = {
    model.name: model
    for model in (
        BenchModel("glyphs32", zoo="glyphs32", guidance_scale=5.0),
        # The CIFAR-sized model of reference measurements: 44.2 M weights, 14.4 GFLOP an image.
        BenchModel(
            "unet32_128",
            ModelConfig(
                image_size=32,
                num_channels=128,
                channel_mult="1,2,2,2",
                num_res_blocks=2,
                attention_resolutions="16,8",
                num_heads=4,
                learn_sigma=True,
                resblock_updown=True,
                noise_schedule="cosine",
            ),
        ),
        BenchModel("64x64_diffusion", preset("64x64_diffusion"), preset("64x64_classifier")),
        BenchModel("256x256_diffusion", preset("256x256_diffusion")),
    )
}


def _released(name):
    guide = f"{name.partition('_')[0]}_classifier"
    classifier = preset(guide) if guide in list_presets("classifier") else None
    return BenchModel(name, preset(name), classifier)


# and every released denoiser and upsampler, with the classifier of its size
ALL_MODELS = MODELS | {
    name: _released(name) for name in (*list_presets("diffusion"), *list_presets("upsampler"))
}

CASES = (
    Case("glyphs32", "sample", 16, True),
    Case("unet32_128", "forward", 1, True),
    Case("unet32_128", "forward", 4, False),
    Case("64x64_diffusion", "forward", 1, True),
    Case("64x64_diffusion", "gradient", 1, True),
    Case("64x64_diffusion", "step", 1, True),
    Case("64x64_diffusion", "forward", 4, False),
    Case("64x64_diffusion", "gradient", 4, False),
    Case("64x64_diffusion", "step", 4, False),
    Case("64x64_diffusion", "sample", 1, False),
    Case("256x256_diffusion", "forward", 1, False),
)


def configs(model):
    """part -> ModelConfig for "diffusion" and, if there is one, "classifier"."""
    if model.zoo is None:
        parts = {"diffusion": model.diffusion, "classifier": model.classifier}
        return {part: cfg for part, cfg in parts.items() if cfg is not None}
    return {part: read_info(path).config for part, path in _zoo_folders(model).items()}


def _zoo_folders(model):
    path = locate(model.zoo, "model")
    classifier = read_info(path).metadata["classifier"]
    return {"diffusion": path, "classifier": locate(classifier, "classifier", kind="classifier")}


def prepare(model, folder):
    """part -> model folder; those with random weights are made below ``folder`` unless there."""
    if model.zoo is not None:
        return {part: Path(path) for part, path in _zoo_folders(model).items()}
    places = {}
    for part, cfg in configs(model).items():
        place = places[part] = Path(folder) / model.name / part
        if is_model_folder(place) and read_info(place).config == cfg:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        write_folder(place, cfg, random_weights(cfg), overwrite=True)
    return places


def random_weights(cfg, seed=0):
    """Weights that make ordinary outputs: name -> float32 array, the same on every machine.

    No layer is zero, as some are at the start of training, so that no part of the network can be
    wrong unseen: each convolution and linear keeps the variance of its input, norms are near one.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(cfg.kind.encode())]))
    return {name: _random_weight(name, shape, rng) for name, shape in parameter_shapes(cfg).items()}


def _random_weight(name, shape, rng):
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        norm = name.endswith(".weight")  # the only one-dimensional weights are those of norms
        return (1 + 0.1 * values if norm else 0.1 * values).astype(np.float32)
    if name == "label_emb.weight":
        return values * np.float32(0.5)
    fan_in = shape[0] if name.endswith("positional_embedding") else int(np.prod(shape[1:]))
    return values * np.float32(fan_in**-0.5)


def inputs(model, case):
    """The arrays of a case: images and noise float32 [N, 3, S, S], labels int64 [N], seeds."""
    cfg = configs(model)
    unet, n = cfg["diffusion"], case.batch
    classes = cfg.get("classifier", unet).num_classes
    rng = np.random.Generator(np.random.Philox(key=[1, n]))
    shape = (n, unet.in_channels, unet.image_size, unet.image_size)
    return {
        "x": rng.standard_normal(shape, dtype=np.float32),
        "noise": rng.standard_normal(shape, dtype=np.float32),
        "y": rng.integers(0, classes, n),
        "seeds": np.arange(n, dtype=np.int64),
    }


def weight_bytes(model):
    """Bytes of the raw float32 weights of all parts."""
    return sum(4 * count_parameters(parameter_shapes(cfg)) for cfg in configs(model).values())


def working_bytes(model, batch):
    """Rough activation memory of a plain framework that runs the model, for ``batch`` images."""
    parts = configs(model)
    needs = [activation_bytes(cfg, gradient=part == "classifier") for part, cfg in parts.items()]
    return batch * max(needs)
