"""Every kernel once on small inputs, for compute-sanitizer: ``python tests/gpu/small_calls.py``.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own and an
access beyond it is seen. All that the kernels read is copied from the host, or written by them:
initcheck takes what kernels write that it does not watch, such as torch's, for unwritten.
"""

import devices
import torch

from adm_rt import ops
from adm_rt.ops import StepCoefficients, input_gradients
from adm_rt.ops.philox import image_seeds
from adm_rt.ops.step_table import StepCounter, StepTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def normal(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    """Random numbers on the device that no kernel has made."""
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout).to(devices.NAME)


def ones_like(tensor):
    """The same order of memory, and copied from the host, too."""
    return torch.empty_like(tensor, device="cpu").fill_(1).to(tensor.device)


def leaves(*tensors):
    return [tensor.requires_grad_() for tensor in tensors]


def norms(dtype):
    for shape, silu in (((2, 64, 9, 7), True), ((1, 192, 8, 8), False), ((1, 96, 32, 32), True)):
        for layout in LAYOUTS:
            x = normal(*shape, dtype=dtype, layout=layout)
            parameters = normal(shape[1]), normal(shape[1]), normal(shape[0], 2 * shape[1])
            x, weight, bias, scale_shift = leaves(x, *parameters)
            y = ops.ada_group_norm(x, weight, bias, scale_shift, silu=silu)
            torch.autograd.grad(y, [x], ones_like(y), retain_graph=True)
            torch.autograd.grad(y, [x, weight, bias, scale_shift], ones_like(y))
    for channels, resample in ((64, "down"), (36, "up"), (64, "up")):
        for layout in LAYOUTS:
            x, skip = (normal(2, channels, 6, 8, dtype=dtype, layout=layout) for _ in range(2))
            weight, bias = normal(2 * channels), normal(2 * channels)
            groups = 12 if channels == 36 else 32
            inputs = leaves(x, skip, weight, bias)
            results = ops.ada_group_norm_resample(
                x, weight, bias, groups=groups, skip=skip, resample=resample
            )
            torch.autograd.grad(results, inputs, [ones_like(result) for result in results])
    for resample in (None, "down", "up"):  # as in a classifier's gradient
        x = normal(2, 64, 6, 8, dtype=dtype, layout=torch.channels_last)
        y, x_out, saved = input_gradients.ada_group_norm_resample_forward(
            x, normal(64), normal(64), resample=resample
        )
        input_gradients.ada_group_norm_resample_input_gradient(y, x_out, saved, resample=resample)


def attentions(dtype):
    shapes = ((2, 64, 64, None), (1, 64, 77, None), (1, 64, 65, 1), (1, 96, 48, None))
    for heads, d, length, queries in (*shapes, (1, 256, 33, None)):
        width = 3 * heads * d
        token_major = normal(2, length, width, dtype=dtype).transpose(1, 2)
        for qkv in leaves(token_major, normal(2, width, length, dtype=dtype)):
            out = ops.qkv_attention(qkv, heads, num_queries=queries)
            torch.autograd.grad(out, qkv, ones_like(out))


def updates(dtype):
    row = StepCoefficients(x0_x=1.2, x0_out=-0.5, next_x=0.4, next_x0=0.5, noise=0.3, max_log=-1.0)
    for size in (16, 5):
        x, out = normal(2, 3, size, size), normal(2, 6, size, size, dtype=dtype)
        seeds = torch.from_numpy(image_seeds(1, 2)).to(x.device)
        for clip in ("static", "dynamic"):
            options = {"gradient": x, "seeds": seeds, "learned_variance": True, "clip": clip}
            ops.guided_mean_update(x, out, row, **options)
            table, counter = StepTable([row] * 2, x.device), StepCounter(x.device)
            for _ in range(2):
                table.update(counter, x, out, state=True, history=[x, x], **options)


def main():
    for dtype in DTYPES:
        norms(dtype)
        attentions(dtype)
        updates(dtype)
    if devices.NAME == "cuda":
        torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
