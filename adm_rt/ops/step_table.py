"""guided_mean_update with its row in memory: a step that a CUDA graph can replay.

A captured call cannot be given other coefficients, so the rows of all steps lie in a table on the
device, and a counter beside it says which is next. It is the step of the Philox noise, too. Torch
only.
"""

import ctypes

import numpy as np
import torch

from adm_rt.ops.guided_mean_update import StepCoefficients, guided_mean_update

_WIDTH = len(StepCoefficients._fields)


class StepCounter:
    """Which step comes next, uint32 on the device; the last update of a step advances it."""

    def __init__(self, device):
        self._words = torch.zeros(2, dtype=torch.int32, device=device)  # the step, arrivals
        self.value = self._words[:1]  # int32 [1], an index for torch's operations

    def reset(self):
        self._words.zero_()

    @property
    def addresses(self):
        """Of the counter, and of the scratch word with which the kernel advances it."""
        return self._words.data_ptr(), self._words.data_ptr() + self._words.element_size()


class StepTable:
    """The rows of one update in every step: ``StepTable(rows, device)``, float32 [steps, 18].

    Rounded from float64 once, as the rows that are given to ``guided_mean_update`` are.
    """

    def __init__(self, rows, device):
        values = np.array(rows, np.float64).reshape(-1, _WIDTH).astype(np.float32)
        self.rows = torch.from_numpy(values).to(device)

    def update(
        self,
        counter,
        x,
        model_output,
        *,
        advance=True,
        state=False,
        gradient=None,
        uncond_output=None,
        history=(),
        seeds=None,
        learned_variance=False,
        clip="static",
        quantile=0.995,
    ):
        """``guided_mean_update`` with the row that ``counter`` names -> (x_next, x0, state).

        Tensors and options as there; seeds int64 [N] on x's device. advance: the counter goes on
        when all is read. state: whether there is to be one, whatever the row says. Neither waits
        for the device nor copies anything to it; the caller has checked the arguments.
        """
        tensors = {"gradient": gradient, "uncond_output": uncond_output, "history": history}
        options = {"learned_variance": learned_variance, "clip": clip, "quantile": quantile}
        if _on_device(x):
            from adm_rt.ops import _guided_mean_update_cuda as cuda_side

            return cuda_side.torch_step(
                x, model_output, self.rows, counter.addresses, advance=advance, state=state,
                seeds=seeds, **tensors, **options,
            )  # fmt: skip
        address = counter.addresses[0]
        step = ctypes.c_uint32.from_address(address)
        row = (ctypes.c_float * _WIDTH).from_address(self.rows.data_ptr() + 4 * _WIDTH * step.value)
        row = StepCoefficients(*row)
        noise = {"seeds": seeds, "step": step.value} if row.noise else {}
        x_next, x0, made = guided_mean_update(x, model_output, row, **tensors, **noise, **options)
        if state and made is None:
            made = torch.zeros_like(x0)
        step.value += advance
        return x_next, x0, made if state else None


def _on_device(x):
    return x.device.type == "cuda"
