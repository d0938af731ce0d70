"""Until when the answer to an input is wanted: its sender says it in wall-clock time."""

from __future__ import annotations

import datetime as dt
from typing import Any

from celery.utils.time import maybe_iso8601, maybe_make_aware


def of(app: Any, request: Any) -> dt.datetime | None:
    """Return when an input expires, as Celery reads it in the parent; ``None`` for never."""
    given = request.get("expires")
    if not given:
        return None
    expires: dt.datetime = maybe_make_aware(maybe_iso8601(given), app.timezone)
    return expires


def has_passed(expires: dt.datetime | None) -> bool:
    return expires is not None and dt.datetime.now(expires.tzinfo) > expires
