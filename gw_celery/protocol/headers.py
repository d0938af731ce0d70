"""What a caller says of an input in its headers, for workers that never decode its body."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

#: The parameter values of a class task, as canonical JSON.
PARAMETERS = "gw_params"
#: The cost of the input, as its ``workload_calculator`` says.
WORKLOAD = "gw-workload"
#: When the input could begin at the earliest, in seconds of the sender's wall clock.
ENQUEUED = "gw-enqueued"
#: Carried by a dead letter that was sent again: the deaths that it has caused do not count.
REQUEUED = "gw-requeued"

#: The cost of an input of which no more is known.
DEFAULT_WORKLOAD = 1.0
#: A larger one counts as unknown: beside it, a sum would lose all others, or overflow.
MOST_WORKLOAD = 1e12


def finite(value: object) -> float | None:
    """Return ``value``, which others may have written, as a float; ``None`` if it is no number.

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


def workload(value: object) -> float | None:
    """Return ``value`` as a workload; ``None`` for anything but a number from 0 to the most."""
    number = finite(value)
    return number if number is not None and 0 <= number <= MOST_WORKLOAD else None


def workload_of(request: Mapping[str, Any]) -> float:
    """Return the workload that a message carries; anything odd, or nothing, counts as 1.0."""
    found = workload(request.get(WORKLOAD))
    return DEFAULT_WORKLOAD if found is None else found


def waited(request: Mapping[str, Any], now: float) -> float:
    """Return for how many seconds an input has waited; 0.0 when it does not say since when.

    One that was enqueued in the future was sent by a machine whose clock is ahead.
    """
    since = finite(request.get(ENQUEUED))
    return 0.0 if since is None else max(0.0, now - since)
