"""Validate untrusted numbers: of a message, a file, or a Redis that others may write to."""

from __future__ import annotations

import math
import numbers

#: Larger ones cannot be true: their sender must not hold up the code that counts with them.
_LARGEST = 1e18
_MOST = 1_000_000


def finite(value: object) -> float | None:
    """Return ``value`` as a float; ``None`` for anything but a finite real number.

    A bool is none. Nor is an int of hundreds of digits, which JSON may hold and no float can:
    ``math.isfinite`` would raise.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def amount(value: object) -> float:
    """Return ``value`` as a float.

    Raises:
        ValueError: for anything but a number that can be true.
    """
    number = finite(value)
    if number is None or abs(number) > _LARGEST:
        raise ValueError(f"not a number that can be true: {value!r:.100}")
    return number


def count(value: object) -> int:
    """Return ``value`` as a number of things.

    Raises:
        ValueError: for anything else, or more than there can be.
    """
    if (number := amount(value)) > _MOST:
        raise ValueError(f"more than there can be: {number:.0f}")
    return int(number)
