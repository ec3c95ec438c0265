"""The compiled extensions and the ``torch.ops.adm_rt`` library, all opened on first use.

An op module keeps its registration in a function that calls ``define`` once per schema, so that
importing ``adm_rt.ops`` imports neither torch nor the extension. ``register_torch_ops()`` makes
all of ``torch.ops.adm_rt.*`` exist at once, for programs that name the ops without calling them
(loading an exported graph, for one).
"""

import contextlib
import functools
import importlib
import threading

from adm_rt._build_info import build_info

BUILD_COMMAND = "pip install ."
INPLACE_BUILD_COMMAND = "python setup.py build_ext --inplace"

_lock = threading.RLock()
_overloads = {}


@functools.cache
def extension():
    """The module ``adm_rt._C``. Raises ImportError that names the build command."""
    try:
        return importlib.import_module("adm_rt._C")
    except ModuleNotFoundError as error:
        if error.name != "adm_rt._C":
            raise
        raise ImportError(
            "the compiled kernels of adm_rt (adm_rt._C) are not built: run "
            f"`{BUILD_COMMAND}` in the source tree (or `{INPLACE_BUILD_COMMAND}` to use the tree "
            "itself), or run inside `with adm_rt.ops.use_reference():` to do without them"
        ) from error


def extension_available():
    """Whether ``adm_rt._C`` can be imported."""
    try:
        extension()
    except ImportError:
        return False
    return True


@functools.cache
def cuda_extension():
    """The module ``adm_rt._cuda``. Raises ImportError that says why there is none."""
    try:
        return importlib.import_module("adm_rt._cuda")
    except ImportError as error:
        raise ImportError(
            f"x is a CUDA tensor and the CUDA kernels of adm_rt cannot be used ({error}): build "
            "with `ADM_RT_CUDA=on pip install .` where nvcc is, move the tensors to the CPU, or "
            "run inside `with adm_rt.ops.use_reference():`"
        ) from error


def why_no_cuda_kernels():
    """Why ``adm_rt._cuda`` cannot be imported; "" where it can. Needs neither driver nor GPU."""
    try:
        cuda_extension()
    except ImportError as error:
        missing = isinstance(error.__cause__, ModuleNotFoundError)
        reason = build_info().get("cuda", {}).get("reason") if missing else None
        return reason or str(error.__cause__)
    return ""


@contextlib.contextmanager
def cuda_stream(tensor):
    """Makes the tensor's device the current one and yields the handle of torch's stream on it."""
    import torch

    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


@functools.cache
def library():
    """The ``torch.library.Library`` that owns the namespace ``adm_rt``."""
    import torch

    return torch.library.Library("adm_rt", "DEF")


def define(schema, *, cpu, fake, cuda=None):
    """Register one op and return its ``OpOverload``; the same schema again returns the same one.

    schema: "name(Tensor x, ...) -> Tensor"; cpu, cuda: the implementations on tensors of those
    devices; fake: the same signature on tensors without data (shapes, dtypes and strides only), for
    export and compile.
    """
    import torch

    with _lock:
        if schema not in _overloads:
            name = library().define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            name = name or schema.split("(")[0]
            library().impl(name, cpu, "CPU")
            if cuda is not None:
                library().impl(name, cuda, "CUDA")
            torch.library.register_fake(f"adm_rt::{name}", fake, lib=library())
            _overloads[schema] = getattr(torch.ops.adm_rt, name).default
        return _overloads[schema]


def register_torch_ops():
    """Define every op of the package in ``torch.ops.adm_rt``."""
    for name in ("ada_group_norm", "qkv_attention", "guided_mean_update"):
        register = getattr(importlib.import_module(f"adm_rt.ops.{name}"), "register", None)
        if register is not None:
            register()
