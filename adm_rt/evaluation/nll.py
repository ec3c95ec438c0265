"""Bits per dimension: the variational bound on a data set, every term of it (image_nll.py).

The bound is the sum over all steps of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the
discretised Gaussian's -log p(x_0 | x_1), and the prior's KL(q(x_T | x_0) || N(0, 1)); Improved DDPM
(arXiv 2102.09672), section 2.1. Each step is a pass of the network over all images.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from adm_rt.data import area_downsample
from adm_rt.diffusion import Diffusion, losses
from adm_rt.ops.philox import image_seeds, philox_normal
from adm_rt.trajectory import from_uint8

NLL_NOISE = 34  # purpose of the noise at step t; training and sampling have others


def bits_per_dim(
    network,
    diffusion: Diffusion,
    images,
    labels=None,
    *,
    clip_denoised: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """The bound and its terms for images uint8 [N, S, S, 3], labels int64 [N] or None.

    network: a UNet or SuperResUNet (its low-resolution input is made from the images by area);
      called as it is: eval mode and the device are the caller's.
    diffusion: its process; a respaced one gives the bound of the short chain.
    clip_denoised: clip the predicted x_0 to [-1, 1], as published.

    Image i's noise at step t is a function of (seed, i, t) only, so no value depends on batch_size.
    Returns float64 arrays: "total_bpd" [N] = "prior_bpd" [N] + the sum of "vb" [N, T] over t; and
    "xstart_mse" and "mse" [N, T], the squared errors of x_0 and of the noise. T is the number of
    steps of ``diffusion``, column t the position t. Raises ValueError for images of another size,
    missing labels or labels out of range.
    """
    cfg = network.cfg
    images, labels = _checked(cfg, images, labels)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    device = next(network.parameters()).device
    count, steps = len(images), diffusion.num_timesteps
    seeds = image_seeds(seed, count)
    result = {name: np.empty((count, steps)) for name in ("vb", "xstart_mse", "mse")}
    result["prior_bpd"] = np.empty(count)
    with torch.inference_mode(), _bar(progress, count * steps) as bar:
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            # Only the network is float32: terms of the bound are small differences.
            x0 = torch.from_numpy(from_uint8(images[rows])).double().to(device)
            inputs = _inputs(cfg, x0.float(), labels, rows)
            for position in reversed(range(steps)):
                noise = philox_normal(seeds[rows], x0.shape[1:], step=position, purpose=NLL_NOISE)
                noise = torch.from_numpy(noise).double().to(device)
                t = torch.full((len(x0),), position, device=device)
                x_t = losses.q_sample(diffusion, x0, t, noise)
                output = network(x_t.float(), diffusion.model_timesteps(t), *inputs)
                terms = losses.evaluation_terms(diffusion, output, x0, x_t, t, noise, clip_denoised)
                for name, values in terms.items():
                    result[name][rows, position] = values.cpu().numpy()
                bar.update(len(x0))
            result["prior_bpd"][rows] = losses.prior_bpd(diffusion, x0).cpu().numpy()
    result["total_bpd"] = result["prior_bpd"] + result["vb"].sum(1)
    return result


def summary(result: dict[str, np.ndarray]) -> dict:
    """``bits_per_dim``'s arrays as JSON has them: means over the images, per-step lists by t.

    ``bits_per_dim_stderr`` is the standard error of the mean over images.
    """
    total = result["total_bpd"]
    return {
        "bits_per_dim": float(total.mean()),
        "bits_per_dim_stderr": float(total.std(ddof=1) / len(total) ** 0.5)
        if len(total) > 1
        else None,
        "prior_bpd": float(result["prior_bpd"].mean()),
        "num_images": len(total),
        "steps": result["vb"].shape[1],
        **{name: result[name].mean(0).tolist() for name in ("vb", "xstart_mse", "mse")},
    }


def _checked(cfg, images, labels):
    if cfg.kind == "classifier":
        raise ValueError("model is a classifier, which has no likelihood of images")
    images = np.asarray(images)
    size = cfg.image_size
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
        raise ValueError(
            f"images must be uint8 [N, {size}, {size}, 3] with N > 0 for this model, got "
            f"{images.dtype} {list(images.shape)}"
        )
    if not cfg.class_cond:
        return images, None
    if labels is None or np.shape(labels) != (len(images),):
        raise ValueError(
            f"labels: the model is class-conditional, give one int in 0..{cfg.num_classes - 1} "
            f"for each of the {len(images)} images"
        )
    labels = np.asarray(labels, dtype=np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= cfg.num_classes))
    if len(bad):
        raise ValueError(
            f"labels[{bad[0]}]={labels[bad[0]]} is not a class of the model, 0 to "
            f"{cfg.num_classes - 1}"
        )
    return images, torch.from_numpy(labels)


def _inputs(cfg, x0, labels, rows):
    inputs = []
    if cfg.kind == "upsampler":
        inputs.append(area_downsample(x0, cfg.small_size))
    return [*inputs, None if labels is None else labels[rows].to(x0.device)]


def _bar(progress, total):
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc="bits per dim",
        unit="pass",
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no animation
    )
