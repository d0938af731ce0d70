"""The benchmarks of replicas, what is remembered of them, and what the traffic makes of a score."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest

import gw_celery as gw
from tests.pool_harness import Child, Harness, Order, Report

StartPool = Callable[..., Harness]
DAY = 86400.0
FAILURE = "all of its 40 inputs failed, the first one with ValueError: no"
TASKS = ["embed", "Model.a", "Model.b"]


def declare(app: gw.App) -> None:
    """``embed`` and, with two tasks, ``Model``; four slots each."""
    sample = [{"x": 1}]

    @gw.concurrent(max_inputs=4)
    async def embed(x: int) -> None: ...

    @gw.concurrent(max_inputs=4)
    class Model:
        @gw.method(benchmark_dataset=sample)
        async def a(self, x: int) -> None: ...
        @gw.method(benchmark_dataset=sample)
        async def b(self, x: int) -> None: ...

    embed.__qualname__, Model.__qualname__ = "embed", "Model"
    app.remote(benchmark_dataset=sample)(embed)
    app.cls()(Model)


@pytest.fixture
def start(start_pool: StartPool) -> StartPool:
    """Start a pool whose children have entered."""
    return functools.partial(start_pool, {"work": 1}, declare=declare)


def told(child: Child) -> list[str]:
    """What it was told to measure."""
    return [name.removeprefix(f"{__name__}.") for name in child.benchmarked]


def measure(child: Child, *values: float | str) -> None:
    for value in values or (8.0, 10.0, 10.0):
        child.measured(value)


def scores(harness: Harness) -> dict[str, Any]:
    """What operators see of each service, by its own name."""
    seen = harness.pool.snapshot().scores
    return {key.rpartition(".")[2]: score for key, score in seen.items()}


def values(harness: Harness) -> tuple[float | None, float | None]:
    seen = scores(harness)
    return seen["embed"].value, seen["Model"].value


def next_child(harness: Harness, number: int = 0) -> Child:
    """The child dies; its successor has entered."""
    harness.child(number).die()
    harness.advance(2.0)
    harness.child(number).ready()
    return harness.child(number)


def pass_days(harness: Harness, days: float) -> None:
    harness.skip(days * DAY)
    harness.advance(2.0)


def test_a_child_measures_one_task_after_the_other_before_it_is_ready(start: StartPool) -> None:
    harness = start()
    child = harness.child(0)
    for number in range(3):
        assert told(child) == TASKS[: number + 1]
        assert harness.replica()["state"] == "benchmarking"
        child.measured(8.0)
    assert harness.replica()["state"] == "ready"
    assert told(child) == TASKS


def test_an_order_has_the_time_that_is_left(start: StartPool) -> None:
    harness = start(benchmark_timeout=100.0)
    child = harness.child(0)
    harness.advance(60.0)
    child.measured(8.0)
    first, second = (order for order in child.orders if order[0] == Order.BENCHMARK)
    assert (first[3], first[4]) == (pytest.approx(90.0), False)
    assert second[3] == pytest.approx(36.0)
    measure(child, 1.0, 1.0)


def test_a_child_without_a_score_leaves_and_says_what_to_do(
    start: StartPool, caplog: pytest.LogCaptureFixture
) -> None:
    harness = start()
    child = harness.child(0)
    child.measured(FAILURE)
    assert child.is_leaving
    child.die(code=0)
    why = (
        f"the benchmark of {__name__}.embed gave no score: {FAILURE}. A replica is ready when its "
        f"benchmarks succeed: correct the body, or the inputs of benchmark_dataset or "
        f"benchmark_generator"
    )
    assert harness.pool.snapshot().replicas[0].last_error == why
    assert f"is not ready: {why}" in caplog.text
    assert values(harness) == (None, None)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"score": {}}', '{"score": NaN}', '{"failure": 1}', "[" * 100_000],
)
def test_a_child_that_writes_something_else_is_killed(start: StartPool, text: str) -> None:
    harness = start()
    child = harness.child(0)
    call = next(order[1] for order in child.orders if order[0] == Order.BENCHMARK)
    child.report([Report.MEASURED, call + 1, "garbage"])
    assert child.is_alive, "nothing waits for that answer"
    child.report([Report.MEASURED, call, text])
    assert child.exit_code == -9


def test_the_score_is_that_of_the_median_replica_and_of_an_even_mix_of_the_tasks(
    start: StartPool,
) -> None:
    harness = start(replicas=3)
    for child, value in zip(harness.children, (8.0, 9.0, 20.0), strict=True):
        measure(child, value, 100.0, 50.0)
    assert values(harness) == (9.0, pytest.approx(200 / 3))
    assert scores(harness)[""].value is None


def test_a_replica_that_is_gone_does_not_count_but_the_last_word_stays(start: StartPool) -> None:
    harness = start(replicas=2)
    for child, value in zip(harness.children, (8.0, 9.0), strict=True):
        measure(child, value, 1.0, 1.0)
    assert values(harness)[0] == 8.5
    harness.child(0).die()
    assert values(harness)[0] == 9.0
    harness.child(1).die()
    assert values(harness)[0] == 9.0


# -- what is remembered --


def test_the_next_child_is_ready_with_what_an_earlier_one_measured(start: StartPool) -> None:
    harness = start()
    measure(harness.child(0), 8.0, 10.0, 30.0)
    began = harness.now
    harness.advance(60.0)
    child = next_child(harness)
    assert (told(child), harness.replica()["state"]) == ([], "ready")
    assert values(harness) == (8.0, 15.0)
    (shown,) = scores(harness)["embed"].benchmarks
    assert (shown.value, shown.age) == (8.0, harness.now - began), "as old as its measurement"


def test_a_remembered_score_counts_in_the_median(start: StartPool) -> None:
    harness = start(replicas=3)
    for child, value in zip(harness.children, (8.0, 9.0, 20.0), strict=True):
        measure(child, value, 1.0, 1.0)
    harness.child(0).die()
    assert values(harness)[0] == 14.5
    harness.advance(2.0)
    harness.child(0).ready()
    assert values(harness)[0] == 20.0, "the latest one is remembered"


def test_only_what_an_earlier_child_did_not_measure_is_measured(start: StartPool) -> None:
    harness = start()
    harness.child(0).measured(8.0)
    child = next_child(harness)
    assert told(child) == ["Model.a"]
    measure(child, 1.0, 1.0)


def test_other_devices_are_measured_on_their_own(start: StartPool) -> None:
    harness = start()
    measure(harness.child(0))
    harness.pool.grow(10)
    harness.advance(2.0)
    (other,) = [one for one in harness.pool.supervisor.children() if one.number == 1]
    other.products = ("fake L4",)  # all fakes of a kind have one name
    harness.child(1).ready()
    assert told(harness.child(1)) == ["embed"]
    measure(harness.child(1))


def test_after_an_operators_restart_the_next_child_measures(start: StartPool) -> None:
    harness = start(replicas=2)
    old, other = harness.children
    measure(old)
    other.measured(1.0)
    harness.pool.restart(0)
    harness.advance(1.0)
    measure(other, 7.0, 7.0)  # perhaps of older code: not remembered
    old.die(code=0)
    harness.advance(2.0)
    harness.child(0).ready()
    assert values(harness)[1] == 7.0
    for number in range(3):
        assert told(harness.child(0)) == TASKS[: number + 1]
        harness.child(0).measured(9.0)
    assert told(next_child(harness, 1)) == []
    assert values(harness) == (9.0, 9.0)


# -- again --


def test_idle_replicas_are_measured_again_one_at_a_time_when_asked(start: StartPool) -> None:
    harness = start(replicas=2)
    for child in harness.children:
        measure(child)
    one, other = harness.children
    harness.pool.benchmark_tick()
    held = [harness.submit(), harness.submit()]
    harness.advance(2.0)
    assert (told(one), told(other)) == (TASKS, TASKS), "never a busy one"
    one.done(held[0])
    harness.advance(2.0)
    assert told(one) == [*TASKS, "embed"]
    assert one.orders[-1][4] is True, "it has been READY"
    assert harness.replica()["state"] == "benchmarking"
    other.done(held[1])
    harness.advance(2.0)
    assert told(other) == TASKS, "one at a time"
    measure(one, 16.0, 10.0, 10.0)
    harness.advance(2.0)
    assert (told(one), told(other)) == ([*TASKS, *TASKS], [*TASKS, "embed"])
    assert values(harness)[0] == 12.0
    measure(other)


@pytest.mark.parametrize(("period", "is_due"), [(DAY, True), (None, False)])
def test_a_score_is_measured_again_when_it_is_old(
    start: StartPool, period: float | None, *, is_due: bool
) -> None:
    harness = start(benchmark_period=period)
    child = harness.child(0)
    measure(child)
    pass_days(harness, 0.99)
    assert told(child) == TASKS
    pass_days(harness, 0.02)
    assert (told(child) != TASKS) is is_due
    if is_due:
        measure(child)


def test_a_replica_that_fails_when_measured_again_keeps_its_score_for_another_period(
    start: StartPool, caplog: pytest.LogCaptureFixture
) -> None:
    harness = start()
    child = harness.child(0)
    measure(child)
    pass_days(harness, 1.0)
    measure(child, FAILURE, 16.0, FAILURE)
    assert "keeps its last score: the benchmark of" in caplog.text
    assert harness.replica()["state"] == "ready"
    assert values(harness)[0] == 8.0
    assert len(told(child)) == 6
    pass_days(harness, 0.9)
    assert len(told(child)) == 6
    pass_days(harness, 0.2)
    assert len(told(child)) == 7
    measure(child, FAILURE, FAILURE, FAILURE)
    assert told(next_child(harness)) == [], "what was measured before a failure is remembered"
    assert values(harness) == (8.0, pytest.approx(2 / (1 / 16 + 1 / 10)))


def test_a_child_that_has_not_been_ready_is_not_measured_twice(start: StartPool) -> None:
    harness = start()
    harness.pool.benchmark_tick()
    measure(harness.child(0))
    harness.advance(3.0)
    assert told(harness.child(0)) == TASKS


# -- traffic --


def serve(harness: Harness, seconds: int, inputs: int) -> None:
    """Serve so many inputs of ``embed`` a second, while more wait for its four slots."""
    child, task = harness.child(0), f"{__name__}.embed"
    waiting = [harness.submit(task) for _ in range(inputs + 8)]
    for _ in range(seconds):
        for request in waiting[:inputs]:
            child.done(request)
        waiting = waiting[inputs:] + [harness.submit(task) for _ in range(inputs)]
        harness.advance(1.0)
    while waiting:
        child.done(waiting.pop(0))


def test_full_replicas_correct_the_score_and_a_drift_is_told_once(
    start: StartPool, caplog: pytest.LogCaptureFixture
) -> None:
    harness = start()
    measure(harness.child(0), 100.0, 10.0, 10.0)
    serve(harness, 150, 20)
    assert values(harness)[0] == pytest.approx(20.0, rel=0.05)
    assert scores(harness)["embed"].measured == 100.0
    (message,) = [text for text in caplog.messages if "full replicas" in text]
    assert f"service {__name__}.embed: by the traffic of full replicas" in message
    assert "from the benchmark's 100/s" in message


@pytest.mark.parametrize(("age", "is_learnt"), [(0.0, True), (6.0, False)])
def test_a_queue_that_was_seen_to_hold_more_shows_that_replicas_are_full(
    start: StartPool, age: float, *, is_learnt: bool
) -> None:
    harness = start()
    measure(harness.child(0))
    for _ in range(40):
        harness.pool.supervisor.note_queued({f"{__name__}.embed": 7})
        harness.advance(age)
        for _ in range(20):
            harness.child(0).done(harness.submit(f"{__name__}.embed"))
        harness.advance(1.0)
    assert (scores(harness)["embed"].served is not None) is is_learnt
    assert scores(harness)["Model"].served is None


def test_operators_see_the_latest_figures_of_each_task(start: StartPool) -> None:
    harness = start(replicas=2)
    first, second = harness.children
    measure(first)
    harness.advance(10.0)
    measure(second, 9.0)
    harness.advance(5.0)
    seen = scores(harness)
    (shown,) = seen["embed"].benchmarks
    assert (shown.value, shown.age) == (9.0, pytest.approx(5.0))
    assert [one.task.rpartition(".")[2] for one in seen["Model"].benchmarks] == ["a", "b"]
    assert json.dumps(harness.pool.snapshot().as_json())
    measure(second, 10.0, 10.0)
