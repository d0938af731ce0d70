"""Corrects a score by what replicas serve while they are full; pure: ``now`` is an argument."""

from __future__ import annotations

import dataclasses
from typing import Protocol

#: Difference of the served from the measured score that is told.
DRIFT = 0.30
#: Seconds over which the served rate is taken, at least.
_SPAN = 10.0
#: Inputs that each slot must have served in it, so that those at its ends weigh little.
_INPUTS_PER_SLOT = 2
#: Seconds after which a span that has not served as many is given up.
_LONGEST = 900.0
#: Share of the slots that are taken in a replica that has no rest; between two inputs of a slot
#: lies the way to the broker and back.
_FULL = 0.9
#: Seconds for which what full replicas served is gone by, unless some are full again. A score that
#: is far too low has so many replicas started that none is ever full, and never learns otherwise.
_TRUSTED = 600.0
#: What a new span weighs against all before it; of factors, for a score can be wrong by many times.
_WEIGHT = 0.5


class Tally(Protocol):
    """What has become of the inputs of one service since its worker started."""

    @property
    def served(self) -> float:
        """Workload of those that were served."""

    @property
    def failed(self) -> float:
        """Workload of those of them that gave no value."""

    @property
    def served_inputs(self) -> int: ...

    @property
    def refused(self) -> float:
        """Workload of those of them that had waited for too long, and never ran."""

    @property
    def busy(self) -> float:
        """Seconds that what was served had a slot, all added up."""

    @property
    def running_inputs(self) -> int:
        """Those that replicas hold now."""

    @property
    def waiting_inputs(self) -> int:
        """Those that wait in the worker because no slot is free."""


@dataclasses.dataclass
class _Span:
    """A time without a change of the ready replicas."""

    began: float
    ready: int
    succeeded: float
    failed: float
    inputs: int
    refused: float
    busy: float
    taken: float = 0.0
    looks: int = 0

    def is_marred(self, tally: Tally, seconds: float) -> bool:
        """Whether its slots were full, for ``seconds`` in all, of something else than the work."""
        # What waits may be refused faster than work comes, and what most inputs fail of more
        # replicas do not mend.
        is_refusing = tally.refused > self.refused
        is_failing = _failed(tally) - self.failed > _succeeded(tally) - self.succeeded
        return is_failing or (is_refusing and tally.busy - self.busy < _FULL * seconds)


class Live:
    """The score of one replica, as its measure and its traffic say.

    Args:
        slots: inputs of the service that one replica takes at a time.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._span: _Span | None = None
        self._learnt_at = 0.0
        self._has_warned = False
        #: What benchmarks gave; ``None`` without any.
        self.measured: float | None = None
        #: What full replicas served of late; ``None`` while there were none for long enough.
        self.served: float | None = None

    @property
    def value(self) -> float | None:
        """Workload per second of one replica; ``None`` while nobody knows."""
        return self.measured if self.served is None else self.served

    @property
    def drift(self) -> float | None:
        """By what share the served score is over, or under, the measured one."""
        if self.served is None or not self.measured:
            return None
        return self.served / self.measured - 1.0

    def measure(self, value: float | None) -> None:
        """Take what benchmarks say now; a much different one ends what was learnt before it."""
        before, self.measured = self.measured, value
        if before and value and abs(value / before - 1.0) > DRIFT:
            self.served, self._has_warned = None, False

    def observe(self, now: float, tally: Tally, ready: int, *, has_more: bool = False) -> bool:
        """Look at the traffic, about once a second; whether a drift is to be told now.

        Args:
            ready: replicas that take inputs.
            has_more: whether messages are known to wait in the broker.
        """
        span = self._span
        if span is None or span.ready != ready or not ready:
            self._begin(now, tally, ready)
            return False
        slots = self._slots * ready
        # What waits has found no slot, whatever the count of a moment says: short inputs are on
        # their way to or from the broker for a good part of their time.
        is_full = has_more or tally.waiting_inputs > 0 or tally.running_inputs >= slots
        span.taken += 1.0 if is_full else tally.running_inputs / slots
        span.looks += 1
        elapsed = now - span.began
        inputs = tally.served_inputs - span.inputs
        if elapsed < _SPAN or (inputs < _INPUTS_PER_SLOT * slots and elapsed < _LONGEST):
            if span.taken < _FULL * span.looks - 0.5 * _SPAN:
                self._begin(now, tally, ready)  # it cannot become full any more
            return False
        was_full = inputs >= _INPUTS_PER_SLOT * slots and span.taken >= _FULL * span.looks
        teaches = was_full and not span.is_marred(tally, slots * elapsed)
        if teaches:
            self._learn((_succeeded(tally) - span.succeeded) / elapsed / ready, now)
        self._begin(now, tally, ready)
        return teaches and self._is_to_be_told()

    def _begin(self, now: float, tally: Tally, ready: int) -> None:
        # Not within a span, which may be full and last for longer: it is about to say more.
        if now - self._learnt_at > _TRUSTED:
            self.served = None
        self._span = _Span(
            began=now,
            ready=ready,
            succeeded=_succeeded(tally),
            failed=_failed(tally),
            inputs=tally.served_inputs,
            refused=tally.refused,
            busy=tally.busy,
        )

    def _learn(self, rate: float, now: float) -> None:
        if rate > 0:
            before, self._learnt_at = self.value, now
            self.served = rate if before is None else before * (rate / before) ** _WEIGHT

    def _is_to_be_told(self) -> bool:
        drift = self.drift
        if drift is None or abs(drift) <= DRIFT or self._has_warned:
            return False
        self._has_warned = True
        return True


def _failed(tally: Tally) -> float:
    """Workload of what ran and gave no value."""
    return tally.failed - tally.refused


def _succeeded(tally: Tally) -> float:
    """Workload of what gave a value: what raises at once is not quick."""
    return tally.served - tally.failed
