"""How long an input has waited, and until when its answer is wanted, in its sender's wall clock."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping
from typing import Any

from celery.utils.time import maybe_iso8601, maybe_make_aware

from gw_celery import errors
from gw_celery.protocol import headers


def expiry(app: Any, request: Any) -> dt.datetime | None:
    """Return when an input expires, as Celery reads it in the parent; ``None`` for never."""
    given = request.get("expires")
    if not given:
        return None
    expires: dt.datetime = maybe_make_aware(maybe_iso8601(given), app.timezone)
    return expires


def has_expired(expires: dt.datetime | None) -> bool:
    return expires is not None and dt.datetime.now(expires.tzinfo) > expires


def waited(request: Mapping[str, Any]) -> float:
    """Return for how many seconds an input has waited to start.

    One that the broker delivers again may have run meanwhile, so that it cannot be said.
    """
    delivery = request.get("delivery_info") or {}
    if delivery.get("redelivered") or request.get("x-delivery-count"):
        return 0.0
    return headers.waited(request, time.time())


def rejection(
    name: str, request: Mapping[str, Any], limit: float
) -> errors.QueueTimeExceeded | None:
    """Return why an input must not begin that has waited for longer than ``limit``, if it has."""
    seconds = waited(request)
    if seconds <= limit:
        return None
    queue = (request.get("delivery_info") or {}).get("routing_key") or ""
    return errors.QueueTimeExceeded(name, str(queue), limit, seconds, True)
