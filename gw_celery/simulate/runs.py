"""A trace replayed through the autoscaler's policy, or through another one."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence

from gw_celery import errors
from gw_celery.policy import apportionment, scaling
from gw_celery.simulate import cluster, trace

#: Seconds of a trace; each is replayed one by one.
_LONGEST = 30 * 86_400


class OurPolicy:
    """The policy of one worker, in the worker's own code, on what the simulator observes.

    Args:
        positions: which of the cluster's replicas are this node's, counted from 1 and ascending.
    """

    __slots__ = ("_decider", "_meter", "_positions", "_rules", "_score", "_seen")
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
    """Replay a trace; when in a second a node decides is drawn by lot.

    Args:
        scalers: another policy than ours, by node.

    Raises:
        ConfigurationError: for a trace that would take for ever.
    """
    _refuse_overload(replayed, scenario)
    scalers = our_policy(scenario) if scalers is None else scalers
    lot = random.Random(scenario.seed)
    return cluster.simulate(replayed, scenario, scalers, [lot.random() for _ in scalers])


def our_policy(scenario: cluster.Scenario) -> list[OurPolicy]:
    """Return the policy of each node, with its part of the replicas.

    All nodes have the same room, and the first ones one more if need be.
    """
    share, rest = divmod(scenario.most, scenario.nodes)
    nodes = range(scenario.nodes)
    peers = [apportionment.Peer(f"{number:06}", share + (number < rest)) for number in nodes]
    positions: list[list[int]] = [[] for _ in nodes]
    for position, name in enumerate(apportionment.order(peers), start=1):
        positions[int(name)].append(position)
    bounds = scenario.least, scenario.most
    return [OurPolicy(scenario.rules, scenario.score, bounds, each) for each in positions]


def _refuse_overload(replayed: trace.Trace, scenario: cluster.Scenario) -> None:
    if replayed.seconds > _LONGEST:
        raise errors.ConfigurationError(
            f"this trace lasts {replayed.seconds:,.0f} s, and {_LONGEST:,} at most are replayed: "
            f"are all of its times of one kind? else give a part of it"
        )
    seconds = sum(replayed.workloads) / (scenario.score * scenario.most)
    if seconds > 10 * replayed.seconds + 86_400:
        raise errors.ConfigurationError(
            f"at a score of {scenario.score:g}, {scenario.most} replicas work on this trace for "
            f"{seconds:,.0f} s: give the --score of a replica in the trace's unit per second"
        )
