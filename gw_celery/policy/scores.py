"""Scores: the workload per second of one replica, from benchmarks and from traffic; pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from gw_celery import errors
from gw_celery.protocol import headers, snapshot

#: Difference between the served and the measured score, as a share, that is worth a warning.
DRIFT = 0.30
#: Least duration of a span over which the served rate is taken, in seconds.
_SPAN = 10.0
#: Inputs that each slot must have served in a span, so that those at its ends weigh little.
_INPUTS_PER_SLOT = 2
#: Seconds after which a span that has not served as many is given up.
_LONGEST = 900.0
#: Share of the slots that are taken in a full replica; between two inputs of a slot lies the way to
#: the broker and back.
_FULL = 0.9
#: Seconds after which the served score is forgotten, unless replicas are full again. A score that
#: is far too low has so many replicas started that none is ever full, and never learns otherwise.
_TRUSTED = 600.0
#: Weight of a new span against all before it; of factors, for a score can be wrong by many times.
_WEIGHT = 0.5
_FIELDS = {field.name for field in dataclasses.fields(snapshot.TaskScore)}
_TEXTS = {"task", "failure"}


class NoScore(errors.GWCeleryError):
    """Raised for a benchmark from which no score can be computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Inputs that were started together, from the first start to the last end, in seconds."""

    elapsed: float
    #: Of the inputs that succeeded.
    workload: float
    latencies: tuple[float, ...]
    failures: int = 0
    #: Type and text of the exception of the first failure.
    failure: str = ""

    @property
    def throughput(self) -> float:
        return self.workload / self.elapsed if self.elapsed > 0 else 0.0


def of(task: str, rounds: Sequence[Round]) -> snapshot.TaskScore:
    """Return the score of a task: the throughput of its median round.

    An input that raises is a failure and has no workload: a body that always raises is never quick.
    Where most rounds have no success, the median would be 0 for a replica that does work: the score
    is then all workload by all time.

    Raises:
        NoScore: without a success, or when no input has any workload.
    """
    whole = Round(
        elapsed=sum(round_.elapsed for round_ in rounds),
        workload=sum(round_.workload for round_ in rounds),
        latencies=tuple(sorted(latency for round_ in rounds for latency in round_.latencies)),
        failures=sum(round_.failures for round_ in rounds),
        failure=next((round_.failure for round_ in rounds if round_.failure), ""),
    )
    if not whole.latencies:
        raise NoScore(
            f"all of its {whole.failures} inputs failed, the first one with {whole.failure}"
        )
    throughputs = tuple(round_.throughput for round_ in rounds)
    value = statistics.median(throughputs) or whole.throughput
    if value <= 0:
        raise NoScore("its inputs have no workload: workload_calculator returned 0 for all of them")
    return snapshot.TaskScore(
        task=task,
        value=value,
        least=min(throughputs),
        most=max(throughputs),
        rounds=throughputs,
        success_rate=len(whole.latencies) / (len(whole.latencies) + whole.failures),
        p50=percentile(whole.latencies, 0.50),
        p95=percentile(whole.latencies, 0.95),
        failure=whole.failure,
    )


def from_json(document: object) -> snapshot.TaskScore:
    """Return the score of which a child sent the fields.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(document, dict) or document.keys() != _FIELDS:
        raise ValueError(f"not a score: {document!r:.100}")
    for name, value in document.items():
        if name in _TEXTS:
            is_right = isinstance(value, str)
        elif name == "rounds":
            is_right = isinstance(value, list) and len(value) > 0 and all(map(_is_figure, value))
        else:
            is_right = _is_figure(value) and (name != "value" or value > 0)
        if not is_right:
            raise ValueError(f"the {name} of a score is {value!r:.100}")
    return snapshot.TaskScore(**{**document, "rounds": tuple(document["rounds"])})


