"""The number of replicas for the load, and when to reduce it; pure, in the worker's parent.

Three questions, in this order, once a second:

- ``Meter``: how much workload arrives, and how large are its bursts?
- ``need`` and ``kept``: how many replicas does this take now, and for a repetition of the bursts?
- ``Decider``: grow at once; shrink only below everything that was needed recently.

Two durations shape the answers: ``target_queue_time``, which an input may wait, and ``start_up``,
which a new replica takes. `Rules.lateness` compares them. Near 0, a replica can start when it is
needed. Near 1, it is READY after the burst, so that only existing replicas help.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import math

#: Multiples of ``target_queue_time`` over which bursts are measured; the last one is the base load.
SPANS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: Additional multiples of ``target_queue_time`` for the rate if replicas start at once.
PROOF = 2.5
#: A need is held for this multiple of the time that a replica takes to start and clear the queue.
RESIDENCE = 4.0
#: Number of old sample values dropped at a time; even.
FORGET = 128
#: Rounding error of a need that does not require another replica.
EPSILON = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The operator's settings; durations are in seconds."""

    #: Share of a replica's score to plan with.
    target_util: float = 0.9
    #: Time that an input may wait in the queue.
    target_queue_time: float = 10.0
    #: Time without inputs after which the last replica goes; ``None``: never.
    inactivity_timeout: float | None = None
    #: Minimum workload per second to plan for; above 0, the pool never shrinks to zero.
    min_load: float = 0.0
    #: Expected time from the start of a replica until it is READY.
    start_up: float = 30.0
    #: Time for which bursts are expected to repeat.
    window: float = 600.0

    @property
    def lateness(self) -> float:
        """0: new replicas help at once; near 1: they help long after an input should be served."""
        return self.start_up / (self.start_up + self.target_queue_time)

    @property
    def rate_span(self) -> float:
        """Seconds over which the rate is measured: shorter if new replicas help later."""
        return self.target_queue_time * (1.0 + PROOF * (1.0 - self.lateness))

    @property
    def residence(self) -> float:
        """Seconds for which a satisfied need is held."""
        return RESIDENCE * (self.start_up + self.target_queue_time)


def need(rate: float, backlog: float, score: float, rules: Rules, fillable: float) -> float:
    """Return the replicas that one service needs now.

    Running inputs are not backlog: they have slots, and a drain lets them finish. If they counted,
    an input of an hour would order hundreds of replicas. For the same reason, waiting inputs order
    no more replicas than they fill.

    Args:
        rate: arriving workload per second.
        backlog: waiting workload, to be served within ``target_queue_time`` beside new arrivals.
        score: workload per second of one replica.
        rules: the operator's settings.
        fillable: replicas that the waiting inputs fill.
    """
    rate = max(rate, rules.min_load)
    late = min(backlog / (rules.target_queue_time * score), fillable)
    return max(rate / (score * rules.target_util), rate / score + late)


def kept(pace: float, score: float, rules: Rules) -> float:
    """Return the replicas that one service needs if its bursts repeat.

    Args:
        pace: `Meter.pace`, in workload per second.
        score: workload per second of one replica.
        rules: the operator's settings.
    """
    return pace / (score * rules.target_util)


class Meter:
    """The workload that arrives at a service: its rate, and the pace that its bursts require."""

    def __init__(self, rules: Rules, now: float) -> None:
        self._grace = rules.target_queue_time
        self._head_room = 1.0 + rules.lateness
        self._rate_span = rules.rate_span
        self._spans = [span * rules.target_queue_time for span in SPANS]
        # Index of the first sample of each span; it only grows.
        self._firsts = [0] * len(SPANS)
        self._rate_first = 0
        # Alternating time and total, so that a thousand samples fit into a processor's cache.
        self._samples = array.array("d", [now, 0.0])
        self._arrived = 0.0
        #: Workload per second that arrives now.
        self.rate = 0.0
        #: Workload per second to serve so that no input waits too long. Arrivals of a span may be
        #: served until ``target_queue_time`` after its end; the most demanding span counts. The
        #: part beyond the base load grows by `Rules.lateness`, because the next burst may be
        #: larger, and replicas that it starts would be late.
        self.pace = 0.0

    def add(self, now: float, workload: float) -> None:
        """Count the arrivals since the last call.

        A negative number is a correction: an input on its way from a queue to a worker may have
        been counted twice, or not at all.
        """
        arrived = self._arrived = self._arrived + workload
        samples, firsts, grace = self._samples, self._firsts, self._grace
        samples.append(now)
        samples.append(arrived)
        first, since = self._rate_first, now - self._rate_span
        while samples[first + 2] <= since:
            first += 2
        self._rate_first = first
        gained = arrived - samples[first + 1]
        self.rate = max(0.0, gained) / max(self._rate_span, now - samples[first])
        most = base = 0.0
        for index, span in enumerate(self._spans):
            first, since = firsts[index], now - span
            while samples[first + 2] <= since:
                first += 2
            firsts[index] = first
            base = (arrived - samples[first + 1]) / (now - samples[first] + grace)
            if base > most:
                most = base
        if base < 0.0:
            base = 0.0
        self.pace = base + self._head_room * (most - base)
        if first > FORGET and self._rate_first > FORGET:
            del samples[:FORGET]
            self._firsts = [first - FORGET for first in firsts]
            self._rate_first -= FORGET


