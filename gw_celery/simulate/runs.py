"""A trace played through each policy, and what came of it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from gw_celery import errors
from gw_celery.policy import apportionment, scaling
from gw_celery.simulate import cluster, hindsight, policies, report, trace

#: Seconds of a trace; each is played one by one.
_LONGEST = 30 * 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is simulated: ``least`` and ``most`` are those of all nodes together."""

    score: float
    rules: scaling.Rules
    least: int = 1
    most: int = 60
    nodes: int = 1
    queue_limit: int | None = None
    seed: int = 0


def compare(
    replayed: trace.Trace, question: Question
) -> tuple[dict[str, Any], list[cluster.Moment]]:
    """The figures of our policy with the others' under ``policies``, and our course over time."""
    _refuse_overload(replayed, question)
    target = question.rules.target_queue_time
    fixed = hindsight.best(replayed, question.score, target, question.queue_limit)
    ours = play(replayed, question)
    bounds = question.least, question.most
    others: dict[str, cluster.Scaler] = {
        "stock": policies.Stock(*bounds),
        "keda": policies.Keda(*bounds),
        "ray": policies.Ray(*bounds),
    }
    found: dict[str, Any] = dict(report.figures(ours, fixed, target))
    found["policies"] = {
        name: report.figures(play_with(replayed, question, [scaler]), fixed, target)
        for name, scaler in others.items()
    }
    return found, ours.moments


def play(replayed: trace.Trace, question: Question) -> cluster.Played:
    """Our policy, on as many nodes as were asked for; each decides on its own."""
    bounds = question.least, question.most
    scalers: list[cluster.Scaler] = [
        policies.Ours(question.rules, question.score, bounds, positions)
        for positions in _positions(question)
    ]
    return play_with(replayed, question, scalers)


def play_with(
    replayed: trace.Trace, question: Question, scalers: Sequence[cluster.Scaler]
) -> cluster.Played:
    """Any policy; when in a second a node decides is drawn by lot."""
    lot = random.Random(question.seed)
    machines = cluster.Machines(
        score=question.score,
        start_up=question.rules.start_up,
        initial=question.least,
        room=-(-question.most // len(scalers)),
        queue_limit=question.queue_limit,
    )
    return cluster.play(replayed, machines, scalers, [lot.random() for _ in scalers])


def _positions(question: Question) -> list[list[int]]:
    """The seats of each node: all have the same room, and the first ones one more if need be."""
    share, rest = divmod(question.most, question.nodes)
    peers = [
        apportionment.Peer(f"{number:06}", share + (number < rest))
        for number in range(question.nodes)
    ]
    positions: list[list[int]] = [[] for _ in peers]
    for position, name in enumerate(apportionment.order(peers), start=1):
        positions[int(name)].append(position)
    return positions


def _refuse_overload(replayed: trace.Trace, question: Question) -> None:
    if replayed.seconds > _LONGEST:
        raise errors.ConfigurationError(
            f"this trace lasts {replayed.seconds:,.0f} s, and {_LONGEST:,} at most are replayed: "
            f"are all of its times of one kind? else give a part of it"
        )
    seconds = sum(replayed.workloads) / (question.score * question.most)
    if seconds > 10 * replayed.seconds + 86_400:
        raise errors.ConfigurationError(
            f"at a score of {question.score:g}, {question.most} replicas work on this trace for "
            f"{seconds:,.0f} s: give the --score of a replica in the trace's unit per second"
        )
