"""Guided images from a folder that `adm-rt export` made, with NumPy and ONNX Runtime alone.

python run_without_torch.py FOLDER [LABEL ...]      writes samples.npz and samples.ppm
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def sample(folder, x, labels, steps=25, scale=1.0):
    """DDIM (arXiv 2105.05233, algorithm 2): noise [N, 3, S, S] -> uint8 images [N, S, S, 3]."""
    model = json.loads((Path(folder) / "manifest.json").read_text())["model"]
    unet = onnxruntime.InferenceSession(Path(folder) / "unet.onnx")
    guide = onnxruntime.InferenceSession(Path(folder) / "classifier_gradient.onnx")
    total = model["diffusion_steps"]
    if model["noise_schedule"] == "cosine":
        cosine = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
    else:
        betas = np.linspace(0.1 / total, 20 / total, total)
    alpha_bar = np.cumprod(1 - betas)
    times = list(range(0, total, total // steps))[::-1]
    for t, following in zip(times, [*times[1:], None]):
        a, b = alpha_bar[t], 1.0 if following is None else alpha_bar[following]
        model_t = t * 1000 / total if model["rescale_timesteps"] else t
        feeds = {"x": x, "t": np.full(len(x), model_t, np.float32), "y": labels}
        out = unet.run(None, {i.name: feeds[i.name] for i in unet.get_inputs()})[0][:, :3]
        x0 = out if model["predict_xstart"] else (x - np.sqrt(1 - a) * out) / np.sqrt(a)
        x0 = np.clip(x0, -1, 1) + scale * (1 - a) / np.sqrt(a) * guide.run(None, feeds)[0]
        noise = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
        x = (np.sqrt(b) * x0 + np.sqrt(1 - b) * noise).astype(np.float32)
    return ((x + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


if __name__ == "__main__":
    labels = np.array([int(word) for word in sys.argv[2:]] or [0, 1, 2, 3], np.int64)
    size = json.loads((Path(sys.argv[1]) / "manifest.json").read_text())["model"]["image_size"]
    start = np.random.default_rng(0).standard_normal((len(labels), 3, size, size), np.float32)
    images = sample(sys.argv[1], start, labels)
    np.savez("samples.npz", images, labels)
    row = np.concatenate(list(images), axis=1)
    Path("samples.ppm").write_bytes(b"P6 %d %d 255\n" % row.shape[1::-1] + row.tobytes())
