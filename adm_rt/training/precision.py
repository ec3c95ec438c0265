"""bf16 and fp16 training: autocast over float32 weights, and dynamic loss scaling for fp16."""

import contextlib
import dataclasses

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision, device):
    """The context a forward pass of ``precision`` ("float32", "bf16", "fp16") runs in."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _AUTOCAST[precision])


@dataclasses.dataclass
class LossScale:
    """The factor 2**lg on the loss that keeps fp16 gradients above underflow.

    The published rule: lg gains ``growth`` by every good update and loses 1 by one with gradients
    that are not finite, which is skipped.
    """

    lg: float
    growth: float

    @property
    def factor(self):
        return 2.0**self.lg

    def update(self, good):
        """Take note of an update: were its gradients finite?"""
        self.lg += self.growth if good else -1.0
