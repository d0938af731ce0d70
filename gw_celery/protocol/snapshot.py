"""The one snapshot of a worker that operators see: frozen, cached, JSON-able."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gw_celery.protocol import headers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """One probe of a child and its last answer. Durations are seconds."""

    name: str
    kind: str
    #: ``None`` before the first answer.
    is_ok: bool | None = None
    #: In a row.
    failures: int = 0
    #: It has failed as often as it may, and not passed since.
    is_failing: bool = False
    detail: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replica:
    """One replica: its state and that of the child that fills it. Durations are seconds."""

    number: int
    state: str
    pid: int | None = None
    #: What its ``CUDA_VISIBLE_DEVICES`` lists; empty where it has none of its own.
    devices: tuple[str, ...] = ()
    slots: int = 0
    in_flight: int = 0
    restarts: int = 0
    last_error: str = ""
    seconds_in_state: float = 0.0
    #: From the start of the child until it was READY first; ``None`` before.
    start_up: float | None = None
    #: Until the next child starts, where there is none.
    retry_in: float = 0.0
    #: How late the child's event loop ran at its last heartbeat.
    lag: float = 0.0
    resident_bytes: int = 0
    #: Services that want no inputs here: their readiness probes fail, or have not passed yet.
    unready: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceDemand:
    """Demand of one service attributed to this worker's group."""

    #: Messages in its queues; ``None`` where the broker does not tell.
    queued: int | None = None
    #: Part of the work that is theirs: 1.0 for all of it.
    share: float = 1.0
    #: Workload a second that comes, of that part.
    rate: float = 0.0
    #: Workload that waits, of that part, in the queue and in workers.
    waiting: float = 0.0
    #: Inputs that run, of that part.
    running_inputs: float = 0.0
    #: Workload a second of one replica; ``None`` while it is not known.
    score: float | None = None
    #: Replicas that this needs now.
    need: float = 0.0
    #: Replicas that its bursts would need if they came again.
    keep: float = 0.0
    #: Whether anything came, waits or runs.
    is_active: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """What the autoscaler of a worker saw and decided last, in replicas."""

    least: int
    most: int
    #: This worker's, after the decision.
    desired: int = 0
    #: Those that it has, starting and failing ones among them.
    actual: int = 0
    #: What all workers that serve the same should have together, and how many workers that are.
    total: int = 0
    workers: int = 1
    why: str = ""
    #: Seconds from the start of a replica until it is ready, from experience.
    start_up: float | None = None
    #: By service; ``""`` for plain tasks. Empty while the broker cannot be read.
    services: Mapping[str, ServiceDemand] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What the benchmark of one task gave. Durations are seconds."""

    task: str
    #: Workload per second in the median round, the slowest and the quickest.
    value: float
    least: float
    most: float
    #: The throughput of each round, in their order.
    rounds: tuple[float, ...]
    success_rate: float
    #: Latencies of its inputs.
    p50: float
    p95: float
    #: What the first input raised that failed; "" where none did.
    failure: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(TaskScore):
    """The latest score of one task, of whichever replica, with its first 100 rounds."""

    #: Since it was measured.
    age: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What one replica does of one service in a second, in workload; ``None``: not known yet."""

    #: What the worker goes by.
    value: float | None = None
    #: What benchmarks say.
    measured: float | None = None
    #: What full replicas served.
    served: float | None = None
    #: By what share ``served`` is over, or under, ``measured``.
    drift: float | None = None
    benchmarks: tuple[Benchmark, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counters:
    """The inputs of one service in one worker, as workload and as a count.

    At any time ``arrived = waiting + running + served + given_back``. ``arrived``, ``served`` and
    ``given_back`` only ever grow, from the start of the worker.
    """

    arrived: float = 0.0
    #: Answered after it ran: a value, a failure, or a retry.
    served: float = 0.0
    #: Those of them that gave no value, refused ones included.
    failed: float = 0.0
    #: Those that had waited for too long, and never began.
    refused_inputs: int = 0
    refused: float = 0.0
    #: In the worker, without a slot.
    waiting: float = 0.0
    #: In a child, unanswered.
    running: float = 0.0
    #: The rest: lost, revoked, expired, or the broker's again.
    given_back: float = 0.0
    arrived_inputs: int = 0
    served_inputs: int = 0
    waiting_inputs: int = 0
    running_inputs: int = 0
    given_back_inputs: int = 0
    #: Of one input, the newest counting most.
    mean: float = headers.DEFAULT_WORKLOAD
    #: Seconds that what was served had a slot, all added up.
    busy: float = 0.0


def mean_workload(services: Iterable[Counters]) -> float:
    """Return the mean workload of an input of several services."""
    listed = list(services)
    if not (inputs := sum(counters.arrived_inputs for counters in listed)):
        return headers.DEFAULT_WORKLOAD
    return sum(counters.mean * counters.arrived_inputs for counters in listed) / inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
    """One worker: its replicas, and what waits in it for a slot.

    Services are told by their keys; ``""`` is plain tasks.
    """

    hostname: str
    replicas: tuple[Replica, ...] = ()
    #: Replicas, and slots, that were asked for; it may have more, or fewer, at this moment.
    desired: int = 0
    desired_slots: int = 0
    #: Slots of the replicas that are READY, by service.
    ready_slots: dict[str, int] = dataclasses.field(default_factory=dict)
    #: Inputs that this worker has taken and that wait for a slot.
    waiting: int = 0
    #: The same by service, without those that must run alone.
    waiting_inputs: dict[str, int] = dataclasses.field(default_factory=dict)
    #: What each service has been given and has done since the worker started.
    tallies: dict[str, Counters] = dataclasses.field(default_factory=dict)
    #: Queues that are consumed now, and those that wait until a replica is ready.
    open_queues: tuple[str, ...] = ()
    closed_queues: tuple[str, ...] = ()
    #: How quick it is beside the other workers, by service: "quick", "middle" or "slow"; empty
    #: where the broker makes nothing of it.
    bands: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Why results cannot be stored, so that nothing is consumed; "" while they can.
    outage: str = ""
    #: What the autoscaler saw and decided; ``None`` for a worker of a fixed size.
    scaling: Scaling | None = None
    #: Scores by service.
    scores: dict[str, Score] = dataclasses.field(default_factory=dict)
    #: It takes nothing new and ends.
    is_stopping: bool = False

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Source(Protocol):
    """A pool, for those that only read it: the gate, the autoscaler, what other workers learn."""

    def snapshot(self) -> Worker:
        """Return the worker as it is now.

        It waits while the pool handles what children reported: call it in the thread of the
        worker's loop, or in one that may wait. What it returns does not change.
        """
