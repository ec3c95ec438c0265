"""What one training step optimises: the hybrid diffusion objective, or the noisy classifier's.

A task turns a step number into a batch and a batch into per-image losses. All of its randomness
comes from torch's generator, which the trainer seeds from (seed, step), and all data from the
step's position in the stream, so a resumed run repeats the uninterrupted one.
"""

import torch
import torch.nn.functional as F

from adm_rt.diffusion import losses


class GlyphStream:
    """Batches of ``adm_rt.data.glyphs``: batch k of a seed is always the same."""

    def __init__(self, image_size, batch_size, seed):
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed

    def batch(self, step):
        """Images [N, 3, S, S] float32 in [-1, 1] and labels [N] int64 of batch ``step``."""
        from adm_rt.data import glyphs

        images, labels = glyphs(
            self.batch_size, self.image_size, seed=self.seed, first=step * self.batch_size
        )
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels.contiguous(), torch.from_numpy(labels)


class DiffusionTask:
    """The hybrid objective of Nichol & Dhariwal 2021 (eq. 16): L_simple + the bound for v."""

    def __init__(self, diffusion, data, class_cond):
        self.diffusion = diffusion
        self.data = data
        self.class_cond = class_cond

    def losses(self, model, step):
        """Per-image losses [N] of batch ``step``, by name; "loss" is what is minimised."""
        x0, y = self.data.batch(step)
        t = torch.randint(self.diffusion.num_timesteps, (x0.shape[0],))
        noise = torch.randn_like(x0)
        x_t = losses.q_sample(self.diffusion, x0, t, noise)
        output = model(x_t, self.diffusion.model_timesteps(t), y if self.class_cond else None)
        return losses.training_losses(self.diffusion, output.float(), x0, x_t, t, noise)


class ClassifierTask:
    """Cross-entropy on images noised to a uniform random level (section 4.1)."""

    def __init__(self, diffusion, data):
        self.diffusion = diffusion
        self.data = data

    def losses(self, model, step):
        """Per-image "loss" and "accuracy" (0 or 1) [N] of batch ``step``."""
        x0, y = self.data.batch(step)
        t = torch.randint(self.diffusion.num_timesteps, (x0.shape[0],))
        x_t = losses.q_sample(self.diffusion, x0, t, torch.randn_like(x0))
        logits = model(x_t, self.diffusion.model_timesteps(t)).float()
        loss = F.cross_entropy(logits, y, reduction="none")
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == y).float()}
