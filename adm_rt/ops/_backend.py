"""Which implementation the ops use: the compiled kernels (default) or ``reference.py``."""

import contextlib
import contextvars

_reference_forced = contextvars.ContextVar("adm_rt_reference_forced", default=False)


def reference_forced():
    """True inside ``use_reference()``."""
    return _reference_forced.get()


@contextlib.contextmanager
def use_reference():
    """Within this context every op runs ``adm_rt.ops.reference`` instead of the kernels."""
    token = _reference_forced.set(True)
    try:
        yield
    finally:
        _reference_forced.reset(token)