class Largest:
    """The maximum of recent numbers, in amortized constant time (monotonic queue)."""

    def __init__(self) -> None:
        self._falling: collections.deque[tuple[float, float]] = collections.deque()

    def add(self, now: float, number: float, window: float) -> float:
        """Add ``number``; return the maximum of the last ``window`` seconds."""
        falling = self._falling
        while falling and falling[-1][1] <= number:
            falling.pop()
        falling.append((now, number))
        while falling[0][0] < now - window:
            falling.popleft()
        return falling[0][1]


class Decider:
    """Decides the number of replicas from ``least`` to ``most``: grows at once, shrinks slowly.

    A change of its rules keeps the memory of recent needs.
    """

    def __init__(self, rules: Rules, least: int, most: int) -> None:
        self.rules = rules
        self._needed = Largest()
        self._kept = Largest()
        self._active_at: float | None = None
        self.update(least, most)

    def update(self, least: int, most: int) -> None:
        """Change the bounds; ``most`` is never below ``least``."""
        self.least = max(0, least)
        self.most = max(self.least, most)

    def hold(self, now: float, replicas: int) -> None:
        """Hold the replicas that an operator requested, as if the load needed them."""
        self._needed.add(now, replicas, self.rules.residence)

    def decide(self, now: float, need: float, actual: int, keep: float, is_active: bool) -> int:
        """Return the desired replicas.

        Args:
            now: seconds of a monotonic clock.
            need: replicas that the load needs now.
            actual: present replicas, including starting and draining ones.
            keep: replicas for a repetition of the bursts (`kept`).
            is_active: whether anything has arrived since the last call, waits or runs.
        """
        rules, wanted = self.rules, max(need, keep)
        held = max(
            self._needed.add(now, wanted, rules.residence),
            self._kept.add(now, keep, max(rules.window, rules.residence)),
        )
        if is_active or self._active_at is None:
            self._active_at = now
        elif self.is_idle(now):
            # One at a time, so that a wrong reading does not empty the pool.
            return self._bounded(1 if actual > 1 else 0)
        # A need within the head-room of ``target_util`` does not start a replica.
        if wanted > actual * (2.0 - rules.target_util):
            return self._bounded(max(actual, math.ceil(wanted - EPSILON)))
        return self._bounded(min(actual, max(1, math.ceil(held - EPSILON))))

    def is_idle(self, now: float) -> bool:
        """Return whether the last replica may go after this time without work."""
        timeout = self.rules.inactivity_timeout
        if self.least > 0 or self.rules.min_load > 0 or timeout is None:
            return False
        quiet_since = now if self._active_at is None else self._active_at
        return now - quiet_since >= timeout

    def _bounded(self, desired: int) -> int:
        return max(self.least, min(self.most, desired))


class Share:
    """One worker's part of a group's replicas, which shrinks only after a delay.

    Parts change when other workers come, fail to start or have new scores. A worker that followed
    each change would drain replicas while their successors elsewhere load, and soon start them
    again.
    """

    def __init__(self) -> None:
        self._parts = Largest()
        self._total = 0

    def kept(self, now: float, part: int, total: int, rules: Rules) -> int:
        """Return this worker's replicas: its largest part within a residence, at most ``total``.

        Args:
            now: seconds of a monotonic clock.
            part: this worker's current part of the group's replicas.
            total: replicas of the whole group.
            rules: the operator's settings.
        """
        if total < self._total:
            self._parts = Largest()
        self._total = total
        return min(total, round(self._parts.add(now, part, rules.residence)))
