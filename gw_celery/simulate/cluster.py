"""A queue and its replicas, event by event: what a policy is played against.

One queue, first come, first served; a replica runs one input at a time. Replicas cost from their
start; one that goes ends its input first. Whoever decides sees what a worker can know: how much
waits and runs, and what was served, never the workload of what still waits.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Sequence
from typing import Protocol

from gw_celery.simulate import trace as traces

#: Inputs over which the mean workload is taken.
REMEMBERED = 100


@dataclasses.dataclass(slots=True)
class Facts:
    """What is known of the queue at a moment."""

    #: Inputs that were sent, and those of them that wait, run, or were turned away.
    arrived: int = 0
    waiting: int = 0
    running: int = 0
    refused: int = 0
    #: Mean workload of the latest inputs that ran.
    mean: float = 1.0
    #: Replicas of all nodes: starting, ready and draining.
    actual: int = 0


class Scaler(Protocol):
    """One node's part of a policy, asked once a second and, if it wants, at each arrival."""

    on_arrival: bool

    def desired(self, now: float, facts: Facts) -> int:
        """The replicas that this node should have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """What replicas are like, and how many there can be."""

    score: float
    start_up: float
    #: Ready when the trace begins.
    initial: int
    #: Room on each node; a draining replica takes it up.
    room: int
    queue_limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Moment:
    """The cluster at one second, for a plot."""

    at: float
    arrived: int
    waiting: int
    desired: int
    actual: int


@dataclasses.dataclass
class Played:
    """What came of it."""

    #: How long each input waited, in the order of arrival; ``None`` for one that was turned away.
    waits: list[float | None]
    replica_seconds: float = 0.0
    starts: int = 0
    end: float = 0.0
    moments: list[Moment] = dataclasses.field(default_factory=list)


class Start:
    """A replica that starts."""

    __slots__ = ("is_wanted",)

    def __init__(self) -> None:
        self.is_wanted = True


class Node:
    """The replicas of one worker."""

    __slots__ = ("draining", "idle", "live", "stale", "starting", "wanted")

    def __init__(self) -> None:
        #: Replicas that do not drain, those of them that are idle, and those that end an input.
        self.live = self.idle = self.draining = 0
        #: Idle replicas that have gone, but are still listed as free.
        self.stale = 0
        self.starting: list[Start] = []
        self.wanted = 0


class Cluster:
    """All nodes, their queue, and the events to come."""

    def __init__(self, trace: traces.Trace, machines: Machines, nodes: int) -> None:
        self._trace = trace
        self._machines = machines
        self.nodes = [Node() for _ in range(nodes)]
        self.facts = Facts()
        self.played = Played([None] * len(trace))
        self._queue: collections.deque[int] = collections.deque()
        self._free: collections.deque[int] = collections.deque()
        #: When, in which order, on which node, and which start; ``None``: an input ends.
        self._events: list[tuple[float, int, int, Start | None]] = []
        self._count = 0
        self._ran = 0
        self._last = 0.0
        for number in range(machines.initial):
            self._begin(0.0, number % nodes, 0.0)
        self.advance(0.0)

    @property
    def is_over(self) -> bool:
        facts = self.facts
        return facts.arrived == len(self._trace) and not facts.waiting and not facts.running

    def advance(self, now: float) -> None:
        """Let everything happen that happens until ``now``, arrivals excepted."""
        events = self._events
        while events and events[0][0] <= now:
            at, _, number, start = heapq.heappop(events)
            if start is None:
                self._ended(at, number)
            elif start.is_wanted:
                self._is_ready(number, start)
            self._dispatch(at)

    def arrive(self, now: float) -> None:
        """The next input of the trace comes."""
        facts, limit = self.facts, self._machines.queue_limit
        facts.arrived += 1
        if limit is not None and facts.waiting >= limit:
            facts.refused += 1
            return
        facts.waiting += 1
        self._queue.append(facts.arrived - 1)
        self._dispatch(now)

    def resize(self, now: float, number: int, wanted: int) -> None:
        """Start replicas of a node, or let some go: those that start, then idle ones, then busy."""
        node = self.nodes[number]
        node.wanted = wanted
        if wanted == node.live:
            return
        room = self._machines.room - node.draining
        for _ in range(min(wanted, room) - node.live):
            self.played.starts += 1
            self._begin(now, number, self._machines.start_up)
        for _ in range(node.live - wanted):
            self._end_one(now, node)

    def close(self) -> Played:
        """Count what is there as the last input ends, and hand over the result."""
        self.played.end = max(self._last, self._trace.seconds)
        self.played.replica_seconds += self.played.end * self.facts.actual
        return self.played

    def note(self, now: float) -> None:
        facts, desired = self.facts, sum(node.wanted for node in self.nodes)
        self.played.moments.append(Moment(now, facts.arrived, facts.waiting, desired, facts.actual))

    def _begin(self, now: float, number: int, start_up: float) -> None:
        node, start = self.nodes[number], Start()
        node.live += 1
        node.starting.append(start)
        self._moved(now, 1)
        self._after(now + start_up, number, start)

    def _is_ready(self, number: int, start: Start) -> None:
        node = self.nodes[number]
        node.starting.remove(start)
        node.idle += 1
        self._free.append(number)

    def _ended(self, now: float, number: int) -> None:
        node = self.nodes[number]
        self.facts.running -= 1
        self._last = now
        if node.draining:
            node.draining -= 1
            self._moved(now, -1)
            return
        node.idle += 1
        self._free.append(number)

    def _end_one(self, now: float, node: Node) -> None:
        node.live -= 1
        if node.starting:
            node.starting.pop().is_wanted = False
        elif node.idle:
            node.idle -= 1
            node.stale += 1
        else:
            node.draining += 1
            return
        self._moved(now, -1)

    def _dispatch(self, now: float) -> None:
        while self._queue and self._free:
            number = self._free.popleft()
            node = self.nodes[number]
            if node.stale:
                node.stale -= 1
                continue
            node.idle -= 1
            self._run(now, number, self._queue.popleft())

    def _run(self, now: float, number: int, index: int) -> None:
        facts, workload = self.facts, self._trace.workloads[index]
        facts.waiting -= 1
        facts.running += 1
        self._ran += 1
        facts.mean += (workload - facts.mean) / min(self._ran, REMEMBERED)
        self.played.waits[index] = now - self._trace.times[index]
        self._after(now + workload / self._machines.score, number, None)

    def _moved(self, now: float, more: int) -> None:
        self.facts.actual += more
        self.played.replica_seconds -= more * now

    def _after(self, at: float, number: int, start: Start | None) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, number, start))


def play(
    trace: traces.Trace, machines: Machines, scalers: Sequence[Scaler], phases: Sequence[float]
) -> Played:
    """Replay a trace; node ``n`` decides every second, ``phases[n]`` after it."""
    cluster = Cluster(trace, machines, len(scalers))
    turns = sorted((phase, number) for number, phase in enumerate(phases))
    arrivals, eager = iter(trace.times), [n for n, one in enumerate(scalers) if one.on_arrival]
    coming = next(arrivals, None)
    second, turn = 0.0, 0
    while True:
        phase, number = turns[turn]
        now = second + phase
        while coming is not None and coming <= now:
            cluster.advance(coming)
            cluster.arrive(coming)
            for one in eager:
                cluster.resize(coming, one, scalers[one].desired(coming, cluster.facts))
            coming = next(arrivals, None)
        cluster.advance(now)
        if coming is None and cluster.is_over:
            return cluster.close()
        cluster.resize(now, number, scalers[number].desired(now, cluster.facts))
        if turn == 0:
            cluster.note(now)
        turn += 1
        if turn == len(turns):
            second, turn = second + 1.0, 0
