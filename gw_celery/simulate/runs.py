"""Replays a trace through the autoscaler's policy or another one, and computes figures."""

from __future__ import annotations

import bisect
import random
from collections.abc import Mapping, Sequence

from gw_celery import errors
from gw_celery.policy import demand, scaling, scores
from gw_celery.simulate import cluster, trace

#: Maximum seconds of a trace, because each second is simulated.
_LONGEST = 30 * 86_400

Figures = dict[str, float | int]
#: The columns of a table: heading -> key of the figure, and its format.
COLUMNS = {
    "over target": ("over_target_share", "{:.2%}"),
    "replica-seconds": ("replica_seconds", "{:,.0f}"),
    "starts": ("starts", "{:,}"),
    "mean wait": ("mean_wait", "{:.2f} s"),
    "p50": ("p50_wait", "{:.2f} s"),
    "p99": ("p99_wait", "{:.1f} s"),
    "max": ("max_wait", "{:.1f} s"),
}


class OurPolicy:
    """The policy of one worker, in the code of real workers, on the simulator's observations.

    Args:
        rules: the operator's settings.
        score: workload per second of one replica.
        bounds: minimum and maximum replicas.
        positions: the positions of this node's replicas in the cluster, from 1, ascending.
    """

    on_arrival = False

    def __init__(
        self, rules: scaling.Rules, score: float, bounds: tuple[int, int], positions: Sequence[int]
    ) -> None:
        self._rules = rules
        self._score = score
        self._meter = scaling.Meter(rules, 0.0)
        self._decider = scaling.Decider(rules, *bounds)
        self._positions = positions
        self._seen = 0

    def desired(self, now: float, observation: cluster.Observation) -> int:
        accepted = observation.arrived - observation.refused
        arrived, self._seen = accepted - self._seen, accepted
        meter, score, waiting = self._meter, self._score, observation.waiting
        mean = observation.mean
        meter.add(now, arrived * mean)
        total = self._decider.decide(
            now,
            scaling.need(meter.rate, waiting * mean, score, self._rules, waiting),
            observation.actual,
            scaling.kept(meter.pace, score, self._rules),
            bool(arrived or waiting or observation.running),
        )
        return bisect.bisect_right(self._positions, total)


def play(
    replayed: trace.Trace,
    scenario: cluster.Scenario,
    scalers: Sequence[cluster.Scaler] | None = None,
) -> cluster.Outcome:
    """Replay a trace; each node decides at a random time within a second.

    Args:
        replayed: the trace.
        scenario: the simulated system.
        scalers: another policy than ours, by node.

    Raises:
        ConfigurationError: if the simulation would take too long.
    """
    _refuse_overload(replayed, scenario)
    scalers = our_policy(scenario) if scalers is None else scalers
    lot = random.Random(scenario.seed)
    return cluster.simulate(replayed, scenario, scalers, [lot.random() for _ in scalers])


def our_policy(scenario: cluster.Scenario) -> list[OurPolicy]:
    """Return the policy of each node, with its part of the replicas.

    All nodes have the same capacity, or the first ones have one more.
    """
    share, rest = divmod(scenario.most, scenario.nodes)
    nodes = range(scenario.nodes)
    peers = [demand.Peer(f"{number:06}", share + (number < rest)) for number in nodes]
    positions: list[list[int]] = [[] for _ in nodes]
    for position, name in enumerate(demand.order(peers), start=1):
        positions[int(name)].append(position)
    bounds = scenario.least, scenario.most
    return [OurPolicy(scenario.rules, scenario.score, bounds, each) for each in positions]


def figures(outcome: cluster.Outcome, target_queue_time: float) -> Figures:
    """Return the figures of one outcome; a refused input counts as over target."""
    waits = sorted(wait for wait in outcome.waits if wait is not None)
    served, refused = len(waits), len(outcome.waits) - len(waits)
    late = sum(wait > target_queue_time for wait in waits) + refused
    waits = waits or [0.0]
    return {
        "over_target_share": late / len(outcome.waits),
        "replica_seconds": outcome.replica_seconds,
        "mean_wait": sum(waits) / len(waits),
        "p50_wait": scores.percentile(waits, 0.5),
        "p99_wait": scores.percentile(waits, 0.99),
        "max_wait": waits[-1],
        "starts": outcome.starts,
        "served": served,
        "refused": refused,
    }


def table(rows: Mapping[str, Figures], columns: Mapping[str, tuple[str, str]] = COLUMNS) -> str:
    """Return a table with a line for each policy, under the headings of ``columns``."""
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(form.format(row[key]) for key, form in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _refuse_overload(replayed: trace.Trace, scenario: cluster.Scenario) -> None:
    if replayed.seconds > _LONGEST:
        raise errors.ConfigurationError(
            f"this trace lasts {replayed.seconds:,.0f} s, and {_LONGEST:,} at most are replayed: "
            f"give all of its times in one unit, or a part of it"
        )
    seconds = sum(replayed.workloads) / (scenario.score * scenario.most)
    if seconds > 10 * replayed.seconds + 86_400:
        raise errors.ConfigurationError(
            f"at a score of {scenario.score:g}, {scenario.most} replicas work on this trace for "
            f"{seconds:,.0f} s: give the --score of a replica in the trace's unit per second"
        )
