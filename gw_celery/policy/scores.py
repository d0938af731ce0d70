"""Scores: the workload per second of one replica, from benchmarks and from traffic; pure."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

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
        p50=_percentile(whole.latencies, 0.50),
        p95=_percentile(whole.latencies, 0.95),
        failure=whole.failure,
    )


def combined(values: Iterable[float]) -> float | None:
    """Return the score of a service from those of its tasks: its score for an even mix of them.

    That is the harmonic mean: the same workload of each task takes the sum of their times.
    """
    listed = list(values)
    return statistics.harmonic_mean(listed) if listed else None


def to_json(score: snapshot.TaskScore) -> dict[str, Any]:
    return dataclasses.asdict(score)


def from_json(document: object) -> snapshot.TaskScore:
    """Return the score that ``to_json`` wrote.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(document, dict) or document.keys() != _FIELDS:
        raise ValueError(f"not a score: {document!r:.100}")
    rounds, texts = document["rounds"], {name: document[name] for name in _TEXTS}
    if not isinstance(rounds, list) or not rounds:
        raise ValueError(f"the rounds of a score are {rounds!r:.100}")
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"the texts of a score are {texts!r:.100}")
    figures: dict[str, Any] = {
        name: _figure(document[name]) for name in _FIELDS - _TEXTS - {"rounds"}
    }
    if figures["value"] <= 0:
        raise ValueError(f"a score is {figures['value']!r}")
    return snapshot.TaskScore(**texts, **figures, rounds=tuple(map(_figure, rounds)))


def loads(text: str) -> Any:
    """Return the value of a JSON ``text`` without NaN and Infinity.

    Raises:
        ValueError: for anything else.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _figure(value: object) -> float:
    number = headers.finite(value)
    if number is None or number < 0:
        raise ValueError(f"a figure of a score is {value!r:.100}")
    return number


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``ordered`` do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Counters(Protocol):
    """Counters of the inputs of one service since its worker started; it does not change."""

    @property
    def served(self) -> float:
        """Workload of those that were served."""

    @property
    def failed(self) -> float:
        """Workload of the served ones that gave no value."""

    @property
    def refused(self) -> float:
        """Workload of the failed ones that had waited for too long, and never ran."""

    @property
    def served_inputs(self) -> int: ...

    @property
    def busy(self) -> float:
        """Seconds that the served ones had a slot, all added up."""

    @property
    def running_inputs(self) -> int:
        """Inputs that replicas hold now."""

    @property
    def waiting_inputs(self) -> int:
        """Inputs that wait in the worker because no slot is free."""


@dataclasses.dataclass
class _Span:
    """A time without a change of the ready replicas."""

    began: float
    ready: int
    #: The counters when it began.
    first: Counters
    #: Sum of the shares of the slots that were taken, and how often they were looked at.
    taken: float = 0.0
    looks: int = 0

    def is_full(self, slack: float = 0.0) -> bool:
        return self.taken >= _FULL * self.looks - slack

    def is_marred(self, counters: Counters, slot_seconds: float) -> bool:
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
        self, now: float, counters: Counters, ready: int, *, has_more: bool = False
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
        was_full = has_enough and span.is_full()
        teaches = was_full and not span.is_marred(counters, slots * elapsed)
        if teaches:
            self._learn((_succeeded(counters) - _succeeded(span.first)) / elapsed / ready, now)
        self._begin(now, counters, ready)
        return teaches and self._is_warning_due()

    def _begin(self, now: float, counters: Counters, ready: int) -> None:
        # Not within a span, which may be full and last for longer: it is about to say more.
        if now - self._learnt_at > _TRUSTED:
            self.served = None
        self._span = _Span(began=now, ready=ready, first=counters)

    def _learn(self, rate: float, now: float) -> None:
        if rate > 0:
            before, self._learnt_at = self.value, now
            self.served = rate if before is None else before * (rate / before) ** _WEIGHT

    def _is_warning_due(self) -> bool:
        drift = self.drift
        if drift is None or abs(drift) <= DRIFT or self._has_warned:
            return False
        self._has_warned = True
        return True


def _failed(counters: Counters) -> float:
    return counters.failed - counters.refused


def _succeeded(counters: Counters) -> float:
    """Workload of what gave a value: what raises at once is not quick."""
    return counters.served - counters.failed
