"""Simulates a queue and its replicas, event by event, under a scaling policy.

There is one queue in order of arrival, and a replica runs one input at a time. A replica costs from
its start; one that is removed first ends its input. A policy observes what a worker can know: the
number of waiting and running inputs, and the workload of started inputs, but not of waiting ones.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import Protocol

from gw_celery.policy import scaling
from gw_celery.simulate import trace as traces

#: Number of inputs over which the mean workload is measured.
MEAN_OVER = 100


@dataclasses.dataclass(slots=True)
class Observation:
    """What a policy can know at one moment."""

    #: Inputs sent, and those of them that wait, run, or were refused.
    arrived: int = 0
    waiting: int = 0
    running: int = 0
    refused: int = 0
    #: Mean workload of the latest started inputs.
    mean: float = 1.0
    #: Replicas of all nodes: starting, ready and draining.
    actual: int = 0


class Scaler(Protocol):
    """The policy on one node, asked once a second."""

    #: Whether it is also asked at each arrival.
    on_arrival: bool

    def desired(self, now: float, observation: Observation) -> int:
        """Return the number of replicas that this node should have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """The simulated system; ``least`` and ``most`` are replicas of all nodes together."""

    #: Workload per second of one replica.
    score: float
    rules: scaling.Rules
    #: Also the number of READY replicas at the start of the trace.
    least: int = 1
    most: int = 60
    nodes: int = 1
    #: Maximum number of waiting inputs, beyond which inputs are refused; ``None``: no limit.
    queue_limit: int | None = None
    seed: int = 0


@dataclasses.dataclass
class Outcome:
    #: Seconds that each input waited, in order of arrival; ``None`` for a refused one.
    waits: list[float | None]
    replica_seconds: float = 0.0
    starts: int = 0
    #: Time at which the last input ended.
    end: float = 0.0


class _Node:
    __slots__ = ("draining", "gone", "idle", "live", "starting")

    def __init__(self) -> None:
        #: Replicas that do not drain, the idle ones of them, and draining ones.
        self.live = self.idle = self.draining = 0
        #: Removed replicas that are still in the cluster's list of free ones.
        self.gone = 0
        #: The events at which its starting replicas become READY.
        self.starting: list[int] = []


class Cluster:
    def __init__(self, trace: traces.Trace, scenario: Scenario, nodes: int) -> None:
        self._trace = trace
        self._scenario = scenario
        #: Maximum replicas of one node, including draining ones.
        self._room = -(-scenario.most // nodes)
        self._nodes = [_Node() for _ in range(nodes)]
        self.observation = Observation()
        self._outcome = Outcome([None] * len(trace))
        self._queue: collections.deque[int] = collections.deque()
        #: The node of each free replica, in the order in which they take inputs.
        self._free: collections.deque[int] = collections.deque()
        #: Time, number of the event, node, and whether a replica becomes READY or an input ends.
        self._events: list[tuple[float, int, int, bool]] = []
        self._numbers = itertools.count()
        self._ran = 0
        for number in range(scenario.least):
            self._start(0.0, number % nodes, 0.0)
        self.advance(0.0)

    @property
    def is_over(self) -> bool:
        now = self.observation
        return now.arrived == len(self._trace) and not now.waiting and not now.running

    def advance(self, now: float) -> None:
        """Process all events until ``now``, except arrivals."""
        events = self._events
        while events and events[0][0] <= now:
            at, event, number, is_start = heapq.heappop(events)
            node = self._nodes[number]
            if is_start:
                if event not in node.starting:
                    continue  # removed before it was READY
                node.starting.remove(event)
            else:
                self.observation.running -= 1
                self._outcome.end = at
            if node.draining and not is_start:
                node.draining -= 1
                self._change_actual(at, -1)
            else:
                node.idle += 1
                self._free.append(number)
                self._dispatch(at)

    def arrive(self, now: float) -> None:
        observation, limit = self.observation, self._scenario.queue_limit
        observation.arrived += 1
        if limit is not None and observation.waiting >= limit:
            observation.refused += 1
            return
        observation.waiting += 1
        self._queue.append(observation.arrived - 1)
        self._dispatch(now)

    def scale(self, now: float, number: int, desired: int) -> None:
        """Start or remove replicas of a node: starting ones first, then idle, then busy ones."""
        node = self._nodes[number]
        if desired == node.live:
            return
        for _ in range(min(desired, self._room - node.draining) - node.live):
            self._outcome.starts += 1
            self._start(now, number, self._scenario.rules.start_up)
        for _ in range(node.live - desired):
            node.live -= 1
            if node.starting:
                node.starting.pop()
            elif node.idle:
                node.idle -= 1
                node.gone += 1
            else:
                node.draining += 1
                continue
            self._change_actual(now, -1)

    def close(self) -> Outcome:
        """Return the outcome; present replicas cost until the last input has ended."""
        self._outcome.end = max(self._outcome.end, self._trace.seconds)
        self._outcome.replica_seconds += self._outcome.end * self.observation.actual
        return self._outcome

    def _start(self, now: float, number: int, start_up: float) -> None:
        node = self._nodes[number]
        node.live += 1
        self._change_actual(now, 1)
        node.starting.append(self._schedule(now + start_up, number, is_start=True))

    def _dispatch(self, now: float) -> None:
        observation = self.observation
        while self._queue and self._free:
            number = self._free.popleft()
            node = self._nodes[number]
            if node.gone:
                node.gone -= 1
                continue
            node.idle -= 1
            index = self._queue.popleft()
            workload = self._trace.workloads[index]
            observation.waiting -= 1
            observation.running += 1
            self._ran += 1
            observation.mean += (workload - observation.mean) / min(self._ran, MEAN_OVER)
            self._outcome.waits[index] = now - self._trace.times[index]
            self._schedule(now + workload / self._scenario.score, number, is_start=False)

    def _change_actual(self, now: float, change: int) -> None:
        self.observation.actual += change
        self._outcome.replica_seconds -= change * now

    def _schedule(self, at: float, number: int, *, is_start: bool) -> int:
        event = next(self._numbers)
        heapq.heappush(self._events, (at, event, number, is_start))
        return event


def simulate(
    trace: traces.Trace, scenario: Scenario, scalers: Sequence[Scaler], phases: Sequence[float]
) -> Outcome:
    """Replay a trace until its last input has ended.

    Args:
        trace: the trace.
        scenario: the simulated system.
        scalers: the policy of each node.
        phases: the time in each second at which a node decides, by node.
    """
    cluster = Cluster(trace, scenario, len(scalers))
    turns = sorted((phase, number) for number, phase in enumerate(phases))
    on_arrival = [number for number, scaler in enumerate(scalers) if scaler.on_arrival]
    arrivals = collections.deque(trace.times)
    second = 0.0
    while True:
        for phase, number in turns:
            now = second + phase
            while arrivals and arrivals[0] <= now:
                at = arrivals.popleft()
                cluster.advance(at)
                cluster.arrive(at)
                for asked in on_arrival:
                    cluster.scale(at, asked, scalers[asked].desired(at, cluster.observation))
            cluster.advance(now)
            if cluster.is_over:
                return cluster.close()
            cluster.scale(now, number, scalers[number].desired(now, cluster.observation))
        second += 1.0
