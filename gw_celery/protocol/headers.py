"""The headers of an input's message, which callers write and workers read without the body."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

#: The parameter values of a class task, as canonical JSON.
PARAMETERS = "gw_params"
#: The workload of the input, from its ``workload_calculator``.
WORKLOAD = "gw-workload"
#: The earliest time at which the input could begin, in Unix seconds of the sender's clock.
ENQUEUED = "gw-enqueued"
#: Marks a dead letter that was sent again: its earlier deaths do not count.
REQUEUED = "gw-requeued"
#: Number of workers that were declared lost while they held the message.
DELIVERIES = "gw-deliveries"

#: The workload of an input without a valid header.
DEFAULT_WORKLOAD = 1.0
#: Maximum workload; a larger one is ignored, because sums would lose precision or overflow.
MOST_WORKLOAD = 1e12

#: The name of a hold, in the place of the delivery tag: the incarnation of the worker that took the
#: message, and a number.
_HOLD = re.compile(r".+/[0-9]+", re.DOTALL)


def finite(value: object) -> float | None:
    """Return an untrusted ``value`` as a float; ``None`` if it is not a finite number.

    A bool is not a number. An int of hundreds of digits is not either: JSON allows it, but
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
    """Return ``value`` as a workload; ``None`` if it is not a number from 0 to the maximum."""
    number = finite(value)
    return number if number is not None and 0 <= number <= MOST_WORKLOAD else None


def workload_of(request: Mapping[str, Any]) -> float:
    """Return the workload of a message; 1.0 if it has none, or an invalid one."""
    found = workload(request.get(WORKLOAD))
    return DEFAULT_WORKLOAD if found is None else found


def waited(request: Mapping[str, Any], now: float) -> float:
    """Return the seconds for which an input has waited; 0.0 if its header does not say.

    A time in the future comes from a sender whose clock is ahead, and counts as 0.0.
    """
    since = finite(request.get(ENQUEUED))
    return 0.0 if since is None else max(0.0, now - since)


def hold_of(request: Any) -> str | None:
    """Return the name of the hold of an input's message; ``None`` if its broker has no holds.

    Args:
        request: the mapping of the request, or Celery's ``Context`` of it. Celery also stores
            failures with other objects, or without any: such an input has not run.
    """
    properties = request.get("properties") if hasattr(request, "get") else None
    tag = properties.get("delivery_tag") if isinstance(properties, Mapping) else None
    return tag if isinstance(tag, str) and _HOLD.fullmatch(tag) else None


def incarnation_of(hold: str) -> str:
    return hold.rpartition("/")[0]
