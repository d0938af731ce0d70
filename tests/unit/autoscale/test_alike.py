"""The simulator and the worker are one policy: the same load has both make the same decisions."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from gw_celery.policy import scaling
from gw_celery.protocol import snapshot
from gw_celery.simulate import cluster, runs
from tests.unit.autoscale.handmade import Scaled

MOST = 12
#: Workload that a replica does in a second.
SCORE = 10.0


def arrivals(seconds: int, mean: float) -> Iterator[int]:
    """Inputs of each second: few, a burst now and then, and at the end none."""
    lot, workload = random.Random(7), 0.0
    yield 0  # what waits when a worker comes is no rate to it
    for second in range(1, seconds):
        if second % 200 == 0:
            workload = lot.choice([0.0, 6.0, 18.0])
        burst = 180.0 if second % 450 < 20 else 0.0
        is_over = second > seconds - 1200
        yield 0 if is_over else int((workload + burst) / mean + lot.random())


class Load:
    """A queue that as many replicas serve as the worker wants."""

    def __init__(self, mean: float) -> None:
        self._mean = mean
        self._done = 0.0
        self.arrived = self.served = self.running = 0

    def step(self, came: int, replicas: int) -> None:
        self._done = min(self.arrived, self._done + self.running * SCORE / self._mean)
        self.served = int(self._done)
        self.arrived += came
        self.running = min(replicas, self.arrived - self.served)

    @property
    def waiting(self) -> int:
        return self.arrived - self.served - self.running


@pytest.mark.parametrize("mean", [3.0, 600.0], ids=["short inputs", "long inputs"])
def test_a_course_of_arrivals_has_worker_and_simulator_decide_the_same(
    monkeypatch: pytest.MonkeyPatch, mean: float
) -> None:
    # The simulator's replicas run one input at a time.
    worker = Scaled(monkeypatch, most=MOST, least=0, target=1, gw_inactivity_timeout=900.0)
    rules = scaling.Rules(inactivity_timeout=900.0)
    simulated = runs.OurPolicy(rules, SCORE, (0, MOST), list(range(1, MOST + 1)))
    load, decided = Load(mean), []
    for second, came in enumerate(arrivals(4000, mean)):
        actual = worker.pool.desired
        load.step(came, actual)
        # What waits is in the broker, but for what the worker has fetched.
        fetched = min(load.waiting, actual)
        worker.queued = load.waiting - fetched
        held = snapshot.Counters(
            arrived=mean * (load.arrived - worker.queued),
            waiting=mean * fetched,
            waiting_inputs=fetched,
            running_inputs=load.running,
            mean=mean,
        )
        worker.pool.held = {"model": held}
        observation = cluster.Observation(
            arrived=load.arrived,
            waiting=load.waiting,
            running=load.running,
            mean=mean,
            actual=actual,
        )
        decided.append((worker.after(1), simulated.desired(float(second), observation)))
    worker.app.close()
    assert [one for one, _ in decided] == [other for _, other in decided]
    # All of it happened: to the top, down by steps while bursts are kept for, and to zero.
    assert {one for one, _ in decided} >= {0, 1, 2, 3, MOST}
