from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gw_celery import conf
from gw_celery.policy import scores
from gw_celery.pool import child_state
from gw_celery.pool import replica as pool_replica
from gw_celery.pool import scores as pool_scores
from gw_celery.pool.child_state import State
from gw_celery.protocol import frames, snapshot

LIMITS = conf.Settings(
    boot_timeout=10, start_timeout=10, benchmark_timeout=100, drain_timeout=10, heartbeat_timeout=10
)
DAY = 86400.0


def served(inputs: int, *, running: int = 4) -> snapshot.Counters:
    """So many inputs were served since the worker started, and so many run."""
    return snapshot.Counters(served=float(inputs), served_inputs=inputs, running_inputs=running)


class Child:
    """A process of which only its life, and the orders that it was sent, are looked at."""

    def __init__(self, now: float = 0.0, products: tuple[str, ...] = ("fake A100",)) -> None:
        self.products = products
        self.state = child_state.ChildState(settings=LIMITS, now=now)
        self.state.loaded(now)
        self.state.entered(now)
        self.state.probed(now)
        self.orders: list[tuple[Any, ...]] = []

    def send(self, order: tuple[Any, ...]) -> None:
        self.orders.append(order)

    @property
    def tasks(self) -> list[str]:
        return [order[2] for order in self.orders]


class Pool:
    """The measuring of a worker that serves ``embed`` and, with two tasks, ``Model``."""

    def __init__(self, **settings: Any) -> None:
        setup = pool_replica.Setup(
            settings=conf.Settings(**settings),
            slots={"embed": 4, "Model": 4, "plain": 1},
            first={},
            benchmarked={"embed": ["p.embed"], "Model": ["p.Model.a", "p.Model.b"], "plain": []},
        )
        self.measuring = pool_scores.ReplicaScores(setup)

    def advance(self, child: Any, now: float = 0.0) -> bool:
        return self.measuring.is_measured(child, now)

    def answer(self, child: Any, text: str, now: float = 0.0, call: int | None = None) -> None:
        self.measuring.follow(child, child.orders[-1][1] if call is None else call, text, now)

    def measured(self, now: float = 0.0, *values: float) -> Any:
        """A child that has become READY with these scores."""
        (child,) = self.measured_together(now, values or (8.0, 10.0, 10.0))
        return child

    def measured_elsewhere(self, now: float, *values: float) -> Any:
        """As ``measured``, on a replica of which nothing is remembered."""
        self.measuring.forget_remembered([])
        return self.measured(now, *values)

    def measured_together(self, now: float, *values: tuple[float, ...]) -> list[Any]:
        """Children that started together and have become READY with these scores each."""
        children = [Child(now) for _ in values]
        for of_task in zip(*values, strict=True):
            for child in children:
                assert not self.advance(child, now)
            for child, value in zip(children, of_task, strict=True):
                self.answer(child, scored(value, task=child.orders[-1][2]), now)
        for child in children:
            assert self.advance(child, now)
            child.state.measured(now)
        return children


def scored(value: float, *, task: str = "t") -> str:
    rounds = [scores.Round(elapsed=1.0, workload=value, latencies=(0.1,))]
    return json.dumps({"score": dataclasses.asdict(scores.of(task, rounds))})


FAILURE = json.dumps({"failure": "all of its 40 inputs failed, the first one with ValueError: no"})


def test_a_child_measures_one_task_after_the_other_before_it_is_ready() -> None:
    pool, child = Pool(), Child()
    assert not pool.advance(child)
    assert child.tasks == ["p.embed"]
    assert not pool.advance(child), "it is busy"
    pool.answer(child, scored(8.0))
    assert not pool.advance(child)
    pool.answer(child, scored(8.0))
    assert not pool.advance(child)
    assert child.tasks == ["p.embed", "p.Model.a", "p.Model.b"]
    pool.answer(child, scored(8.0))
    assert pool.advance(child)


def test_an_order_names_the_task_and_the_time_that_is_left() -> None:
    pool, child = Pool(), Child(now=1000.0)
    pool.advance(child, 1000.0)
    pool.answer(child, scored(8.0), 1060.0)
    pool.advance(child, 1060.0)
    first, second = child.orders
    assert first == (frames.Order.BENCHMARK, 1, "p.embed", pytest.approx(90.0), False)
    assert second[3] == pytest.approx(36.0)


def test_a_worker_without_benchmarks_measures_nothing() -> None:
    setup = pool_replica.Setup(settings=conf.Settings(), slots={"": 1}, first={})
    child: Any = Child()
    assert pool_scores.ReplicaScores(setup).is_measured(child, 0.0)


