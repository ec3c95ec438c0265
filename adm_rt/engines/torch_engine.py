"""The torch engine: the modules of ``adm_rt.models`` as they are, and their gradient network."""

from __future__ import annotations

import contextlib

import torch

from adm_rt.engines.base import DTYPES, check_fit, check_low_res
from adm_rt.engines.memory import activation_bytes
from adm_rt.models.checkpoint import module_of
from adm_rt.models.classifier_gradient import ClassifierGradient


class TorchEngine:
    """Runs a UNet (or SuperResUNet) and a NoisyClassifier; see ``Engine`` for the methods.

    unet, classifier: torch modules, or ``ModelWeights`` that are made into such. They are
    moved to ``device``, set to evaluation mode and frozen in place: the
    classifier's gradient is taken with respect to the image only, never the weights.

    On the CPU everything is float32, whatever was asked for (a note says so), and the classifier's
    gradient is that of ``ClassifierGradient`` (which copies its convolution weights: make a new
    engine after changing them). On CUDA, half types run under autocast and the gradient is
    autograd's. CUDA has not been measured.
    """

    name = "torch"

    def __init__(self, unet, classifier=None, device="cpu", dtype="float32"):
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; allowed: 'auto', " + _quoted(DTYPES))
        if classifier is not None:
            check_fit(unet.cfg, classifier.cfg)
        self._device = resolve_device(device)
        self.notes = []
        self.dtype = "float32" if dtype == "auto" else dtype
        if self._device.type == "cpu" and self.dtype != "float32":
            self.notes.append(f"dtype={dtype} was asked for; float32 is used on the CPU")
            self.dtype = "float32"
        self._unet = _frozen(module_of(unet), self._device)
        if classifier is not None:
            classifier = _frozen(module_of(classifier), self._device)
        self._classifier = classifier
        # One core, 64x64_classifier: 1.02 to 1.06 times as fast as autograd.
        explicit = classifier is not None and self._device.type == "cpu"
        self._gradient = ClassifierGradient(self._classifier) if explicit else None

    @property
    def device(self):
        return str(self._device)

    def from_numpy(self, values):
        return torch.from_numpy(values).to(self._device)

    def to_numpy(self, values):
        return values.detach().cpu().numpy()

    def prepare(self, timesteps):
        """Nothing to prepare."""

    def image_bytes(self, guided=False):
        needed = activation_bytes(self._unet.cfg)
        if guided:
            needed = max(needed, activation_bytes(self._classifier.cfg, gradient=True))
        return needed

    def denoise(self, x, t, y=None, low_res=None):
        cfg = self._unet.cfg
        if cfg.class_cond and y is None:
            raise ValueError(
                f"y is missing: the model is class-conditional, pass int64 [{len(x)}] labels in "
                f"0..{cfg.num_classes - 1}"
            )
        check_low_res(low_res, cfg)
        labels = y if cfg.class_cond else None
        with torch.inference_mode(), self._autocast():
            times = self._times(x, t)
            if low_res is None:
                return self._unet(x, times, labels).float()
            return self._unet(x, times, low_res, labels).float()

    def classifier_gradient(self, x, t, y):
        if self._classifier is None:
            raise ValueError("classifier_gradient needs a classifier; this engine was made without")
        if self._gradient is not None:
            with torch.no_grad():
                return self._gradient(x, self._times(x, t), y)
        with torch.inference_mode(False), torch.enable_grad():
            # a tensor made under inference_mode cannot take part in autograd; its copy can
            x = x.clone() if x.is_inference() else x.detach()
            y = y.clone() if y.is_inference() else y
            x.requires_grad_(True)
            with self._autocast():
                logits = self._classifier(x, self._times(x, t))
            chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, y[:, None])
            (gradient,) = torch.autograd.grad(chosen.sum(), x)
        return gradient

    def _times(self, x, t):
        return torch.full((len(x),), float(t), dtype=torch.float32, device=self._device)

    def _autocast(self):
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self.dtype))


def _frozen(module, device):
    return module.to(device=device).eval().requires_grad_(False)


def _quoted(names):
    return ", ".join(repr(n) for n in names)
