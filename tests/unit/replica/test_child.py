"""What becomes of an input in a child, by the orders and reports that cross its socket."""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

import gw_celery as gw
from tests import child_harness
from tests.child_harness import DEADLINE, Child, Order, Outcome, Report

#: Its tracer stores nothing.
UNANSWERED = (Report.ERROR, Outcome.IGNORE, "Ignore")
FAILED_SOFT = (Report.ERROR, Outcome.FAILURE, "SoftTimeLimitExceeded")


class Body:
    """A body that waits as a model does, on the loop or in a thread; notes what is raised in it."""

    def __init__(self) -> None:
        self.waits = threading.Event()
        self.go = threading.Event()
        self.saw: list[str] = []
        #: Answers in place of what is raised, if anything.
        self.instead: Any = None

    async def on_loop(self) -> Any:
        self.waits.set()
        try:
            while not self.go.is_set():  # noqa: ASYNC110 - another thread sets it
                await asyncio.sleep(0.01)
        except BaseException as exc:
            return self._handle(exc)
        return "answer"

    def in_thread(self) -> Any:
        self.waits.set()
        try:
            while not self.go.is_set():
                time.sleep(0.01)
        except BaseException as exc:
            return self._handle(exc)
        return "answer"

    def _handle(self, exc: BaseException) -> Any:
        self.saw.append(type(exc).__name__)
        if self.instead is None:
            raise exc
        return self.instead


@pytest.fixture
def body() -> Body:
    return Body()


@pytest.fixture(params=["on loop", "in thread"])
def task(request: pytest.FixtureRequest, app: gw.App, body: Body) -> str:
    """The name of a task whose body is of either kind."""
    if request.param == "on loop":

        @app.remote()
        async def work() -> Any:
            return await body.on_loop()
    else:

        @app.cls()
        class Model:
            @gw.method()
            def work(self) -> Any:
                return body.in_thread()

    (service,) = app.registry.services.values()
    return service.methods["work"].task_name


@pytest.fixture
def child(app: gw.App, task: str, body: Body) -> Iterator[Child]:
    with child_harness.child_of(app, task_track_started=True) as child:
        yield child
        body.go.set()


def interrupt(child: Child, number: int, how: str) -> None:
    child.soft(number) if how == "soft" else child.stop(number)


hows = pytest.mark.parametrize("how", ["soft", "stop"])


def test_an_input_is_reported_as_it_begins_and_its_answer_when_it_is_stored(
    child: Child, task: str, body: Body
) -> None:
    number = child.run(task)
    body.go.set()
    assert child.outcome(number) == (Report.DONE, "'answer'")
    assert child.told(number) == [Report.ACCEPT, Report.DONE]
    assert child.store.states == ["STARTED", "SUCCESS"]


def test_a_soft_limit_is_raised_in_the_body_where_it_waits(
    child: Child, task: str, body: Body
) -> None:
    number = child.run(task)
    assert body.waits.wait(DEADLINE)
    child.soft(number)
    assert child.outcome(number) == FAILED_SOFT
    assert body.saw == ["SoftTimeLimitExceeded"]
    assert child.store.states == ["STARTED", "FAILURE"]
    assert type(child.result(number)) is SoftTimeLimitExceeded, "Celery's own, to its readers"


def test_a_body_may_answer_after_its_soft_limit(child: Child, task: str, body: Body) -> None:
    body.instead = "partial"
    number = child.run(task)
    assert body.waits.wait(DEADLINE)
    child.soft(number)
    assert child.outcome(number) == (Report.DONE, "'partial'")


@pytest.mark.parametrize("instead", [None, "it goes on"])
def test_a_stopped_input_has_no_answer_whatever_its_body_makes_of_it(
    child: Child, task: str, body: Body, instead: Any
) -> None:
    body.instead = instead
    number = child.run(task)
    assert body.waits.wait(DEADLINE)
    child.stop(number)
    assert child.outcome(number) == UNANSWERED
    assert body.saw in (["CancelledError"], ["Revoked"])
    assert child.store.states == ["STARTED"]


def test_a_stop_after_a_soft_limit_of_the_same_moment_wins(
    child: Child, task: str, body: Body
) -> None:
    number = child.run(task)
    assert body.waits.wait(DEADLINE)
    child.send_together((Order.SOFT, number, 5.0), (Order.STOP, number))
    assert child.outcome(number) == UNANSWERED


