"""How many replicas the load needs, and when to have fewer; pure: ``now`` is an argument.

Three questions, asked in this order once a second:

- ``Meter``: how much arrives, and how large are its bursts?
- ``need`` and ``kept``: how many replicas does that take, now and should it come again?
- ``Decider``: up at once; down only below everything that was needed lately.

Two durations shape all of it: ``target_queue_time``, which an input may wait, and ``start_up``,
which a new replica takes. `Rules.lateness` is their ratio: near 0 a replica can be ordered when it
is needed; near 1 it comes when the burst is over, and only what is already there helps.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import math

#: Bursts are measured over these multiples of ``target_queue_time``; the last is the base load.
SPANS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: The rate is taken over so many ``target_queue_time`` more where help comes at once.
PROOF = 2.5
#: A need is held for this many times what a new replica takes to start and to clear the queue.
RESIDENCE = 4.0
#: Numbers of old samples that are dropped at a time; even.
FORGET = 128
#: Excess of a need over a whole number that is a rounding error, and no replica more.
EPSILON = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The operator's settings; durations in seconds."""

    #: The share of a replica's score that is planned with.
    target_util: float = 0.9
    #: How long an input may wait in the queue.
    target_queue_time: float = 10.0
    #: Time without any input after which the last replica goes; ``None``: never.
    inactivity_timeout: float | None = None
    #: Workload per second that is provided for even while less arrives; above 0, never to zero.
    min_load: float = 0.0
    #: Expected time from the start of a replica until it is READY.
    start_up: float = 30.0
    #: Time for which bursts are expected to come again.
    window: float = 600.0

    @property
    def lateness(self) -> float:
        """0: help comes at once; towards 1: long after an input should have been served."""
        return self.start_up / (self.start_up + self.target_queue_time)

    @property
    def rate_span(self) -> float:
        """Seconds over which the rate is taken: the later help comes, the less proof is awaited."""
        return self.target_queue_time * (1.0 + PROOF * (1.0 - self.lateness))

    @property
    def residence(self) -> float:
        """Seconds for which a need that was met is held."""
        return RESIDENCE * (self.start_up + self.target_queue_time)


def need(rate: float, backlog: float, score: float, rules: Rules, fillable: float) -> float:
    """Return the replicas that one service needs now.

    What already runs is no backlog: it has its slot, and a drain lets it end. Counted again, a
    single input that takes an hour would order hundreds of replicas. For the same reason waiting
    inputs order no more replicas than they fill.

    Args:
        rate: workload that arrives per second.
        backlog: workload that waits, to be gone within ``target_queue_time`` while more arrives.
        score: workload per second of one replica.
        rules: the operator's settings.
        fillable: replicas that the waiting inputs fill.
    """
    rate = max(rate, rules.min_load)
    late = min(backlog / (rules.target_queue_time * score), fillable)
    return max(rate / (score * rules.target_util), rate / score + late)


def kept(pace: float, score: float, rules: Rules) -> float:
    """Return the replicas that one service needs for its bursts, should they come again.

    Args:
        pace: `Meter.pace`, in workload per second.
        score: workload per second of one replica.
        rules: the operator's settings.
    """
    return pace / (score * rules.target_util)


class Meter:
    """The workload that arrives at a service: its rate, and the pace that its bursts ask for."""

    def __init__(self, rules: Rules, now: float) -> None:
        self._grace = rules.target_queue_time
        self._head_room = 1.0 + rules.lateness
        self._rate_span = rules.rate_span
        self._spans = [span * rules.target_queue_time for span in SPANS]
        # The sample that each span starts at: they only ever move on.
        self._firsts = [0] * len(SPANS)
        self._rate_first = 0
        # A time and the total until then, in turn: so that a thousand fit into a processor's cache.
        self._samples = array.array("d", [now, 0.0])
        self._arrived = 0.0
        #: Workload per second that arrives now.
        self.rate = 0.0
        #: Workload per second that would have to be served so that no input waits too long. What
        #: arrives within a span may be served until ``target_queue_time`` after its end: the span
        #: that asks for most counts. What bursts ask for beyond the base load is raised by
        #: `Rules.lateness`: the next may be larger, and what it starts would come too late for it.
        self.pace = 0.0

    def add(self, now: float, workload: float) -> None:
        """Count what arrived since the last call.

        A negative number corrects the one before: an input on its way from a queue to a worker may
        have been seen by neither, or by both.
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
    """The largest of the latest numbers, in constant time."""

    def __init__(self) -> None:
        self._falling: collections.deque[tuple[float, float]] = collections.deque()

    def add(self, now: float, number: float, window: float) -> float:
        """Add ``number``; return the largest of the last ``window`` seconds."""
        falling = self._falling
        while falling and falling[-1][1] <= number:
            falling.pop()
        falling.append((now, number))
        while falling[0][0] < now - window:
            falling.popleft()
        return falling[0][1]


class Decider:
    """How many replicas there should be, from ``least`` to ``most``: up at once, down slowly.

    Its rules may be changed; what was needed lately is not forgotten.
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
        """Keep the replicas that an operator asked for, as if the load had needed them."""
        self._needed.add(now, replicas, self.rules.residence)

    def decide(self, now: float, need: float, actual: int, keep: float, is_active: bool) -> int:
        """Return the desired replicas.

        Args:
            now: seconds of a monotonic clock.
            need: replicas that the load needs now.
            actual: replicas that there are, starting and draining ones included.
            keep: replicas that its bursts would need if they came again (`kept`).
            is_active: something arrived since the last call, waits or runs.
        """
        rules, wanted = self.rules, max(need, keep)
        held = max(
            self._needed.add(now, wanted, rules.residence),
            self._kept.add(now, keep, max(rules.window, rules.residence)),
        )
        if is_active or self._active_at is None:
            self._active_at = now
        elif self.is_idle(now):
            # One at a time at the end: nothing that was misread for a moment empties the pool.
            return self._bounded(1 if actual > 1 else 0)
        # Less than the head-room that ``target_util`` leaves is no reason to start a replica.
        if wanted > actual * (2.0 - rules.target_util):
            return self._bounded(max(actual, math.ceil(wanted - EPSILON)))
        return self._bounded(min(actual, max(1, math.ceil(held - EPSILON))))

    def is_idle(self, now: float) -> bool:
        """Whether nothing has happened for so long that none need stay, whatever was needed."""
        timeout = self.rules.inactivity_timeout
        if self.least > 0 or self.rules.min_load > 0 or timeout is None:
            return False
        quiet_since = now if self._active_at is None else self._active_at
        return now - quiet_since >= timeout

    def _bounded(self, desired: int) -> int:
        return max(self.least, min(self.most, desired))


class Share:
    """One worker's part of a group's replicas: what moves to another goes when that one has begun.

    A part changes with the others that come, fail to start or were measured anew. To follow each
    time would drain what serves while its successor elsewhere loads, and start it again here with
    the next figure.
    """

    def __init__(self) -> None:
        self._parts = Largest()
        self._total = 0

    def kept(self, now: float, part: int, total: int, rules: Rules) -> int:
        """Return the replicas to have: the largest part of a residence, at most ``total``.

        Args:
            now: seconds of a monotonic clock.
            part: this worker's part of the group's replicas.
            total: replicas of the whole group.
            rules: the operator's settings.
        """
        if total < self._total:
            self._parts = Largest()
        self._total = total
        return min(total, round(self._parts.add(now, part, rules.residence)))
