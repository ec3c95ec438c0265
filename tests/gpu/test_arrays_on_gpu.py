"""CuPy arrays and arrays that speak DLPack on the GPU: the results of torch's tensors, bit for bit.

Not run on a GPU yet.
"""

import types

import devices
import numpy as np
import pytest
import torch

from adm_rt import ops
from adm_rt.ops import StepCoefficients
from adm_rt.ops.philox import image_seeds

devices.require()


class Foreign:
    """An array of a library that is known through DLPack alone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=torch.from_dlpack)


def calls(dtype, layout):
    """op -> (function of its arrays, these as NumPy), large enough for several blocks."""
    rng = np.random.default_rng(11)

    def normal(*shape, dtype="float32"):
        return rng.standard_normal(shape).astype(dtype)

    x, qkv = normal(2, 48, 40, 64, dtype=dtype), normal(2, 70, 3 * 2 * 64, dtype=dtype)
    if layout == "channels_last":
        x, qkv = x.transpose(0, 3, 1, 2), qkv.transpose(0, 2, 1)
    else:
        x, qkv = x.reshape(2, 64, 48, 40), qkv.reshape(2, 384, 70)
    row = StepCoefficients(x0_x=1.2, x0_out=-0.5, next_x=0.4, next_x0=0.5, noise=0.3, max_log=-1.0)
    update = {"seeds": image_seeds(3, 2), "step": 4, "learned_variance": True}
    return {
        "ada_group_norm": (ops.ada_group_norm, (x, normal(64), normal(64), normal(2, 128))),
        "qkv_attention": (lambda array: ops.qkv_attention(array, 2), (qkv,)),
        "guided_mean_update": (
            lambda x, out: ops.guided_mean_update(x, out, row, **update)[0],
            (normal(2, 3, 33, 31), normal(2, 6, 33, 31, dtype=dtype)),
        ),
    }


OPS = ("ada_group_norm", "qkv_attention", "guided_mean_update")


def by_torch(device, name, dtype, layout):
    function, arrays = calls(dtype, layout)[name]
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    with torch.no_grad():
        return function, tensors, function(*tensors).cpu().numpy()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", OPS)
def test_cupy(gpu, name, dtype, layout):
    cupy = pytest.importorskip("cupy")
    function, tensors, expected = by_torch(gpu, name, dtype, layout)
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
        with stream:
            found = function(*map(cupy.from_dlpack, tensors))  # views: the order of memory stays
            assert isinstance(found, cupy.ndarray) and found.dtype == expected.dtype
            np.testing.assert_array_equal(cupy.asnumpy(found), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OPS)
def test_dlpack(device, name, layout):
    function, tensors, expected = by_torch(device, name, "float32", layout)
    found = function(*map(Foreign, tensors))
    assert isinstance(found, torch.Tensor) and found.device.type == device.type
    np.testing.assert_array_equal(found.cpu().numpy(), expected)
