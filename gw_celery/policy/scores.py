"""Scores, the workload per second of a replica, from benchmarks and from traffic; pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from gw_celery import errors
from gw_celery.protocol import headers, snapshot

#: Relative difference of the served from the measured score that causes a warning.
DRIFT = 0.30
#: Minimum seconds of a span over which the served rate is measured.
_SPAN = 10.0
#: Minimum inputs per slot in a span, so that those at its ends have little weight.
_INPUTS_PER_SLOT = 2
#: Seconds after which a span with fewer inputs is given up.
_LONGEST = 900.0
#: Share of slots in use in a full replica; a slot is empty during the round trip to the broker
#: between two inputs.
_FULL = 0.9
#: Seconds after which the served score is forgotten, unless replicas are full again. A score that
#: is far too low starts so many replicas that none is ever full: only forgetting corrects it.
_TRUSTED = 600.0
#: Weight of a new span against all before. It weighs factors, because errors can be manifold.
_WEIGHT = 0.5
_FIELDS = {field.name for field in dataclasses.fields(snapshot.TaskScore)}
_TEXTS = {"task", "failure"}


class NoScore(errors.GWCeleryError):
    """Raised for a benchmark that gives no score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Inputs that started together, from the first start to the last end, in seconds."""

    elapsed: float
    #: Of the inputs that succeeded.
    workload: float
    latencies: tuple[float, ...]
    failures: int = 0
    #: Type and text of the first exception.
    failure: str = ""

    @property
    def throughput(self) -> float:
        return self.workload / self.elapsed if self.elapsed > 0 else 0.0


def of(task: str, rounds: Sequence[Round]) -> snapshot.TaskScore:
    """Return the score of a task: the throughput of its median round.

    A failed input has no workload, so that a body that always raises is never fast. If most rounds
    have no success, the median is 0 although the replica works. The score is then the total
    workload divided by the total time.

    Args:
        task: name of the task.
        rounds: the rounds of its benchmark.

    Raises:
        NoScore: if no input succeeded, or no input has any workload.
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
    """Return the score from the fields that a child sent.

    Raises:
        ValueError: if they are not those of a valid score.
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
    """A time during which the READY replicas do not change."""

    began: float
    ready: int
    #: The counters at its start.
    first: snapshot.Counters
    #: Sum of the shares of slots in use, and the number of samples.
    taken: float = 0.0
    looks: int = 0

    def is_full(self, slack: float = 0.0) -> bool:
        return self.taken >= _FULL * self.looks - slack

    def is_marred(self, counters: snapshot.Counters, slot_seconds: float) -> bool:
        """Return whether refusals or failures, instead of work, may have filled its slots."""
        # Refusals may empty the queue faster than work arrives, and more replicas do not help if
        # most inputs fail.
        first = self.first
        is_refusing = counters.refused > first.refused
        is_failing = _failed(counters) - _failed(first) > _succeeded(counters) - _succeeded(first)
        return is_failing or (is_refusing and counters.busy - first.busy < _FULL * slot_seconds)


class LiveScore:
    """The score of one replica: its benchmarks, corrected by what full replicas serve.

    Args:
        slots: inputs of the service that one replica takes at a time.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._span: _Span | None = None
        self._learnt_at = 0.0
        self._has_warned = False
        #: The score by benchmarks; ``None`` without any.
        self.measured: float | None = None
        #: What full replicas served recently; ``None`` if none was full for long enough.
        self.served: float | None = None

    @property
    def value(self) -> float | None:
        return self.measured if self.served is None else self.served

    @property
    def drift(self) -> float | None:
        """The relative difference of the served score from the measured one."""
        if self.served is None or not self.measured:
            return None
        return self.served / self.measured - 1.0

    def measure(self, value: float | None) -> None:
        """Set the measured score; one that differs much discards the served score."""
        before, self.measured = self.measured, value
        if before and value and abs(value / before - 1.0) > DRIFT:
            self.served, self._has_warned = None, False

    def observe(
        self, now: float, counters: snapshot.Counters, ready: int, *, has_more: bool = False
    ) -> bool:
        """Learn from the traffic; called about once a second.

        Args:
            now: seconds of a monotonic clock.
            counters: the counters of the service.
            ready: replicas that take inputs.
            has_more: whether messages are known to wait in the broker.

        Returns:
            Whether a warning about the drift is due now.
        """
        span = self._span
        if span is None or span.ready != ready or not ready:
            self._begin(now, counters, ready)
            return False
        slots = self._slots * ready
        # A waiting input proves that all slots are in use, whatever the counter shows now: short
        # inputs spend much of their time on the way to and from the broker.
        is_full = has_more or counters.waiting_inputs > 0 or counters.running_inputs >= slots
        span.taken += 1.0 if is_full else counters.running_inputs / slots
        span.looks += 1
        elapsed = now - span.began
        has_enough = counters.served_inputs - span.first.served_inputs >= _INPUTS_PER_SLOT * slots
        if elapsed < _SPAN or (not has_enough and elapsed < _LONGEST):
            if not span.is_full(slack=0.5 * _SPAN):
                self._begin(now, counters, ready)  # it cannot count as full any more
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
        # Only between spans: a running span may be full, and soon give a new score.
        if now - self._learnt_at > _TRUSTED:
            self.served = None
        self._span = _Span(began=now, ready=ready, first=counters)


def _failed(counters: snapshot.Counters) -> float:
    return counters.failed - counters.refused


def _succeeded(counters: snapshot.Counters) -> float:
    """Return the workload with a value: an immediate exception must not count as fast."""
    return counters.served - counters.failed
