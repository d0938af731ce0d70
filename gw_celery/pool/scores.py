"""Orders benchmarks from the children, and knows the score of each service, in the parent.

A child that has passed its startup probes runs one benchmark after the other, and is READY when
each has given a score. Children on devices of the same name reuse the scores, until an operator
restarts replicas. Later, idle replicas measure again. In between, the traffic corrects the scores.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping

from gw_celery import errors
from gw_celery.policy import scores as policy_scores
from gw_celery.pool.child_process import ChildProcess
from gw_celery.protocol import frames, snapshot
from gw_celery.worker.plan import Plan

logger = logging.getLogger(__name__)

#: Share of the remaining time that the child gets: it should report a benchmark that hangs, with
#: the name of the task, before the parent's deadline.
_OF_TIME = 0.9
#: Maximum age in seconds of a reading of the broker's backlog.
_RECENT = 5.0
#: Maximum number of rounds in snapshots, which travel with each answer to operators.
_MOST_SHOWN = 100


class Failed(errors.GWCeleryError):
    """Raised for a task without a score; the message is for the operator."""


@dataclasses.dataclass(kw_only=True)
class Measured:
    score: snapshot.TaskScore
    #: Time of the measurement, by the parent's clock.
    since: float


@dataclasses.dataclass
class _Progress:
    scores: dict[str, Measured] = dataclasses.field(default_factory=dict)
    left: collections.deque[str] = dataclasses.field(default_factory=collections.deque)
    #: The order that the child works on, and its task; 0 for none.
    call: int = 0
    task: str = ""
    #: The child has been READY: further benchmarks are repetitions.
    was_ready: bool = False
    #: Whether a repetition was requested.
    is_asked: bool = False


class ReplicaScores:
    """The scores of a worker's children.

    Args:
        plan: names the tasks with a benchmark, and the slots of each service.
    """

    def __init__(self, plan: Plan) -> None:
        self._benchmarked = {key: names for key, names in plan.benchmarked.items() if names}
        period = plan.settings.benchmark_period
        self._tasks = [task for names in self._benchmarked.values() for task in names]
        self._period = math.inf if period is None else period
        self._progress: dict[ChildProcess, _Progress] = {}
        #: Latest score by task and device names, for later children.
        self._remembered: dict[tuple[str, tuple[str, ...]], Measured] = {}
        #: Children that ran at an operator's restart. They may have older code or weights, so that
        #: their scores are not remembered.
        self._outdated: frozenset[ChildProcess] = frozenset()
        self._live = {key: policy_scores.LiveScore(slots) for key, slots in plan.slots.items()}
        self._calls = itertools.count(1)
        #: Time of the last reading, and messages in the broker by service.
        self._queued: tuple[float, Mapping[str, int]] = (0.0, {})
        #: Time before which no score is renewed for its age, after a failed attempt.
        self._patient_until = 0.0

    # -- one child --

    def is_measured(self, child: ChildProcess, now: float) -> bool:
        """Return whether a child has all its scores; otherwise order the next benchmark."""
        progress = self._progress.get(child)
        if progress is None:
            # Start with the remembered scores; the child measures the other tasks.
            progress = self._progress[child] = _Progress()
            for task in self._tasks:
                if (measured := self._remembered.get((task, child.products))) is None:
                    progress.left.append(task)
                else:
                    progress.scores[task] = measured
            self._update()
        if progress.call:
            return False
        if not progress.left:
            progress.was_ready = True
            return True
        progress.call, progress.task = next(self._calls), progress.left.popleft()
        within = _OF_TIME * max(0.0, (child.state.deadline or now) - now)
        is_again = progress.was_ready
        child.send((frames.Order.BENCHMARK, progress.call, progress.task, within, is_again))
        return False

    def follow(self, child: ChildProcess, call: int, text: str, now: float) -> None:
        """Process the answer to an order.

        Raises:
            Failed: if a benchmark fails before the first READY of its child.
            Garbage: if no child of this version writes such an answer.
        """
        progress = self._progress.get(child)
        if progress is None or call != progress.call:
            return
        task, progress.call = progress.task, 0
        try:
            measured = _read(text, now)
        except Failed as exc:
            why = (
                f"the benchmark of {task} gave no score: {exc}. A replica is ready when its "
                f"benchmarks succeed: correct the body, or the inputs of benchmark_dataset or "
                f"benchmark_generator"
            )
            if not progress.was_ready:
                raise Failed(why) from None
            # It served before; probes can tell what is wrong with it.
            logger.error("%r keeps its last score: %s", child, why)
            self._patient_until = now + self._period
        else:
            progress.scores[task] = measured
            if child not in self._outdated:
                self._remembered[task, child.products] = measured
            self._update()

    def forget_remembered(self, live: Iterable[ChildProcess]) -> None:
        """Make children that start from now on measure, because code and weights may have changed.

        Args:
            live: the children that run now.
        """
        self._remembered.clear()
        self._outdated = frozenset(live)

    def forget(self, child: ChildProcess) -> None:
        if self._progress.pop(child, None) is not None:
            self._update()

    # -- repetition --

    def ask_again(self) -> None:
        """Make every replica measure again, once it is idle."""
        for progress in self._progress.values():
            progress.is_asked = progress.was_ready

    def due_again(self, idle: Iterable[ChildProcess], now: float) -> ChildProcess | None:
        """Choose one child of ``idle`` to measure again, and prepare it; one at a time."""
        if not self._benchmarked or any(progress.call for progress in self._progress.values()):
            return None
        for child in idle:
            progress = self._progress.get(child)
            if progress is None:
                continue
            oldest = min((measured.since for measured in progress.scores.values()), default=now)
            if progress.is_asked or (now - oldest >= self._period and now >= self._patient_until):
                progress.is_asked = False
                progress.left.extend(self._tasks)
                return child
        return None

    # -- scores --

    def note_queued(self, queued: Mapping[str, int], now: float) -> None:
        self._queued = (now, queued)

    def observe(
        self, now: float, tallies: Mapping[str, snapshot.Counters], ready: Mapping[str, int]
    ) -> None:
        """Correct the scores by the traffic; called about once a second.

        Args:
            now: the current time.
            tallies: counters by service.
            ready: replicas that take inputs, by service.
        """
        at, queued = self._queued
        for key, live in self._live.items():
            has_more = now - at < _RECENT and queued.get(key, 0) > 0
            if key in tallies and live.observe(
                now, tallies[key], ready.get(key, 0), has_more=has_more
            ):
                logger.warning(
                    "service %s: by the traffic of full replicas the score is %.4g/s, %+.0f %% "
                    "from the benchmark's %.4g/s, and the worker uses it. Make the benchmark's "
                    "inputs resemble the traffic, and benchmark_concurrency its load",
                    key or "plain tasks",
                    live.served,
                    100 * (live.drift or 0.0),
                    live.measured,
                )

    def as_snapshot(self, now: float) -> dict[str, snapshot.Score]:
        return {
            key: snapshot.Score(
                value=live.value,
                measured=live.measured,
                served=live.served,
                drift=live.drift,
                benchmarks=tuple(self._latest(key, now)),
            )
            for key, live in self._live.items()
        }

    def _latest(self, service: str, now: float) -> Iterator[snapshot.Benchmark]:
        """Yield the latest figures of each task, from any replica."""
        by_child = [progress.scores for progress in self._progress.values()]
        for name in self._benchmarked.get(service, ()):
            known = [scores[name] for scores in by_child if name in scores]
            if known:
                latest = max(known, key=lambda measured: measured.since)
                yield snapshot.Benchmark(**vars(latest.score), age=now - latest.since)

    def _update(self) -> None:
        for service, names in self._benchmarked.items():
            # The score of a service assumes an even mix of its tasks: equal workload of each takes
            # the sum of their times, hence the harmonic mean.
            values = [
                statistics.harmonic_mean([progress.scores[name].score.value for name in names])
                for progress in self._progress.values()
                if progress.scores.keys() >= set(names)
            ]
            # Without a replica, the last score is the best estimate for the next one.
            if values:
                self._live[service].measure(statistics.median(values))


def _read(text: str, now: float) -> Measured:
    try:
        given = json.loads(text)
        if isinstance(given, dict) and isinstance(given.get("failure"), str):
            raise Failed(given["failure"])
        if not isinstance(given, dict) or given.keys() != {"score"}:
            raise ValueError(f"not the answer to an order to measure: {text:.100}")
        score = policy_scores.from_json(given["score"])
        shown = dataclasses.replace(score, rounds=score.rounds[:_MOST_SHOWN])
        return Measured(score=shown, since=now)
    except (ValueError, RecursionError) as exc:
        raise frames.Garbage(str(exc)) from None