def test_a_child_without_a_score_fails_with_what_to_do() -> None:
    pool, child = Pool(), Child()
    pool.advance(child)
    with pytest.raises(pool_scores.Failed) as failed:
        pool.answer(child, FAILURE)
    assert str(failed.value) == (
        "the benchmark of p.embed gave no score: all of its 40 inputs failed, the first one with "
        "ValueError: no. A replica is ready when its benchmarks succeed: mend the body, or the "
        "inputs of benchmark_dataset or benchmark_generator"
    )
    assert pool.measuring.as_snapshot(0.0)["embed"].value is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"score": {}}', '{"score": NaN}', '{"failure": 1}', "[" * 100_000],
)
def test_a_child_that_writes_something_else_writes_garbage(text: str) -> None:
    pool, child = Pool(), Child()
    pool.advance(child)
    with pytest.raises(frames.Garbage):
        pool.answer(child, text)


def test_an_answer_that_is_not_waited_for_is_ignored() -> None:
    pool, child = Pool(), Child()
    pool.answer(child, "garbage", call=1)
    pool.advance(child)
    pool.answer(child, "garbage", call=99)
    assert pool.measuring.as_snapshot(0.0)["embed"].value is None


def test_the_score_is_that_of_the_median_replica() -> None:
    pool = Pool()
    pool.measured_together(0.0, *((value, 10.0, 10.0) for value in (8.0, 9.0, 20.0)))
    seen = pool.measuring.as_snapshot(0.0)
    assert {key: score.value for key, score in seen.items()} == {
        "embed": 9.0,
        "Model": 10.0,
        "plain": None,
    }


def test_several_tasks_of_a_service_have_one_score() -> None:
    pool = Pool()
    pool.measured(0.0, 8.0, 100.0, 50.0)
    assert pool.measuring.as_snapshot(0.0)["Model"].value == pytest.approx(200 / 3)


def test_a_replica_that_is_gone_does_not_count_but_the_last_word_stays() -> None:
    pool = Pool()
    slow, quick = pool.measured_together(0.0, (8.0, 1.0, 1.0), (9.0, 1.0, 1.0))
    pool.measuring.forget(slow)
    assert pool.measuring.as_snapshot(0.0)["embed"].value == 9.0
    pool.measuring.forget(quick)
    assert pool.measuring.as_snapshot(0.0)["embed"].value == 9.0
    pool.measuring.forget(quick)


# -- what is remembered --


def test_the_next_child_is_ready_with_what_an_earlier_one_measured() -> None:
    pool = Pool()
    pool.measuring.forget(pool.measured(100.0, 8.0, 10.0, 30.0))
    child = Child(160.0)
    assert pool.advance(child, 160.0)
    assert child.orders == []
    assert {key: score.value for key, score in pool.measuring.as_snapshot(0.0).items()} == {
        "embed": 8.0,
        "Model": 15.0,
        "plain": None,
    }
    (shown,) = pool.measuring.as_snapshot(170.0)["embed"].benchmarks
    assert (shown.value, shown.age) == (8.0, 70.0), "as old as its measurement"
    assert pool.measuring.due_again([child], 100.0 + DAY) is child


def test_a_remembered_score_counts_in_the_median() -> None:
    pool = Pool()
    *_, last = pool.measured_together(0.0, *((value, 1.0, 1.0) for value in (8.0, 9.0, 20.0)))
    pool.measuring.forget(last)
    assert pool.measuring.as_snapshot(0.0)["embed"].value == 8.5
    pool.advance(Child(1.0), 1.0)
    assert pool.measuring.as_snapshot(0.0)["embed"].value == 9.0


def test_only_what_an_earlier_child_did_not_measure_is_measured() -> None:
    pool, first, second = Pool(), Child(), Child()
    pool.advance(first)
    pool.answer(first, scored(8.0))
    pool.advance(first)
    pool.measuring.forget(first)
    pool.advance(second)
    assert second.tasks == ["p.Model.a"]


def test_the_latest_measurement_is_remembered_and_a_failed_one_changes_nothing() -> None:
    pool = Pool()
    child = pool.measured()
    pool.measuring.ask_again()
    assert pool.measuring.due_again([child], 10.0) is child
    for answer in (scored(16.0), FAILURE, scored(10.0)):
        pool.advance(child, 10.0)
        pool.answer(child, answer, 10.0)
    pool.measuring.forget(child)
    assert pool.advance(Child(20.0), 20.0)
    assert {key: score.value for key, score in pool.measuring.as_snapshot(0.0).items()} == {
        "embed": 16.0,
        "Model": 10.0,
        "plain": None,
    }


def test_other_devices_are_measured_on_their_own() -> None:
    pool, other = Pool(), Child(products=("fake L4",))
    pool.measured()
    assert not pool.advance(other)
    assert other.tasks == ["p.embed"]


def test_after_an_operators_restart_the_next_child_measures() -> None:
    pool = Pool()
    old = pool.measured()
    pool.measuring.forget_remembered([old])
    child = Child(5.0)
    assert not pool.advance(child, 5.0)
    assert child.tasks == ["p.embed"]
    assert pool.measuring.as_snapshot(0.0)["embed"].value == 8.0, "until then it is the best guess"


