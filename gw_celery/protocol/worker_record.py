"""What a worker tells the other workers of its project about itself, and how it is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from gw_celery.protocol import headers, snapshot

#: Of the form of a record; those of other versions are not read.
VERSION = 1
#: Larger ones cannot be true: their sender must not hold up the code that counts with them.
_LARGEST = {float: 1e18, int: 1_000_000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueLoad:
    """What one worker has of a queue, and does of it in a second; in workload."""

    waiting: float = 0.0
    #: ``None`` before it is known.
    rate: float | None = None
    #: Of one input.
    mean: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceRecord:
    """One service in one worker; amounts are workload."""

    #: Sorted and joined: workers that consume the same ones share the demand.
    queues: str = ""
    #: Of the replicas that are READY.
    slots: int = 0
    #: Workload a second of one replica; ``None`` while it is not known.
    score: float | None = None
    #: Taken since the worker started; what it gave back is not in it.
    taken: float = 0.0
    #: Held without a slot, and how many inputs that is.
    waiting: float = 0.0
    waiting_inputs: int = 0
    running_inputs: int = 0
    #: Of one input.
    mean: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The replicas of a worker that follows the load."""

    #: Replicas that it keeps whatever the load.
    least: int = 0
    #: Replicas that it could have now: those that fail to start do not count.
    capacity: int = 1
    #: Replicas that it has, starting and draining ones among them.
    replicas: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """One worker, as the other workers see it."""

    #: Its node name.
    worker: str
    #: One start of a worker, or its life after it was declared lost: the name of the record.
    incarnation: str = ""
    #: ``None`` for a worker of a fixed size.
    size: Size | None = None
    #: By the key of the service; ``""`` is plain tasks.
    services: Mapping[str, ServiceRecord] = dataclasses.field(default_factory=dict)
    #: Of the queues whose callers are told how long an input would wait.
    loads: Mapping[str, QueueLoad] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def serves(self) -> str:
        """All that it serves: replicas are dealt out among workers that serve the same."""
        return ",".join(sorted(self.services))

    def dumps(self) -> str:
        """Return what ``loads`` reads: all but the incarnation, and parts without field names.

        All workers read all records: names would be half of what a thousand of them are sent.
        """
        told = {name: getattr(self, name) for name in _told(WorkerRecord)}
        return json.dumps(
            {"version": VERSION, **told}, separators=(",", ":"), default=dataclasses.astuple
        )


def of(
    worker: snapshot.Worker,
    queues: Mapping[str, Sequence[str]],
    size: Size | None,
    loads: Mapping[str, QueueLoad],
) -> WorkerRecord:
    """Return the record of a worker.

    Args:
        queues: of each service that it serves.
        loads: of the queues whose callers are told.
    """
    services = {}
    for key, names in queues.items():
        counters = worker.tallies.get(key, snapshot.Counters())
        services[key] = ServiceRecord(
            queues=",".join(sorted(names)),
            slots=worker.ready_slots.get(key, 0),
            score=worker.scores.get(key, snapshot.Score()).value,
            # What was given back to its queue comes again from there.
            taken=counters.arrived - counters.given_back,
            waiting=counters.waiting,
            waiting_inputs=counters.waiting_inputs,
            running_inputs=counters.running_inputs,
            mean=counters.mean,
        )
    return WorkerRecord(worker=worker.hostname, size=size, services=services, loads=loads)


def loads(written: str | bytes, incarnation: str = "") -> WorkerRecord:
    """Return the record that was written.

    Args:
        incarnation: under which it was found.

    Raises:
        ValueError: for anything else, such as one of another version.
    """
    told = json.loads(written)
    if not isinstance(told, dict) or told.get("version") != VERSION:
        raise ValueError(f"not a record of version {VERSION}: {written[:100]!r}")
    parts = {name: _read(kind, told.get(name)) for name, kind in _told(WorkerRecord).items()}
    return WorkerRecord(incarnation=incarnation, **parts)


@functools.cache
def _told(cls: type) -> dict[str, Any]:
    """What each field of a record, or of a part of it, is declared to be."""
    hints = typing.get_type_hints(cls)
    return {name: kind for name, kind in hints.items() if name != "incarnation"}


def _read(kind: Any, value: Any) -> Any:
    """Return ``value`` as what its field is declared to be.

    Raises:
        ValueError: when it is anything else, or cannot be true.
    """
    if largest := _LARGEST.get(kind):
        number = headers.finite(value)
        if number is not None and abs(number) <= largest:
            return kind(number)
    elif kind is str and isinstance(value, str):
        return value
    elif isinstance(kind, types.UnionType):
        return None if value is None else _read(kind.__args__[0], value)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, list):
        fields = _told(kind)
        if len(value) >= len(fields):  # a later version may tell more
            values = zip(fields.items(), value, strict=False)
            return kind(**{name: _read(each, part) for (name, each), part in values})
    elif typing.get_origin(kind) is Mapping and isinstance(value, dict):
        return {key: _read(kind.__args__[1], part) for key, part in value.items()}
    raise ValueError(f"not a {kind}: {value!r:.100}")
