"""How many replicas the load needs, and when to have fewer: pure, on a clock that is an argument.

Three questions, asked in this order once a second:

- ``Meter``: how much arrives, and how large are its bursts?
- ``need`` and ``kept``: how many replicas does that take, now and should it come again?
- ``Decider``: up at once; down only below everything that was needed of late.

Two durations shape all of it: ``target_queue_time``, which an input may wait, and ``start_up``,
which a new replica takes. `Rules.lateness` is their ratio: near 0 a replica can be ordered when it
is needed; near 1 it comes when the burst is over, and only what is already there helps.
"""

from __future__ import annotations

import collections
import dataclasses
import math

#: Bursts are measured over these multiples of ``target_queue_time``; the last is the base load.
SPANS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: A need is held for this many times what a new replica takes to start and to clear the queue.
RESIDENCE = 4.0
#: What rounding must not turn into one replica more.
EPSILON = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What the operator wants; durations in seconds."""

    #: The share of a replica's score that is planned with.
    target_util: float = 0.9
    #: How long an input may wait in the queue.
    target_queue_time: float = 10.0
    #: To zero after this long without any input; ``None``: once ``window`` has forgotten the last.
    inactivity_timeout: float | None = None
    #: Workload per second that is provided for even while less arrives; above 0, never to zero.
    min_load: float = 0.0
    #: Expected time from the start of a replica until it is READY.
    start_up: float = 30.0
    #: For how long bursts are expected to come again.
    window: float = 600.0

    @property
    def lateness(self) -> float:
        """0: help comes at once; towards 1: long after an input should have been served."""
        return self.start_up / (self.start_up + self.target_queue_time)

    @property
    def rate_span(self) -> float:
        """Seconds over which the rate is taken: the later help comes, the less proof is awaited."""
        return self.target_queue_time / max(self.lateness, 1 / 6)

    @property
    def residence(self) -> float:
        """For how long a need that was met is held."""
        return RESIDENCE * (self.start_up + self.target_queue_time)


def need(
    rate: float, backlog: float, score: float, rules: Rules, at_hand: float = math.inf
) -> float:
    """The replicas that one service needs now.

    ``rate`` arrives per second, and ``backlog`` waits (both workload): it is to be gone within
    ``target_queue_time`` while more arrives. ``score`` is a replica's workload per second.

    What already runs is no backlog: it has its slot, and a drain lets it end. Counted again, a
    single input that takes an hour would order hundreds of replicas. For the same reason waiting
    inputs order no more replicas than they fill: ``at_hand`` is that number, if it is known.
    """
    rate = max(rate, rules.min_load)
    late = min(backlog / (rules.target_queue_time * score), at_hand)
    return max(rate / (score * rules.target_util), rate / score + late)


def kept(pace: float, score: float, rules: Rules) -> float:
    """The replicas that one service needs for its bursts, should they come again (`Meter.pace`)."""
    return pace / (score * rules.target_util)


class Meter:
    """What arrives at a service, in workload: its rate, and the pace that its bursts ask for."""

    __slots__ = ("_arrived", "_firsts", "_lengths", "_rules", "_times", "_totals", "quiet_since")

    def __init__(self, rules: Rules, now: float) -> None:
        self._rules = rules
        # The rate's span comes first, then those of bursts, each with the sample that it starts at.
        self._lengths = (rules.rate_span, *(span * rules.target_queue_time for span in SPANS))
        self._firsts = [0] * len(self._lengths)
        self._times = [now]
        self._totals = [0.0]
        self._arrived = 0.0
        #: When something last arrived.
        self.quiet_since = now

    def add(self, now: float, workload: float) -> None:
        """Count what arrived since the last call.

        A negative number corrects the one before: an input on its way from a queue to a worker may
        have been seen by neither, or by both.
        """
        if workload > 0:
            self.quiet_since = now
        self._arrived += workload
        self._times.append(now)
        self._totals.append(self._arrived)
        times, firsts = self._times, self._firsts
        for place, length in enumerate(self._lengths):
            first, since = firsts[place], now - length
            while times[first + 1] <= since:
                first += 1
            firsts[place] = first
        if (oldest := min(firsts)) > len(times) // 2:
            del self._times[:oldest]
            del self._totals[:oldest]
            self._firsts = [first - oldest for first in firsts]

    def rate(self) -> float:
        """Workload per second that arrives now."""
        return max(0.0, self._arrived - self._totals[self._firsts[0]]) / self._lengths[0]

    def pace(self) -> float:
        """Workload per second that would have to be served so that no input waits too long.

        What arrives within a span may be served until ``target_queue_time`` after its end: the span
        that asks for most of that counts. What bursts ask for beyond the base load is raised by
        ``lateness``, for the next may be larger, and replicas that it starts come too late for it.
        """
        arrived, times, totals = self._arrived, self._times, self._totals
        grace = self._rules.target_queue_time
        now, most, base = times[-1], 0.0, 0.0
        for first in self._firsts[1:]:
            base = (arrived - totals[first]) / (now - times[first] + grace)
            most = max(most, base)
        base = max(0.0, base)
        return base + (1.0 + self._rules.lateness) * (most - base)


class Largest:
    """The largest number of the last ``window`` seconds, in constant time."""

    __slots__ = ("_falling", "window")

    def __init__(self, window: float) -> None:
        self.window = window
        self._falling: collections.deque[tuple[float, float]] = collections.deque()

    def add(self, now: float, number: float) -> float:
        """Count ``number``, and say which is the largest."""
        falling = self._falling
        while falling and falling[-1][1] <= number:
            falling.pop()
        falling.append((now, number))
        while falling[0][0] < now - self.window:
            falling.popleft()
        return falling[0][1]


class Decider:
    """How many replicas there should be, from ``least`` to ``most``: up at once, down slowly."""

    __slots__ = ("_active_at", "_kept", "_needed", "_rules", "least", "most")

    def __init__(self, rules: Rules, least: int, most: int) -> None:
        self._rules = rules
        self._needed = Largest(rules.residence)
        self._kept = Largest(max(rules.window, rules.residence))
        self._active_at: float | None = None
        self.update(least, most)

    def update(self, least: int, most: int) -> None:
        """Change the bounds; ``most`` is never below ``least``."""
        self.least = max(0, least)
        self.most = max(self.least, most)

    def follow(self, rules: Rules) -> None:
        """Change the rules; what was needed of late is not forgotten for it."""
        self._rules = rules
        self._needed.window = rules.residence
        self._kept.window = max(rules.window, rules.residence)

    def hold(self, now: float, replicas: int) -> None:
        """Keep what an operator asked for, as if the load had."""
        self._needed.add(now, replicas)

    def decide(
        self,
        now: float,
        need: float | None,
        actual: int,
        keep: float | None = None,
        is_active: bool | None = None,
    ) -> int:
        """The desired replicas.

        Arguments:
            need: replicas that the load needs now; ``None`` when nobody knows: the size is held.
            actual: replicas that there are, starting and draining ones included.
            keep: replicas that its bursts would need if they came again (`kept`); without it,
                what was needed is kept for as long.
            is_active: whether anything arrived since the last call, waits or runs; without it, a
                need is activity.
        """
        if need is None:
            return self._bounded(actual)
        keep = need if keep is None else keep
        held = max(
            self._needed.add(now, max(need, keep)),
            self._kept.add(now, keep),
        )
        if (need > 0 if is_active is None else is_active) or self._active_at is None:
            self._active_at = now
        if self._is_idle(now):
            # One at a time at the end: nothing that was misread for a moment empties the pool.
            return self._bounded(1 if actual > 1 else 0)
        # Less than the head-room that ``target_util`` leaves is no reason to start a replica.
        if max(need, keep) > actual * (2.0 - self._rules.target_util):
            return self._bounded(max(actual, math.ceil(max(need, keep) - EPSILON)))
        return self._bounded(min(actual, max(1, math.ceil(held - EPSILON))))

    def _is_idle(self, now: float) -> bool:
        rules = self._rules
        if self.least > 0 or rules.min_load > 0 or self._active_at is None:
            return False
        patience = rules.window if rules.inactivity_timeout is None else rules.inactivity_timeout
        return now - self._active_at >= patience

    def _bounded(self, desired: int) -> int:
        return max(self.least, min(self.most, desired))