def test_what_a_child_of_before_a_restart_measures_is_not_remembered() -> None:
    pool, old, new = Pool(), Child(), Child(9.0)
    pool.advance(old)
    pool.measuring.forget_remembered([old])
    for _ in range(3):
        pool.answer(old, scored(8.0))
        pool.advance(old)
    assert not pool.advance(new, 9.0)
    for _ in range(3):
        pool.answer(new, scored(9.0), 9.0)
        pool.advance(new, 9.0)
    pool.measuring.forget(old)
    pool.measuring.forget(new)
    assert pool.advance(Child(10.0), 10.0)
    assert pool.measuring.as_snapshot(0.0)["embed"].value == 9.0


# -- again --


def test_idle_replicas_are_measured_again_one_at_a_time_when_asked() -> None:
    pool = Pool()
    one, other = pool.measured_together(0.0, (8.0, 10.0, 10.0), (8.0, 10.0, 10.0))
    assert pool.measuring.due_again([one, other], 10.0) is None
    pool.measuring.ask_again()
    assert pool.measuring.due_again([], 11.0) is None, "never a busy one"
    assert pool.measuring.due_again([one, other], 12.0) is one
    one.state.measure_again(12.0)
    assert one.state.current is State.BENCHMARKING
    assert not pool.advance(one, 12.0)
    assert one.orders[-1][4] is True, "it has been READY"
    assert pool.measuring.due_again([other], 13.0) is None, "one at a time"
    for _ in range(3):
        pool.answer(one, scored(16.0), 14.0)
        is_over = pool.advance(one, 14.0)
    assert is_over
    assert pool.measuring.due_again([one, other], 15.0) is other
    assert pool.measuring.as_snapshot(0.0)["embed"].value == 12.0


def test_a_score_is_measured_again_when_it_is_old() -> None:
    pool = Pool()
    old, young = pool.measured(1000.0), pool.measured_elsewhere(1060.0)
    assert pool.measuring.due_again([young, old], 1000.0 + DAY - 1.0) is None
    assert pool.measuring.due_again([young, old], 1000.0 + DAY) is old


def test_a_score_never_ages_without_a_period() -> None:
    pool = Pool(benchmark_period=None)
    child = pool.measured()
    assert pool.measuring.due_again([child], 10 * DAY) is None


def test_a_replica_that_fails_when_measured_again_keeps_its_score_for_another_period(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Pool()
    child = pool.measured(-2 * DAY)
    assert pool.measuring.due_again([child], 1.0) is child
    pool.advance(child, 1.0)
    pool.answer(child, FAILURE, 2.0)
    assert "keeps its score: the benchmark of p.embed gave no score" in caplog.text
    for _ in range(2):
        assert not pool.advance(child, 2.0)
        pool.answer(child, FAILURE, 2.0)
    assert pool.advance(child, 2.0)
    assert pool.measuring.as_snapshot(0.0)["embed"].value == 8.0
    assert pool.measuring.due_again([child], DAY) is None
    assert pool.measuring.due_again([child], DAY + 3.0) is child


def test_a_child_that_has_not_been_ready_is_not_measured_twice() -> None:
    pool, child = Pool(), Child()
    pool.advance(child)
    pool.measuring.ask_again()
    for _ in range(3):
        pool.answer(child, scored(8.0))
        pool.advance(child)
    assert pool.measuring.due_again([child], 1.0) is None


# -- traffic --


def test_full_replicas_correct_the_score_and_a_drift_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Pool()
    pool.measured(0.0, 100.0, 10.0, 10.0)
    for second in range(300):
        pool.measuring.observe(float(second), {"embed": served(20 * second)}, {"embed": 1})
    assert pool.measuring.as_snapshot(0.0)["embed"].value == pytest.approx(20.0, rel=0.01)
    (record,) = caplog.records
    assert "the score of embed is 44.72/s, -55 % from the benchmark's 100/s" in record.getMessage()


@pytest.mark.parametrize(("age", "is_learnt"), [(0.0, True), (6.0, False)])
def test_a_queue_that_was_seen_to_hold_more_shows_that_replicas_are_full(
    age: float, *, is_learnt: bool
) -> None:
    pool = Pool()
    for second in range(1000, 1030):
        pool.measuring.note_queued({"embed": 7, "Model": 0}, second - age)
        tallies = dict.fromkeys(("embed", "Model"), served(20 * second, running=1))
        pool.measuring.observe(float(second), tallies, {"embed": 1, "Model": 1})
    assert (pool.measuring.as_snapshot(0.0)["embed"].value is not None) is is_learnt
    assert pool.measuring.as_snapshot(0.0)["Model"].value is None


def test_operators_see_the_latest_figures_of_each_task() -> None:
    pool = Pool()
    pool.measured(0.0, 8.0, 10.0, 10.0)
    pool.measured_elsewhere(10.0, 9.0, 10.0, 10.0)
    seen = pool.measuring.as_snapshot(15.0)
    (shown,) = seen["embed"].benchmarks
    assert (shown.task, shown.value, shown.age) == ("p.embed", 9.0, 5.0)
    assert seen["embed"].measured == 8.5
    assert [one.task for one in seen["Model"].benchmarks] == ["p.Model.a", "p.Model.b"]
    assert seen["plain"].value is None
