"""Arrays of other libraries as inputs of the ops: CuPy's, and all that speak DLPack.

CuPy arrays reach the CUDA kernels directly, so neither needs torch. Any other array with
``__dlpack__`` (the Python array API's exchange protocol) is viewed, not copied, as a NumPy array or
a CUDA tensor, and results go back the same way; the protocol makes the streams wait for each other.
"""

import sys

import numpy as np

_CPU, _CUDA, _CUDA_MANAGED = 1, 2, 13  # device types of DLPack


def _library_of(value):
    return type(value).__module__.partition(".")[0]


def is_cupy(value):
    """Whether value is a CuPy array; imports nothing."""
    return _library_of(value) == "cupy" and hasattr(value, "__dlpack__")


def is_dlpack(value):
    """Whether value is an array of a library that the ops know only through DLPack."""
    known = isinstance(value, np.ndarray) or _library_of(value) in ("cupy", "torch")
    if known or (torch := sys.modules.get("torch")) and isinstance(value, torch.Tensor):
        return False
    return hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")


def through_dlpack(function, arrays, **options):
    """``function(*arrays, **options)`` on views of DLPack arrays -> its result in their library.

    arrays: name -> array or None, in order; the first decides the library and the device. A tuple
    of results goes back part by part, None as None. Raises
    TypeError for one that is no DLPack array, ValueError for one on another device.
    """
    first, x = next(iter(arrays.items()))
    device = x.__dlpack_device__()
    for name, array in arrays.items():
        if array is None:
            continue
        if not hasattr(array, "__dlpack_device__"):
            raise TypeError(
                f"{name} is {type(array).__name__} and {first} an array of {_library_of(x)}; give "
                "arrays of one library"
            )
        if array.__dlpack_device__() != device:
            raise ValueError(
                f"{name} is on DLPack device {tuple(array.__dlpack_device__())} and {first} on "
                f"{tuple(device)}; move one of them"
            )
    view = _viewer(first, x, device[0])
    result = function(*(None if a is None else view(a) for a in arrays.values()), **options)
    back = _returner(x)
    if isinstance(result, tuple):
        return tuple(None if part is None else back(part) for part in result)
    return back(result)


def _viewer(name, x, device_type):
    if device_type == _CPU:
        return np.from_dlpack
    if device_type not in (_CUDA, _CUDA_MANAGED):
        raise ValueError(
            f"{name} is an array of {_library_of(x)} on DLPack device type {int(device_type)}; "
            "there are kernels for the CPU (1) and for CUDA (2, 13)"
        )
    if "torch" not in sys.modules and "cupy" in sys.modules:
        return sys.modules["cupy"].from_dlpack
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{name} is a CUDA array of {_library_of(x)}; viewing it takes torch or CuPy: install "
            "one of them"
        ) from error
    return torch.from_dlpack


def _returner(x):
    """from_dlpack of the library that x comes from."""
    spaces = [sys.modules.get(_library_of(x))]
    if hasattr(x, "__array_namespace__"):
        spaces.insert(0, x.__array_namespace__())
    for space in spaces:
        if hasattr(space, "from_dlpack"):
            return space.from_dlpack
    raise TypeError(
        f"{_library_of(x)} has no from_dlpack to take the result back; give torch tensors, NumPy "
        "arrays or CuPy arrays"
    )
