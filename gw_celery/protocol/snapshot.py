"""The snapshot of a worker that its parent takes for operators: frozen, convertible to JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gw_celery.protocol import headers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A probe of a child, and its last answer. Durations are in seconds."""

    name: str
    kind: str
    #: ``None`` before the first answer.
    is_ok: bool | None = None
    #: Consecutive failures.
    failures: int = 0
    #: Whether it has reached its allowed failures, and not passed since.
    is_failing: bool = False
    detail: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replica:
    """A replica, and the child that fills it. Durations are in seconds."""

    number: int
    state: str
    pid: int | None = None
    #: The entries of its ``CUDA_VISIBLE_DEVICES``; empty without devices of its own.
    devices: tuple[str, ...] = ()
    slots: int = 0
    in_flight: int = 0
    restarts: int = 0
    last_error: str = ""
    seconds_in_state: float = 0.0
    #: From the start of the child to its first READY; ``None`` before.
    start_up: float | None = None
    #: Time until the next child starts, if there is none.
    retry_in: float = 0.0
    #: Lateness of the child's event loop at its last heartbeat.
    lag: float = 0.0
    resident_bytes: int = 0
    #: Services that take no inputs here: a readiness probe fails, or has not passed yet.
    unready: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceDemand:
    """Demand of one service attributed to this worker's group."""

    #: Messages in its queues; ``None`` if the broker does not report them.
    queued: int | None = None
    #: The group's share of the work, 1.0 for all of it.
    share: float = 1.0
    #: Arriving workload per second, of that share.
    rate: float = 0.0
    #: Waiting workload in the queue and in workers, of that share.
    waiting: float = 0.0
    #: Running inputs, of that share.
    running_inputs: float = 0.0
    #: Workload per second of one replica; ``None`` if unknown.
    score: float | None = None
    #: Replicas needed now.
    need: float = 0.0
    #: Replicas that a repetition of the recent bursts would need.
    keep: float = 0.0
    #: Whether anything arrives, waits or runs.
    is_active: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """The last observation and decision of a worker's autoscaler, in replicas."""

    least: int
    most: int
    #: Of this worker, after the decision.
    desired: int = 0
    #: Of this worker now, including starting and failing ones.
    actual: int = 0
    #: Desired replicas of all workers that serve the same, and the number of these workers.
    total: int = 0
    workers: int = 1
    why: str = ""
    #: Mean seconds from the start of a replica until it is READY; ``None`` if unknown.
    start_up: float | None = None
    #: By service; ``""`` is plain tasks. Empty while the broker cannot be read.
    services: Mapping[str, ServiceDemand] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The result of the benchmark of one task. Durations are in seconds."""

    task: str
    #: Workload per second of the median round, the slowest and the fastest.
    value: float
    least: float
    most: float
    #: The throughput of each round, in their order.
    rounds: tuple[float, ...]
    success_rate: float
    #: Latencies of its inputs.
    p50: float
    p95: float
    #: The exception of the first failed input; "" without failures.
    failure: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(TaskScore):
    """The latest score of one task, from any replica, with its first 100 rounds."""

    #: Seconds since the measurement.
    age: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one service: workload per second of one replica; ``None`` if unknown."""

    #: The score that the worker uses.
    value: float | None = None
    #: The score by benchmarks.
    measured: float | None = None
    #: The score by what full replicas served.
    served: float | None = None
    #: Relative difference of ``served`` from ``measured``.
    drift: float | None = None
    benchmarks: tuple[Benchmark, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counters:
    """The inputs of one service in one worker, as workload and as a number of inputs.

    ``arrived = waiting + running + served + given_back`` at any time. ``arrived``, ``served`` and
    ``given_back`` only grow, from the start of the worker.
    """

    arrived: float = 0.0
    #: Answered after running: a value, a failure, or a retry.
    served: float = 0.0
    #: The part of ``served`` without a value, including refused inputs.
    failed: float = 0.0
    #: The part of ``failed`` that had waited too long, and did not begin.
    refused_inputs: int = 0
    refused: float = 0.0
    #: In the worker, without a slot.
    waiting: float = 0.0
    #: In a child, without an answer.
    running: float = 0.0
    #: The others: lost, revoked, expired, or returned to the broker.
    given_back: float = 0.0
    arrived_inputs: int = 0
    served_inputs: int = 0
    waiting_inputs: int = 0
    running_inputs: int = 0
    given_back_inputs: int = 0
    #: Moving average of the workload of one input.
    mean: float = headers.DEFAULT_WORKLOAD
    #: Total seconds for which served inputs held a slot.
    busy: float = 0.0


def mean_workload(services: Iterable[Counters]) -> float:
    listed = list(services)
    if not (inputs := sum(counters.arrived_inputs for counters in listed)):
        return headers.DEFAULT_WORKLOAD
    return sum(counters.mean * counters.arrived_inputs for counters in listed) / inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
    """One worker: its replicas, and its inputs by service.

    Services are identified by their keys; ``""`` is plain tasks.
    """

    hostname: str
    replicas: tuple[Replica, ...] = ()
    #: Requested replicas and slots; the actual numbers may differ now.
    desired: int = 0
    desired_slots: int = 0
    #: Slots of READY replicas, by service.
    ready_slots: dict[str, int] = dataclasses.field(default_factory=dict)
    #: Number of inputs in this worker that wait for a slot.
    waiting: int = 0
    #: The same by service, without inputs that must run alone.
    waiting_inputs: dict[str, int] = dataclasses.field(default_factory=dict)
    #: The counters of each service since the worker started.
    tallies: dict[str, Counters] = dataclasses.field(default_factory=dict)
    #: Queues that are consumed now, and queues that wait for a READY replica.
    open_queues: tuple[str, ...] = ()
    closed_queues: tuple[str, ...] = ()
    #: Speed band of this worker by service: "quick", "middle" or "slow"; empty if the broker has no
    #: consumer priorities.
    bands: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Why results cannot be stored, and nothing is consumed; "" otherwise.
    outage: str = ""
    #: Why the broker gives no messages, or no input may start; "" otherwise.
    broker_outage: str = ""
    #: Observation and decision of the autoscaler; ``None`` for a worker of a fixed size.
    scaling: Scaling | None = None
    #: Scores by service.
    scores: dict[str, Score] = dataclasses.field(default_factory=dict)
    #: Whether it takes no new inputs and ends.
    is_stopping: bool = False

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Source(Protocol):
    """The pool, for its readers: the gate, the autoscaler, the worker's record."""

    def snapshot(self) -> Worker:
        """Return the current state of the worker, which does not change afterwards.

        It waits while the pool processes reports: call it in the thread of the worker's loop, or in
        one that may wait.
        """