@hows
def test_what_comes_before_the_body_waits_for_it(
    child: Child, task: str, body: Body, how: str
) -> None:
    child.store.go.clear()
    number = child.run(task)
    assert child.store.is_held.wait(DEADLINE), "the tracer stores that it has started"
    interrupt(child, number, how)
    child.settle()
    child.store.go.set()
    assert child.outcome(number) == (FAILED_SOFT if how == "soft" else UNANSWERED)
    assert not body.waits.is_set()
    assert child.store.states[0] == "STARTED"


@hows
def test_nothing_interrupts_the_storing_of_a_result(
    child: Child, task: str, body: Body, how: str
) -> None:
    number = child.run(task)
    assert body.waits.wait(DEADLINE)
    child.store.go.clear()
    body.go.set()
    assert child.store.is_held.wait(DEADLINE)
    interrupt(child, number, how)
    child.settle()
    child.store.go.set()
    assert child.outcome(number) == (Report.DONE, "'answer'")
    assert body.saw == []
    assert child.store.states == ["STARTED", "SUCCESS"]


def test_the_storing_after_a_handled_soft_limit_is_not_interrupted_either(
    child: Child, task: str, body: Body
) -> None:
    number = child.run(task)
    assert body.waits.wait(DEADLINE)
    child.store.go.clear()
    child.soft(number)
    assert child.store.is_held.wait(DEADLINE)
    child.soft(number)
    child.settle()
    child.store.go.set()
    assert child.outcome(number) == FAILED_SOFT
    assert child.store.states == ["STARTED", "FAILURE"]


@hows
def test_the_next_input_is_not_interrupted_for_the_last_one(
    child: Child, task: str, body: Body, how: str
) -> None:
    first = child.run(task)
    assert body.waits.wait(DEADLINE)
    body.go.set()
    assert child.outcome(first)[0] == Report.DONE
    body.go.clear()
    body.waits.clear()
    second = child.run(task)
    assert body.waits.wait(DEADLINE)
    interrupt(child, first, how)
    child.settle()
    body.go.set()
    assert child.outcome(second) == (Report.DONE, "'answer'")
    assert body.saw == []


def test_a_cancellation_of_the_bodys_own_making_is_its_failure(app: gw.App) -> None:
    @app.remote()
    async def cancels() -> None:
        raise asyncio.CancelledError("mine")

    @app.remote()
    async def cancels_its_task() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with child_harness.child_of(app) as child:
        for task in (cancels, cancels_its_task):
            outcome = child.outcome(child.run(task.name))
            assert outcome == (Report.ERROR, Outcome.FAILURE, "BodyExited")


def test_a_child_that_leaves_fails_no_input_whose_body_it_interrupts(
    app: gw.App, body: Body
) -> None:
    """Its message, which the broker still has, would be acknowledged with a failure."""

    @app.remote()
    async def work() -> Any:
        return await body.on_loop()

    with child_harness.child_of(app, task_track_started=True) as child:
        number = child.run(work.name)
        assert body.waits.wait(DEADLINE)
        child.send(Order.LEAVE)
        child.thread.join(DEADLINE)
        assert body.saw == ["CancelledError"]
        assert child.store.states == ["STARTED"]
        assert child.told(number) == [Report.ACCEPT]


def test_a_tasks_run_is_as_written_elsewhere(app: gw.App) -> None:
    def add(x: int, *, y: int) -> int:
        """Adds."""
        return x + y

    task = app.celery.task(add)
    with child_harness.child_of(app):
        assert task.run(1, y=2) == 3
        assert (task.run.__name__, task.run.__doc__) == ("add", "Adds.")


def test_a_nested_call_is_part_of_its_callers_body(app: gw.App, body: Body) -> None:
    @app.celery.task
    def inner() -> None: ...

    @app.celery.task
    def outer() -> Any:
        inner.run()
        inner()
        return body.in_thread()

    with child_harness.child_of(app) as child:
        number = child.run(outer.name)
        assert body.waits.wait(DEADLINE)
        child.soft(number)
        assert child.outcome(number) == FAILED_SOFT


def test_a_profiler_works_after_bodies_that_ran_in_a_thread(app: gw.App, body: Body) -> None:
    """Python 3.11 hangs in it once an exception that was not raised was taken back."""
    seen: list[str] = []

    @app.celery.task
    def work() -> Any:
        return body.in_thread()

    @app.celery.task
    def profile() -> None:
        sys.setprofile(lambda frame, event, arg: seen.append(event))
        (lambda: None)()
        sys.setprofile(None)

    with child_harness.child_of(app) as child:  # which has one thread for these
        limited = child.run(work.name)
        assert body.waits.wait(DEADLINE)
        child.soft(limited)
        assert child.outcome(limited) == FAILED_SOFT
        body.go.set()
        assert child.outcome(child.run(work.name))[0] == Report.DONE
        assert child.outcome(child.run(profile.name))[0] == Report.DONE
    assert "call" in seen


