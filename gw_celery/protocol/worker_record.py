"""The record by which a worker informs the other workers of its project, and its JSON form."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from gw_celery.protocol import headers, snapshot

#: Version of the record's form; records of other versions are ignored.
VERSION = 1
#: Maximum values; larger ones are rejected, because they could block the code that uses them.
_LARGEST = {float: 1e18, int: 1_000_000}
#: Fields that only the reader sets.
_NOT_TOLD = ("incarnation", "unreadable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueLoad:
    """The load of one queue in one worker, in workload."""

    waiting: float = 0.0
    #: Workload per second; ``None`` if unknown.
    rate: float | None = None
    #: Mean workload of one input.
    mean: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceRecord:
    """One service in one worker; amounts are workload."""

    #: Names, sorted and joined; workers with the same queues share the demand.
    queues: str = ""
    #: Slots of READY replicas.
    slots: int = 0
    #: Workload per second of one replica; ``None`` if unknown.
    score: float | None = None
    #: Taken since the worker started, without inputs that were given back.
    taken: float = 0.0
    #: Held without a slot, and the number of these inputs.
    waiting: float = 0.0
    waiting_inputs: int = 0
    running_inputs: int = 0
    #: Mean workload of one input.
    mean: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The replicas of a worker whose size follows the load."""

    #: Replicas that it keeps at any load.
    least: int = 0
    #: Replicas that it could have now, without those that fail to start.
    capacity: int = 1
    #: Current replicas, including starting and draining ones.
    replicas: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """One worker, for the other workers."""

    #: Node name.
    worker: str
    #: Incarnation, the name of the record: it changes at a start, and after being declared lost.
    incarnation: str = ""
    #: ``None`` for a worker of a fixed size.
    size: Size | None = None
    #: By service key; ``""`` is plain tasks.
    services: Mapping[str, ServiceRecord] = dataclasses.field(default_factory=dict)
    #: Loads of the queues with published waits.
    loads: Mapping[str, QueueLoad] = dataclasses.field(default_factory=dict)
    #: The keys of ``services`` and ``loads`` that are left out, because they cannot be read.
    unreadable: tuple[str, ...] = ()

    @functools.cached_property
    def serves(self) -> str:
        """The keys of all its services; replicas are shared among workers with the same keys."""
        return ",".join(sorted(self.services))

    def dumps(self) -> str:
        """Return the record as JSON for ``loads``, without the incarnation.

        Its parts have no field names, because all workers read all records: with a thousand
        workers, names would be half of the traffic.
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
        worker: its snapshot.
        queues: the queues of each service.
        size: its size, if it follows the load.
        loads: the loads of queues with published waits.
    """
    services = {}
    for key, names in queues.items():
        counters = worker.tallies.get(key, snapshot.Counters())
        services[key] = ServiceRecord(
            queues=",".join(sorted(names)),
            slots=worker.ready_slots.get(key, 0),
            score=worker.scores.get(key, snapshot.Score()).value,
            # Inputs that were given back come again from the queue.
            taken=counters.arrived - counters.given_back,
            waiting=counters.waiting,
            waiting_inputs=counters.waiting_inputs,
            running_inputs=counters.running_inputs,
            mean=counters.mean,
        )
    return WorkerRecord(worker=worker.hostname, size=size, services=services, loads=loads)


def loads(written: str | bytes, incarnation: str = "") -> WorkerRecord:
    """Return a record from its JSON, without the services and queues that cannot be read.

    Args:
        written: the JSON.
        incarnation: the name under which it was found.

    Raises:
        ValueError: if it is not a record of this version.
    """
    told = json.loads(written)
    if not isinstance(told, dict) or told.get("version") != VERSION:
        raise ValueError(f"not a record of version {VERSION}: {written[:100]!r}")
    parts: dict[str, Any] = {}
    unreadable: list[str] = []
    for name, kind in _told(WorkerRecord).items():
        if typing.get_origin(kind) is Mapping:
            parts[name] = _read_all(kind.__args__[1], told.get(name), unreadable)
        else:
            parts[name] = _read(kind, told.get(name))
    return WorkerRecord(incarnation=incarnation, unreadable=tuple(unreadable), **parts)


def _read_all(kind: Any, values: Any, unreadable: list[str]) -> dict[str, Any]:
    """Return the readable ones of ``values``; add the keys of the others to ``unreadable``."""
    if not isinstance(values, dict):
        raise ValueError(f"not a {kind} by name: {values!r:.100}")
    read = {}
    for key, value in values.items():
        try:
            read[key] = _read(kind, value)
        except ValueError:
            unreadable.append(key)
    return read


@functools.cache
def _told(cls: type) -> dict[str, Any]:
    """Return the declared type of each field of a record or part."""
    hints = typing.get_type_hints(cls)
    return {name: kind for name, kind in hints.items() if name not in _NOT_TOLD}


def _read(kind: Any, value: Any) -> Any:
    """Return ``value`` as the declared type of its field.

    Raises:
        ValueError: if it has another type, or is too large.
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
        if len(value) >= len(fields):  # a later version may have more fields
            values = zip(fields.items(), value, strict=False)
            return kind(**{name: _read(each, part) for (name, each), part in values})
    raise ValueError(f"not a {kind}: {value!r:.100}")
