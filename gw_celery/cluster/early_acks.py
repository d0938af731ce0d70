"""What is known of inputs that were acknowledged early, should their worker be lost.

The broker has forgotten such an input when it begins, so that a worker that is killed would leave
it STARTED for ever. Its replica records it in Redis; a living worker finds the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from kombu.utils.encoding import bytes_to_str

from gw_celery.codec import envelope

#: What Celery reads of a request when it stores a failure and tells those who wait for it.
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


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys in Redis; ``prefix`` is the result backend's own.

    A worker's name here is its node name and a number of its own, so that a worker that is started
    again under the same name is another one.
    """

    prefix: str

    @classmethod
    def of(cls, backend: Any) -> Keys:
        """Return those beside the results of a Redis backend."""
        return cls(bytes_to_str(backend.task_keyprefix).removesuffix(type(backend).task_keyprefix))

    @property
    def workers(self) -> str:
        """A set of the workers that may have records."""
        return f"{self.prefix}gw:workers"

    def beat(self, worker: str) -> str:
        """A key that is there while the worker lives."""
        return f"{self.prefix}gw:beat:{worker}"

    def records(self, worker: str) -> str:
        """A hash of what the worker acknowledged early and has not answered, by number."""
        return f"{self.prefix}gw:early:{worker}"


def node(worker: str) -> str:
    """Return the node name of a worker."""
    return worker.rpartition(":")[0]


def write(request: Mapping[str, Any], embed: Any) -> bytes:
    """Return the record of an input: who waits for it, not what it was called with.

    Raises:
        SerializationError: for callbacks that gw-json does not know.
    """
    embedded = embed if isinstance(embed, Mapping) else {}
    kept = {name: request.get(name) for name in _OF_REQUEST}
    kept |= {name: embedded.get(name) for name in _OF_BODY}
    return envelope.dumps(kept).encode()


def read(record: bytes) -> dict[str, Any]:
    """Return what ``write`` was given.

    Raises:
        ValueError: for anything else.
    """
    found = envelope.loads(record)
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise ValueError(f"not the record of an input: {record[:100]!r}")
    return found


def taken_over(worker: str, number: str) -> str:
    """Return the number of a lost worker's input in the records of the worker that took it over."""
    return number if _OF in number else f"{worker}{_OF}{number}"


def lost_worker(number: str) -> str | None:
    """Return whose input was taken over under this number; None for one's own."""
    return number.rpartition(_OF)[0] or None


class Watch:
    """Decides which workers are lost: those without a sign of life for long enough.

    A key that expired is not enough: after Redis itself was away all of them have.

    Args:
        patience: seconds without a sign of life, while Redis answers, after which a worker is lost.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._silent_since: dict[str, float] = {}
        self._seen_at: float | None = None

    def lost(self, workers: Iterable[str], beating: Iterable[str], now: float) -> list[str]:
        """Return the lost ones among ``workers``, which is all that there are."""
        if self._seen_at is not None and now - self._seen_at > self._patience:
            self._silent_since.clear()  # nobody has looked for so long: begin anew
        self._seen_at = now
        silent = set(workers) - set(beating)
        self._silent_since = {one: self._silent_since.get(one, now) for one in silent}
        return sorted(
            one for one, since in self._silent_since.items() if now - since >= self._patience
        )
