"""Has the replicas measure themselves, and knows what each can do in a second.

A child that has passed its startup probes is told to measure one benchmarked task after the other,
and is READY when each has a score. A score is remembered for the next children on devices of the
same name, until an operator restarts replicas. Later the same is done again on a replica that has
nothing to do. In between, the traffic corrects what was measured.
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

#: Share of the time left to a child that it is told of: its own word of a benchmark that hangs,
#: which names the task, should come before the parent's deadline.
_OF_TIME = 0.9
#: Seconds for which it is believed what waits in the broker.
_RECENT = 5.0
#: Rounds of a benchmark that operators see: what they see travels with each answer.
_MOST_SHOWN = 100


class Failed(errors.GWCeleryError):
    """Raised for a task that has no score, in words for the operator."""


@dataclasses.dataclass(kw_only=True)
class Measured:
    """The score of one task in one child."""

    score: snapshot.TaskScore
    #: When it was measured, by the parent's clock.
    since: float


@dataclasses.dataclass
class _Progress:
    """How far a child is."""

    scores: dict[str, Measured] = dataclasses.field(default_factory=dict)
    left: collections.deque[str] = dataclasses.field(default_factory=collections.deque)
    #: The order that it works on, and its task; 0 for none.
    call: int = 0
    task: str = ""
    #: It has been READY: what is measured now is measured again.
    was_ready: bool = False
    #: It is to be measured again.
    is_asked: bool = False


class ReplicaScores:
    """The scores of a worker's children.

    Args:
        plan: which tasks of each service have a benchmark, and the slots of each.
    """

    def __init__(self, plan: Plan) -> None:
        self._benchmarked = {key: names for key, names in plan.benchmarked.items() if names}
        period = plan.settings.benchmark_period
        self._tasks = [task for names in self._benchmarked.values() for task in names]
        self._period = math.inf if period is None else period
        self._progress: dict[ChildProcess, _Progress] = {}
        #: The latest score of each task on devices of these names, for the next children.
        self._remembered: dict[tuple[str, tuple[str, ...]], Measured] = {}
        #: Children that an operator's restart found running: perhaps of older code or weights, so
        #: that what they measure is not remembered.
        self._outdated: frozenset[ChildProcess] = frozenset()
        self._live = {key: policy_scores.LiveScore(slots) for key, slots in plan.slots.items()}
        self._calls = itertools.count(1)
        #: Messages in the broker, by service, and when that was read.
        self._queued: tuple[float, Mapping[str, int]] = (0.0, {})
        #: Not before this is a score measured again for its age: the last attempt failed.
        self._patient_until = 0.0

    # -- one child --

    def is_measured(self, child: ChildProcess, now: float) -> bool:
        """Whether a child has measured all; if not, it is told to go on."""
        progress = self._progress.get(child)
        if progress is None:
            # It begins with what is remembered; a task without a score is measured.
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
        """Take the answer to an order.

        Raises:
            Failed: when a child that has never been READY has no score.
            Garbage: for what no child of this version writes.
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
            # It served well before; what is wrong with it, probes can tell.
            logger.error("%r keeps its last score: %s", child, why)
            self._patient_until = now + self._period
        else:
            progress.scores[task] = measured
            if child not in self._outdated:
                self._remembered[task, child.products] = measured
            self._update()

    def forget_remembered(self, live: Iterable[ChildProcess]) -> None:
        """Have children that start from now on measure: code and weights may have changed.

        Args:
            live: the children that run now.
        """
        self._remembered.clear()
        self._outdated = frozenset(live)

    def forget(self, child: ChildProcess) -> None:
        """The child is gone."""
        if self._progress.pop(child, None) is not None:
            self._update()

    # -- again --

    def ask_again(self) -> None:
        """Have every replica measured again, once it has nothing to do."""
        for progress in self._progress.values():
            progress.is_asked = progress.was_ready

    def due_again(self, idle: Iterable[ChildProcess], now: float) -> ChildProcess | None:
        """Return a child of ``idle`` to measure again now, told to be; one at a time."""
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
        """Hear how many messages wait in the broker, by service."""
        self._queued = (now, queued)

    def observe(
        self, now: float, tallies: Mapping[str, snapshot.Counters], ready: Mapping[str, int]
    ) -> None:
        """Let the traffic correct the scores; about once a second.

        Args:
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
        """Return what operators see of the scores, by service."""
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
        """The latest figures of each task, of whichever replica."""
        by_child = [progress.scores for progress in self._progress.values()]
        for name in self._benchmarked.get(service, ()):
            known = [scores[name] for scores in by_child if name in scores]
            if known:
                latest = max(known, key=lambda measured: measured.since)
                yield snapshot.Benchmark(**vars(latest.score), age=now - latest.since)

    def _update(self) -> None:
        for service, names in self._benchmarked.items():
            # That of a service is its score for an even mix of its tasks: the same workload of each
            # takes the sum of their times.
            values = [
                statistics.harmonic_mean([progress.scores[name].score.value for name in names])
                for progress in self._progress.values()
                if progress.scores.keys() >= set(names)
            ]
            # Without a replica the last score is the best guess of what the next will do.
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
