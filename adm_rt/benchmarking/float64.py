"""The exact answer: our networks in float64 through ``adm_rt.ops.reference``."""

from __future__ import annotations


def output(kind, cfg, arrays, folders):
    """What a request of ``kind`` ("forward" or "gradient") gives without rounding, float64."""
    import torch

    from adm_rt import ops
    from adm_rt.benchmarking.published import classifier_gradient
    from adm_rt.benchmarking.workloads import MIDDLE, diffusion_of
    from adm_rt.models import load_model

    network = load_model(folders["diffusion" if kind == "forward" else "classifier"]).double()
    diffusion = diffusion_of(cfg)
    x, y = torch.from_numpy(arrays["x"]).double(), torch.from_numpy(arrays["y"])
    t = diffusion.scaled_timestep(float(diffusion.timestep_map[MIDDLE]))
    t = torch.full((len(x),), float(t), dtype=torch.float64)
    with ops.use_reference(), torch.no_grad():
        if kind == "gradient":
            return classifier_gradient(network.requires_grad_(False), x, t, y).numpy()
        return network(x, t, y if cfg.class_cond else None).numpy()
