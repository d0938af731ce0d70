"""A dead letter: a message that was given up, with why, and the way back to its queue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kombu import compression

from gw_celery.protocol import headers

_ADDED = "gw-dead-"
REASON, SINCE, WORKER = f"{_ADDED}reason", f"{_ADDED}since", f"{_ADDED}worker"
DEATHS, EXCHANGE, ROUTING_KEY = f"{_ADDED}deaths", f"{_ADDED}exchange", f"{_ADDED}routing-key"
#: Carried by a message that was sent again: its deaths so far do not count.
REQUEUED = "gw-requeued"
#: Written by the broker, which would read them as the history of the new message.
_BROKERS = ("x-death", "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason")
_COUNTED = ("x-delivery-count", "x-acquired-count")
#: What does not count any more; one that lay here for days has not been late for that long.
_PAST = {*_BROKERS, *_COUNTED, headers.ENQUEUED}
#: What a sender chooses. Not ``expiration``, by which the broker would drop the letter, nor
#: ``user_id``, which it compares with who publishes.
_PROPERTIES = (
    "app_id",
    "cluster_id",
    "correlation_id",
    "delivery_mode",
    "message_id",
    "priority",
    "reply_to",
    "timestamp",
    "type",
)
_LONGEST_REASON = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
    """Why a message was given up, when (ISO 8601), by which worker, after how many deaths."""

    reason: str
    since: str
    worker: str
    deaths: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letter:
    """A message as its sender wrote it, and what was added when it was given up."""

    body: Any
    content_type: str | None
    content_encoding: str | None
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]

    @property
    def task_id(self) -> str:
        return str(self.headers.get("id"))

    @property
    def task(self) -> str:
        return str(self.headers.get("task"))

    @property
    def exchange(self) -> str:
        return str(self.headers.get(EXCHANGE) or "")

    @property
    def routing_key(self) -> str:
        """Of its queue; with the default exchange, the name of it."""
        return str(self.headers.get(ROUTING_KEY) or "")

    def summary(self) -> dict[str, Any]:
        """What a person sees of it in a list."""
        return {
            "id": self.task_id,
            "task": self.task,
            "queue": self.routing_key,
            "deaths": self.headers.get(DEATHS),
            "since": self.headers.get(SINCE),
            "worker": self.headers.get(WORKER),
            "reason": self.headers.get(REASON),
        }


def read(message: Any) -> Letter:
    """Return kombu's ``message`` as it was sent: kombu has decompressed its body."""
    body, method = message.body, message.headers.get("compression")
    if method:
        body, _ = compression.compress(body, method)
    properties = message.properties
    return Letter(
        body=body,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=dict(message.headers),
        properties={name: properties[name] for name in _PROPERTIES if name in properties},
    )


def bury(message: Any, death: Death) -> Letter:
    """Return the dead letter of a message that is given up."""
    letter, delivery = read(message), message.delivery_info or {}
    added = {
        REASON: death.reason[:_LONGEST_REASON],
        SINCE: death.since,
        WORKER: death.worker,
        DEATHS: death.deaths,
        EXCHANGE: delivery.get("exchange") or "",
        ROUTING_KEY: delivery.get("routing_key") or "",
    }
    return dataclasses.replace(letter, headers={**letter.headers, **added})


def revive(letter: Letter) -> Letter:
    """Return the message to send again: what was added is gone, and no death counts."""
    kept = {
        name: value
        for name, value in letter.headers.items()
        if not name.startswith(_ADDED) and name not in _PAST
    }
    return dataclasses.replace(letter, headers={**kept, REQUEUED: True})
