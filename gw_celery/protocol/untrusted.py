"""Numbers that somebody else wrote: into a message, a file, or a Redis that others may write to."""

from __future__ import annotations

import math
import numbers


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
