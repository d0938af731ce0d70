"""The rules that several declarations share, each raising ``DeclarationError``."""

from __future__ import annotations

import math
from typing import Any

from gw_celery import errors


def integer(argument: str, value: object, low: int, high: int | None = None) -> int:
    """Return ``value`` when it is an int (not a bool) within ``low..high``."""
    span = f"{low} or more" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise errors.DeclarationError(argument, value, f"must be an int, {span}")
    if value < low or (high is not None and value > high):
        raise errors.DeclarationError(argument, value, f"must be {span}")
    return value


def positive(argument: str, value: Any) -> float:
    """Return ``value`` as a float when it is a finite number (not a bool) over 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # an int of hundreds of digits
        number = math.inf
    if not math.isfinite(number) or number <= 0:
        raise errors.DeclarationError(argument, value, "must be a finite number over 0")
    return number


def optional(argument: str, value: object) -> float | None:
    """As ``positive``, with ``None`` for "no limit"."""
    return None if value is None else positive(argument, value)


def function(argument: str, value: Any) -> Any:
    """Return ``value`` when it is ``None`` or can be called."""
    if value is not None and not callable(value):
        raise errors.DeclarationError(argument, value, "must be a function")
    return value
