"""Checks of arguments that several data sets share."""

from __future__ import annotations

import operator

import numpy as np


def check_integer(name: str, value, low: int, high: int) -> int:
    """value as an int in [low, high]; TypeError and ValueError name the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, (bool, np.bool_)) or not low <= number <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return number


def check_flag(name, value) -> bool:
    """value as a bool; TypeError names the argument."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)