def _is_figure(value: object) -> bool:
    number = headers.finite(value)
    return number is not None and number >= 0


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of ``ordered`` do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclasses.dataclass
class _Span:
    """A time without a change of the ready replicas."""

    began: float
    ready: int
    #: The counters when it began.
    first: snapshot.Counters
    #: Sum of the shares of the slots that were taken, and how often they were looked at.
    taken: float = 0.0
    looks: int = 0

    def is_full(self, slack: float = 0.0) -> bool:
        return self.taken >= _FULL * self.looks - slack

    def is_marred(self, counters: snapshot.Counters, slot_seconds: float) -> bool:
        """Whether something other than work may have filled its slots."""
        # What waits may be refused faster than work comes, and what most inputs fail of more
        # replicas do not mend.
        first = self.first
        is_refusing = counters.refused > first.refused
        is_failing = _failed(counters) - _failed(first) > _succeeded(counters) - _succeeded(first)
        return is_failing or (is_refusing and counters.busy - first.busy < _FULL * slot_seconds)


class LiveScore:
    """The score of one replica: its benchmarks, corrected by what it serves while it is full.

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
        #: What full replicas served lately; ``None`` while there were none for long enough.
        self.served: float | None = None

    @property
    def value(self) -> float | None:
        """Workload per second of one replica; ``None`` while it is not known."""
        return self.measured if self.served is None else self.served

    @property
    def drift(self) -> float | None:
        """By what share the served score is over, or under, the measured one."""
        if self.served is None or not self.measured:
            return None
        return self.served / self.measured - 1.0

    def measure(self, value: float | None) -> None:
        """Take the score of benchmarks; a much different one ends what was learnt before it."""
        before, self.measured = self.measured, value
        if before and value and abs(value / before - 1.0) > DRIFT:
            self.served, self._has_warned = None, False

    def observe(
        self, now: float, counters: snapshot.Counters, ready: int, *, has_more: bool = False
    ) -> bool:
        """Learn from the traffic; to be called about once a second.

        Args:
            now: seconds of a monotonic clock.
            counters: those of the service.
            ready: replicas that take inputs.
            has_more: messages are known to wait in the broker.

        Returns:
            Whether a warning about the drift is due now.
        """
        span = self._span
        if span is None or span.ready != ready or not ready:
            self._begin(now, counters, ready)
            return False
        slots = self._slots * ready
        # What waits has found no slot, whatever the count of a moment says: short inputs are on
        # their way to or from the broker for a good part of their time.
        is_full = has_more or counters.waiting_inputs > 0 or counters.running_inputs >= slots
        span.taken += 1.0 if is_full else counters.running_inputs / slots
        span.looks += 1
        elapsed = now - span.began
        has_enough = counters.served_inputs - span.first.served_inputs >= _INPUTS_PER_SLOT * slots
        if elapsed < _SPAN or (not has_enough and elapsed < _LONGEST):
            if not span.is_full(slack=0.5 * _SPAN):
                self._begin(now, counters, ready)  # it cannot become full any more
            return False
        is_lesson = has_enough and span.is_full() and not span.is_marred(counters, slots * elapsed)
        rate = (_succeeded(counters) - _succeeded(span.first)) / elapsed / ready
        if is_lesson and rate > 0:
            before, self._learnt_at = self.value, now
            self.served = rate if before is None else before * (rate / before) ** _WEIGHT
        self._begin(now, counters, ready)
        is_warning_due = is_lesson and not self._has_warned and abs(self.drift or 0.0) > DRIFT
        self._has_warned = self._has_warned or is_warning_due
        return is_warning_due

    def _begin(self, now: float, counters: snapshot.Counters, ready: int) -> None:
        # Not within a span, which may be full and last for longer: it is about to say more.
        if now - self._learnt_at > _TRUSTED:
            self.served = None
        self._span = _Span(began=now, ready=ready, first=counters)


def _failed(counters: snapshot.Counters) -> float:
    return counters.failed - counters.refused


def _succeeded(counters: snapshot.Counters) -> float:
    """Workload of what gave a value: what raises at once is not quick."""
    return counters.served - counters.failed
