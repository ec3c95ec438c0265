"""The torch engine: the modules as they are on the CPU, their channels_last form on CUDA."""

from __future__ import annotations

import torch

from adm_rt.engines.base import DTYPES, UNUSED_GPU, check_fit, check_low_res
from adm_rt.engines.captured_run import RunRecorder
from adm_rt.engines.cuda_networks import CudaUNet, gradient_network
from adm_rt.engines.memory import activation_bytes
from adm_rt.engines.torch_gpu import TorchGpu, chosen_convolutions, resolve_device
from adm_rt.models.checkpoint import module_of
from adm_rt.models.classifier_gradient import ClassifierGradient
from adm_rt.ops._backend import reference_forced
from adm_rt.ops._library import why_no_cuda_kernels


class TorchEngine:
    """Runs a UNet (or SuperResUNet) and a NoisyClassifier; see ``Engine`` for the methods.

    unet, classifier: torch modules, or ``ModelWeights`` that are made into such. The classifier's
    gradient is that of ``ClassifierGradient``: with respect to the image only, never the weights.

    On the CPU the modules themselves are set to evaluation mode and frozen; everything is float32,
    whatever was asked for (a note says so). The gradient has copies of the convolution weights:
    make a new engine after changing them.

    On CUDA the weights are copied into the form of ``cuda_networks``, in float32, bfloat16 or
    float16, and whole runs are replays of CUDA graphs (``run_captured``); graph: False runs their
    steps one by one, as ``denoise`` and ``classifier_gradient`` do. branches: False records the two
    networks of a step one after the other, which may be faster for large batches. Needs the CUDA
    kernels (``adm_rt._cuda``): without them device "auto" is the CPU (a note says so) and "cuda" an
    ImportError. CUDA has not been measured. gpu: for tests.
    """

    name = "torch"

    def __init__(
        self,
        unet,
        classifier=None,
        device="cpu",
        dtype="float32",
        *,
        graph=True,
        branches=True,
        gpu=None,
    ):
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; allowed: 'auto', " + _quoted(DTYPES))
        if classifier is not None:
            check_fit(unet.cfg, classifier.cfg)
        self.notes = []
        resolved = resolve_device(device) if gpu is None else None
        if gpu is None and resolved.type == "cuda":
            _check_kernels(device)
            gpu = TorchGpu(device, self.name)
        elif gpu is None and device == "auto" and torch.cuda.is_available():
            self.notes.append(UNUSED_GPU + why_no_cuda_kernels())
        self.dtype = "float32" if dtype == "auto" else dtype
        if gpu is None and self.dtype != "float32":
            self.notes.append(f"dtype={dtype} was asked for; float32 is used on the CPU")
            self.dtype = "float32"
        self._cfg = unet.cfg
        self._classifier_cfg = None if classifier is None else classifier.cfg
        self._runs = None
        if gpu is None:
            self._device, self.device = resolved, str(resolved)
            self._networks = _Modules(unet, classifier)
        else:
            self._device, self.device = gpu.torch_device, gpu.device
            self._networks = _OnCuda(unet, classifier, self._device, getattr(torch, self.dtype))
            if graph:
                self._runs = RunRecorder(self, gpu, unet.cfg.out_channels, branches=branches)

    def from_numpy(self, values):
        return torch.from_numpy(values).to(self._device)

    def to_numpy(self, values):
        return values.detach().cpu().numpy()

    def prepare(self, timesteps):
        """Nothing to prepare."""

    def image_bytes(self, guided=False):
        needed = [activation_bytes(self._cfg)]
        if guided:
            needed.append(activation_bytes(self._classifier_cfg, gradient=True))
        if self._runs is None:
            return max(needed)
        return sum(needed) // (1 if self.dtype == "float32" else 2)  # both at once

    def denoise(self, x, t, y=None, low_res=None):
        cfg = self._cfg
        if cfg.class_cond and y is None:
            raise ValueError(
                f"y is missing: the model is class-conditional, pass int64 [{len(x)}] labels in "
                f"0..{cfg.num_classes - 1}"
            )
        check_low_res(low_res, cfg)
        labels = y if cfg.class_cond else None
        with torch.inference_mode():
            return self._networks.denoise(x, self._times(x, t), labels, low_res)

    def classifier_gradient(self, x, t, y):
        if self._classifier_cfg is None:
            raise ValueError("classifier_gradient needs a classifier; this engine was made without")
        with torch.no_grad():
            return self._networks.gradient(x, self._times(x, t), y)

    def run_captured(self, sampler, x, diffusion, y, guidance_scale, **options):
        """A whole run of ``sampler`` as replays of CUDA graphs; see ``RunRecorder.run``. None on
        the CPU."""
        if self._runs is None:
            return None
        return self._runs.run(sampler, x, diffusion, y, guidance_scale, **options)

    def _times(self, x, t):
        """float32 [N]; t: a number, or a tensor [1] on the device."""
        if isinstance(t, torch.Tensor):
            return t.expand(len(x))
        return torch.full((len(x),), float(t), dtype=torch.float32, device=self._device)


class _Modules:
    """The modules as they are."""

    def __init__(self, unet, classifier):
        self._unet = _frozen(module_of(unet))
        # One core, 64x64_classifier: 1.02 to 1.06 times as fast as autograd.
        self._gradient = None
        if classifier is not None:
            self._gradient = ClassifierGradient(_frozen(module_of(classifier)))

    def denoise(self, x, t, y, low_res):
        if low_res is None:
            return self._unet(x, t, y).float()
        return self._unet(x, t, low_res, y).float()

    def gradient(self, x, t, y):
        return self._gradient(x, t, y)


class _OnCuda:
    """Their copies in channels_last."""

    def __init__(self, unet, classifier, device, dtype):
        self._exact = dtype == torch.float32
        self._unet = CudaUNet(unet, device, dtype)
        self._gradient = None
        if classifier is not None:
            self._gradient = gradient_network(classifier, device, dtype)

    def denoise(self, x, t, y, low_res):
        with chosen_convolutions(self._exact):
            return self._unet(x, t, y, low_res)

    def gradient(self, x, t, y):
        with chosen_convolutions(self._exact):
            return self._gradient(x, t, y)


def _check_kernels(device):
    """ImportError before anything is loaded where the ops would have to refuse the tensors."""
    missing = "" if reference_forced() else why_no_cuda_kernels()
    if missing:
        raise ImportError(
            f"device={device!r}: the CUDA kernels of adm_rt cannot be used ({missing}); build with "
            "ADM_RT_CUDA=on where nvcc is, or use device='cpu', or 'auto'"
        )


def _frozen(module):
    return module.to(device="cpu").eval().requires_grad_(False)


def _quoted(names):
    return ", ".join(repr(n) for n in names)