# -- too late --


def asked(ago: float) -> dict[str, Any]:
    return {"gw-enqueued": time.time() - ago}


def test_an_input_that_waited_too_long_is_accepted_and_fails_in_place_of_its_body(
    app: gw.App, task: str, body: Body
) -> None:
    with child_harness.child_of(app, gw_max_queue_time=30.0) as child:
        number = child.run(task, **asked(31))
        assert child.outcome(number) == (Report.ERROR, Outcome.FAILURE, "QueueTimeExceeded")
        assert child.told(number) == [Report.ACCEPT, Report.ERROR]
        assert child.store.states == ["FAILURE"]
        body.go.set()
        assert child.outcome(child.run(task, **asked(20)))[0] == Report.DONE
    assert body.saw == []


@pytest.fixture
def batched(app: gw.App, body: Body) -> Iterator[tuple[Child, str, list[int]]]:
    """A child whose only call at a time the body keeps busy; the task, and the inputs it got."""
    got: list[int] = []

    class Model:
        @gw.method()
        @gw.batched(max_batch_size=1, wait_ms=0, max_running_batches=1)
        async def work(self, x: list[int]) -> list[int]:
            got.extend(x)
            await body.on_loop()
            return x

    app.cls()(Model)
    (service,) = app.registry.services.values()
    with child_harness.child_of(app, gw_max_queue_time=30.0) as child:
        yield child, service.methods["work"].task_name, got
        body.go.set()


def test_what_gathers_for_a_batch_begins_with_it(batched: Any, body: Body) -> None:
    child, task, got = batched
    first, second = child.run(task, 1), child.run(task, 2)
    assert body.waits.wait(DEADLINE)
    child.settle()
    assert (child.told(first), child.told(second)) == ([Report.ACCEPT], [])
    body.go.set()
    assert child.outcome(second) == (Report.DONE, "2")
    assert got == [1, 2]


def test_an_input_that_is_late_for_its_batch_fails_where_it_waits(batched: Any, body: Body) -> None:
    child, task, got = batched
    child.run(task, 1)
    assert body.waits.wait(DEADLINE)
    late = child.run(task, 2, **asked(31))
    child.settle()
    assert child.told(late) == []
    body.go.set()
    assert child.outcome(late) == (Report.ERROR, Outcome.FAILURE, "QueueTimeExceeded")
    assert child.told(late) == [Report.ACCEPT, Report.ERROR]
    assert got == [1]


def test_an_input_that_expires_while_it_gathers_never_runs(batched: Any, body: Body) -> None:
    child, task, got = batched
    child.run(task, 1)
    assert body.waits.wait(DEADLINE)
    expires = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    expired = child.run(task, 2, expires=expires.isoformat())
    child.settle()
    body.go.set()
    assert child.outcome(expired) == (Report.GONE,)
    assert child.told(expired) == [Report.EXPIRED, Report.GONE]
    assert got == [1]


@hows
def test_an_input_that_gathers_can_be_interrupted(batched: Any, body: Body, how: str) -> None:
    child, task, got = batched
    child.run(task, 1)
    assert body.waits.wait(DEADLINE)
    waiting = child.run(task, 2)
    child.settle()
    interrupt(child, waiting, how)
    assert child.outcome(waiting) == (FAILED_SOFT if how == "soft" else (Report.GONE,))
    body.go.set()
    assert got == [1]


def test_a_child_drops_what_gathers_and_nothing_that_has_begun(batched: Any, body: Body) -> None:
    child, task, got = batched
    begun = child.run(task, 1)
    assert body.waits.wait(DEADLINE)
    gathering = [child.run(task, 2), child.run(task, 3)]
    child.settle()
    child.send_together(*((Order.DROP, number) for number in (begun, *gathering)))
    assert [child.outcome(number) for number in gathering] == [(Report.GONE,)] * 2
    body.go.set()
    assert child.outcome(begun) == (Report.DONE, "1")
    assert child.outcome(child.run(task, 4)) == (Report.DONE, "4")
    assert got == [1, 4]


def test_a_child_drops_no_input_that_shares_no_batch(child: Child, task: str, body: Body) -> None:
    number = child.run(task)
    child.send(Order.DROP, number)
    assert body.waits.wait(DEADLINE)
    body.go.set()
    assert child.outcome(number)[0] == Report.DONE
