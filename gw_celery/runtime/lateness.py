"""Since when an input waits: its sender says it in wall-clock time, as with ``expires``."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping
from typing import Any

from celery.utils.time import maybe_iso8601, maybe_make_aware

from gw_celery import errors
from gw_celery.protocol import headers


def stamp(app: Any, countdown: Any, eta: Any) -> float:
    """Return since when an input that is sent now waits: from its ETA on, where it has one.

    What Celery will refuse counts as no ETA.
    """
    now = time.time()
    try:
        if countdown:
            return now + max(0.0, float(countdown))
        if eta:
            at: dt.datetime = maybe_make_aware(maybe_iso8601(eta), app.timezone)
            return max(now, at.timestamp())
    except (TypeError, ValueError, AttributeError, OverflowError):
        return now
    return now


def waited(request: Mapping[str, Any]) -> float:
    """Return for how many seconds an input has waited to start.

    One that the broker delivers again may have run meanwhile, so that nobody can say.
    """
    delivery = request.get("delivery_info") or {}
    if delivery.get("redelivered") or request.get("x-delivery-count"):
        return 0.0
    return headers.waited(request, time.time())


def refusal(name: str, request: Mapping[str, Any], limit: float) -> errors.QueueTimeExceeded | None:
    """Return why an input must not begin that has waited for longer than ``limit``, if it has."""
    seconds = waited(request)
    if seconds <= limit:
        return None
    queue = (request.get("delivery_info") or {}).get("routing_key") or ""
    return errors.QueueTimeExceeded(name, str(queue), limit, seconds, True)
