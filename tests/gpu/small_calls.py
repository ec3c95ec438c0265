"""Every kernel once on small inputs, for compute-sanitizer: ``python tests/gpu/small_calls.py``.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own and an
access beyond it is seen.
"""

import torch

from adm_rt import ops
from adm_rt.ops import StepCoefficients, input_gradients
from adm_rt.ops.philox import image_seeds
from adm_rt.ops.step_table import StepCounter, StepTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norms(dtype):
    for shape, silu in (((2, 64, 9, 7), True), ((1, 192, 8, 8), False), ((1, 96, 32, 32), True)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
            x.requires_grad_()
            weight, bias = (torch.randn(shape[1], device="cuda").requires_grad_() for _ in range(2))
            scale_shift = torch.randn(shape[0], 2 * shape[1], device="cuda").requires_grad_()
            y = ops.ada_group_norm(x, weight, bias, scale_shift, silu=silu)
            torch.autograd.grad(y, [x], torch.ones_like(y), retain_graph=True)
            y.backward(torch.ones_like(y))
    for channels, resample in ((64, "down"), (36, "up"), (64, "up")):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, channels, 6, 8, device="cuda").to(dtype).requires_grad_()
            skip = x.detach().contiguous(memory_format=layout)
            parameters = torch.randn(2, 2 * channels, device="cuda")
            first, groups = x.contiguous(memory_format=layout), 12 if channels == 36 else 32
            y, x_out = ops.ada_group_norm_resample(
                first, *parameters, groups=groups, skip=skip, resample=resample
            )
            (y.sum() + x_out.sum()).backward()
    for resample in (None, "down", "up"):  # as in a classifier's gradient
        x = torch.randn(2, 64, 6, 8, device="cuda").to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        parameters = torch.randn(2, 64, device="cuda")
        y, x_out, saved = input_gradients.ada_group_norm_resample_forward(
            x, *parameters, resample=resample
        )
        input_gradients.ada_group_norm_resample_input_gradient(y, x_out, saved, resample=resample)


def attentions(dtype):
    shapes = ((2, 64, 64, None), (1, 64, 77, None), (1, 64, 65, 1), (1, 96, 48, None))
    for heads, d, length, queries in (*shapes, (1, 256, 33, None)):
        qkv = torch.randn(2, length, 3 * heads * d, device="cuda").to(dtype)
        for tensor in (qkv.transpose(1, 2), qkv.transpose(1, 2).contiguous()):
            tensor = tensor.requires_grad_() if tensor.is_leaf else tensor.detach().requires_grad_()
            out = ops.qkv_attention(tensor, heads, num_queries=queries)
            out.backward(torch.ones_like(out))


def updates(dtype):
    row = StepCoefficients(x0_x=1.2, x0_out=-0.5, next_x=0.4, next_x0=0.5, noise=0.3, max_log=-1.0)
    for size in (16, 5):
        x = torch.randn(2, 3, size, size, device="cuda")
        out = torch.randn(2, 6, size, size, device="cuda").to(dtype)
        seeds = torch.from_numpy(image_seeds(1, 2)).cuda()
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
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
