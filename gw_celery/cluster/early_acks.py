"""What is known of inputs that were acknowledged early, should their worker be lost.

The broker has forgotten such an input when it begins, so that a worker that is killed would leave
it STARTED for ever. Its replica records it in Redis; a living worker finds the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gw_celery import codec
from gw_celery.transport import find

#: What Celery reads of a request when it stores a failure and tells the callers that wait for it.
_OF_REQUEST = (
    "id",
    "task",
    "root_id",
    "parent_id",
    "group",
    "group_index",
    "ignore_result",
    "correlation_id",
    "reply_to",
    "retries",
    "stamps",
    "stamped_headers",
)
_OF_BODY = ("errbacks", "chord", "chain")
#: Between a lost worker and the number of an input of it, in the records of who took it over.
_OF = "/"


def records_key(backend: Any, start: str) -> str:
    """Return the key of a hash beside the results: what a worker acknowledged early, by number."""
    return f"{find.results_prefix(backend)}gw:early:{start}"


def start_of(incarnation: str) -> str:
    """Return the start of a worker, which has more incarnations when it was taken for lost."""
    return incarnation.rpartition(".")[0]


def node(start: str) -> str:
    """Return the node name of a worker."""
    return start.rpartition(":")[0]


def write(request: Mapping[str, Any], embed: Any) -> bytes:
    """Return the record of an input: who waits for it, not what it was called with.

    Raises:
        SerializationError: for callbacks that gw-json does not know.
    """
    embedded = embed if isinstance(embed, Mapping) else {}
    kept = {name: request.get(name) for name in _OF_REQUEST}
    kept |= {name: embedded.get(name) for name in _OF_BODY}
    return codec.dumps(kept).encode()


def read(record: bytes) -> dict[str, Any]:
    """Return what ``write`` was given.

    Raises:
        ValueError: for anything else.
    """
    found = codec.loads(record)
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise ValueError(f"not the record of an input: {record[:100]!r}")
    return found


def taken_over(worker: str, number: str) -> str:
    """Return the number of a lost worker's input in the records of the worker that took it over."""
    return number if _OF in number else f"{worker}{_OF}{number}"


def lost_worker(number: str) -> str | None:
    """Return whose input was taken over under this number; None for one's own."""
    return number.rpartition(_OF)[0] or None
