"""A model without torch: its configuration, and its weights in NumPy when somebody asks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np

from adm_rt.models.config import ModelConfig
from adm_rt.models.weight_folder import ModelInfo


class ModelWeights:
    """What ``models.load_weights`` returns, and the native engine takes in place of a module.

    ``ModelWeights(info, read, digest)``: ``read()`` gives name -> float32 array in the published
    names and layout and is called by ``state_dict``, each time, so that weights need not stay in
    memory; it raises CheckpointError for a damaged file. ``digest`` is a hex string that differs
    whenever the weights do. ``cfg``: the ModelConfig; ``info``: a ModelInfo.
    """

    def __init__(self, info: ModelInfo, read: Callable[[], Mapping[str, np.ndarray]], digest: str):
        self.info, self.digest = info, digest
        self._read = read

    @property
    def cfg(self) -> ModelConfig:
        return self.info.config

    def state_dict(self) -> dict[str, np.ndarray]:
        """All weights, name -> float32 array."""
        return dict(self._read())

    def __repr__(self):
        return f"ModelWeights(kind={self.cfg.kind!r}, image_size={self.cfg.image_size})"

    @classmethod
    def of(cls, model) -> ModelWeights:
        """``model`` itself, or the weights of a torch module of this package as they are now."""
        if isinstance(model, cls):
            return model
        state = {
            name: tensor.detach().float().cpu().numpy()
            for name, tensor in model.state_dict().items()
        }
        info = getattr(model, "info", None)
        if info is None or info.config != model.cfg:
            info = ModelInfo(model.cfg)
        return cls(info, lambda: state, content_digest(state))


def content_digest(weights: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, array in weights.items():
        digest.update(f"{name}{list(array.shape)}".encode())
        digest.update(memoryview(np.ascontiguousarray(array, np.float32)).cast("B"))
    return digest.hexdigest()
