"""What a worker tells the other workers of its project about itself, and how it is written."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from gw_celery.protocol import snapshot, untrusted

#: Of the form of a record; those of other versions are not read.
VERSION = 1

_Part = TypeVar("_Part", "ServiceRecord", "QueueLoad", "Size")


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
        told = {
            "version": VERSION,
            "worker": self.worker,
            "size": None if self.size is None else _values(self.size),
            "services": {key: _values(part) for key, part in self.services.items()},
            "loads": {queue: _values(part) for queue, part in self.loads.items()},
        }
        return json.dumps(told, separators=(",", ":"))


def of(
    worker: snapshot.Worker,
    queues: Mapping[str, str],
    size: Size | None,
    loads: Mapping[str, QueueLoad],
) -> WorkerRecord:
    """Return the record of a worker.

    Args:
        queues: of each service that it serves.
        loads: of the queues whose callers are told.
    """
    return WorkerRecord(
        worker=worker.hostname,
        size=size,
        services={key: _service(worker, key, names) for key, names in queues.items()},
        loads=loads,
    )


def _service(worker: snapshot.Worker, key: str, queues: str) -> ServiceRecord:
    counters = worker.tallies.get(key, snapshot.Counters())
    return ServiceRecord(
        queues=queues,
        slots=worker.ready_slots.get(key, 0),
        score=worker.scores.get(key, snapshot.Score()).value,
        # What was given back to its queue comes again from there.
        taken=counters.arrived - counters.given_back,
        waiting=counters.waiting,
        waiting_inputs=counters.waiting_inputs,
        running_inputs=counters.running_inputs,
        mean=counters.mean,
    )


def loads(written: str | bytes, incarnation: str = "") -> WorkerRecord:
    """Return the record that was written.

    Args:
        incarnation: under which it was found.

    Raises:
        ValueError: for anything else, such as one of another version.
    """
    told = _mapping(json.loads(written))
    if told.get("version") != VERSION:
        raise ValueError(f"not a record of version {VERSION}: {written[:100]!r}")
    size, services, loads = told.get("size"), told.get("services"), told.get("loads")
    return WorkerRecord(
        worker=_name(told.get("worker")),
        incarnation=incarnation,
        size=None if size is None else _read(Size, size),
        services={key: _read(ServiceRecord, part) for key, part in _mapping(services).items()},
        loads={queue: _read(QueueLoad, part) for queue, part in _mapping(loads).items()},
    )


def _values(part: Any) -> list[Any]:
    return [getattr(part, field.name) for field in dataclasses.fields(part)]


def _read(cls: type[_Part], told: Any) -> _Part:
    """Return a part from the values of its fields; a later one may tell more of them."""
    fields = dataclasses.fields(cls)
    if not isinstance(told, list) or len(told) < len(fields):
        raise ValueError(f"not a {cls.__name__}: {told!r:.100}")
    values = zip(fields, told, strict=False)
    return cls(**{field.name: _READERS[field.type](value) for field, value in values})


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"not a mapping: {value!r:.100}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not a name: {value!r:.100}")
    return value


#: By the annotation of a field, which is a string.
_READERS: Mapping[Any, Any] = {
    "str": _name,
    "int": untrusted.count,
    "float": untrusted.amount,
    "float | None": lambda value: None if value is None else untrusted.amount(value),
}
