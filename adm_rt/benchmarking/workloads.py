"""The work of one request, the same for every contender: forward, gradient, step, sample."""

from __future__ import annotations

import itertools

from adm_rt import Pipeline
from adm_rt.benchmarking.sampling_cases import STEPS
from adm_rt.diffusion import Diffusion

MIDDLE = STEPS // 2


def diffusion_of(cfg):
    """The process of a configuration in ``STEPS`` steps."""
    return Diffusion(**{**cfg.diffusion_config(), "timestep_respacing": str(STEPS)})


def request(contender, kind, cfg, arrays, guidance_scale):
    """A callable without arguments that does the work and returns a NumPy array.

    contender: an Engine, or a Pipeline (ours). cfg: the diffusion model's. arrays: those of
    ``sampling_cases.inputs``. A Pipeline's "sample" is its call, as in ``adm_rt.sample``; the
    published code ends each step in its own sequence of torch operations; everybody else takes our
    samplers.
    """
    pipeline = contender if isinstance(contender, Pipeline) else None
    engine = contender if pipeline is None else pipeline.engine
    diffusion = diffusion_of(cfg)
    own = {name: engine.from_numpy(values) for name, values in arrays.items()}
    x, y = own["x"], own["y"]
    times = Timesteps(diffusion)
    labels = y if cfg.class_cond else None
    if kind == "forward":
        return lambda: engine.to_numpy(engine.denoise(x, times.scaled(), labels))
    if kind == "gradient":
        return lambda: engine.to_numpy(engine.classifier_gradient(x, times.scaled(), y))
    if _is_published(engine):
        return _published(kind, engine, diffusion, times, own, arrays["seeds"], guidance_scale)
    if kind == "step":
        return _step(engine, diffusion, times, own, guidance_scale)
    if pipeline is not None:
        options = {"steps": STEPS, "sampler": "ddpm", "guidance_scale": guidance_scale}
        options["guidance_interval"] = None  # all contenders guide at every step
        options.update(classes=arrays["y"].tolist(), seeds=arrays["seeds"].tolist())
        return lambda: pipeline(len(x), **options, batch_size=len(x), progress=False).images
    return _sample(engine, cfg, diffusion, y, arrays["seeds"], guidance_scale)


class Timesteps:
    """That of the middle step first, then another one each time, a thousandth further.

    Nobody gets away with the embedding of the request before.
    """

    def __init__(self, diffusion):
        self._diffusion, self._count = diffusion, itertools.count()

    def original(self):
        """In the original process, as the samplers want it."""
        return float(self._diffusion.timestep_map[MIDDLE]) + next(self._count) / 1000

    def scaled(self):
        """As the networks want it."""
        return float(self._diffusion.scaled_timestep(self.original()))


def _is_published(engine):
    from adm_rt.benchmarking.contenders import Eager

    return type(engine) is Eager


def _step(engine, diffusion, times, own, guidance_scale):
    from adm_rt.samplers.ddpm import coefficients
    from adm_rt.samplers.guided_step import GuidedRun

    row = coefficients(diffusion, MIDDLE, guidance_scale)
    noise = {"draws_noise": True, "noise": [own["noise"]]}

    def step():
        run = GuidedRun(
            engine,
            own["x"],
            diffusion,
            own["y"],
            guidance_scale,
            timesteps=[times.original()],
            **noise,
        )
        return engine.to_numpy(run.step(0, own["x"], row, learned_variance=diffusion.learn_sigma).x)

    return step


def _sample(engine, cfg, diffusion, y, seeds, guidance_scale):
    from adm_rt.ops.philox import INITIAL_NOISE, philox_normal
    from adm_rt.samplers import SAMPLERS
    from adm_rt.trajectory import to_uint8

    shape = (cfg.in_channels, cfg.image_size, cfg.image_size)

    def run():
        noise = philox_normal(seeds, shape, step=0, purpose=INITIAL_NOISE)
        x = SAMPLERS["ddpm"](
            engine, engine.from_numpy(noise), diffusion, y, guidance_scale, noise=seeds
        )
        return to_uint8(engine.to_numpy(x))

    return run


def _published(kind, engine, diffusion, times, own, seeds, guidance_scale):
    """p_sample and p_sample_loop; the noise is given, so that images can be compared."""
    import torch

    from adm_rt.benchmarking import baselines
    from adm_rt.ops.philox import INITIAL_NOISE, STEP_NOISE, philox_normal

    tables = baselines.tables(diffusion)
    y, shape = own["y"], own["x"].shape

    def step(x, i, t, noise):
        out = engine.denoise(x, t, y)
        gradient = engine.classifier_gradient(x, t, y) * guidance_scale
        with torch.no_grad():
            index = torch.full((len(x),), i, dtype=torch.int64)
            return baselines.ddpm_update(tables, x, out, index, gradient, noise)

    if kind == "step":
        return lambda: step(own["x"], MIDDLE, times.scaled(), own["noise"]).numpy()
    draws = [philox_normal(seeds, shape[1:], step=0, purpose=INITIAL_NOISE)]
    draws += [philox_normal(seeds, shape[1:], step=k, purpose=STEP_NOISE) for k in range(STEPS)]
    draws = [torch.from_numpy(draw) for draw in draws]

    def sample():
        x = draws[0]
        for k, i in enumerate(reversed(range(STEPS))):
            t = float(diffusion.scaled_timestep(float(diffusion.timestep_map[i])))
            x = step(x, i, t, draws[k + 1])
        return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

    return sample
