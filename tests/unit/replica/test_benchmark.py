from __future__ import annotations

import asyncio
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, current_task, signals
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded

import gw_celery as gw
from tests import child_harness
from tests.child_harness import Order, Report

ONE = [{"x": 1}]


class NoScore(Exception):
    """The reason that a child reports."""


def measured(app: gw.App, *, name: str = "", within: float = 30.0, **settings: Any) -> Any:
    """The score of a task of the only service, as a replica reports it."""
    (service,) = app.registry.services.values()
    method = service.methods[name] if name else next(iter(service.methods.values()))
    with child_harness.child_of(app, **settings) as child:
        child.send(Order.BENCHMARK, 1, method.task_name, within, False)
        answer = json.loads(child.answer(Report.MEASURED, 1)[0])
        assert child.store.states == [], "nothing outside learns of it"
    if "failure" in answer:
        raise NoScore(answer["failure"])
    return SimpleNamespace(**answer["score"])


def test_a_pass_that_is_not_counted_comes_before_the_rounds(app: gw.App) -> None:
    began: list[int] = []

    @app.remote(benchmark_dataset=ONE, benchmark_runs=3, benchmark_concurrency=4)
    @gw.concurrent(max_inputs=10)
    async def embed(x: int) -> int:
        began.append(x)
        await asyncio.sleep(0)
        return x

    found = measured(app)
    assert len(began) == (1 + 3) * 4
    assert len(found.rounds) == 3
    assert found.success_rate == 1.0


def test_the_inputs_of_a_round_run_at_the_same_time_and_no_more_than_a_replica_takes(
    app: gw.App,
) -> None:
    present: list[int] = [0, 0]

    @app.remote(benchmark_dataset=ONE, benchmark_runs=2, benchmark_concurrency=10)
    @gw.concurrent(max_inputs=3)
    async def embed(x: int) -> None:
        present[0] += 1
        present[1] = max(present)
        await asyncio.sleep(0.001)
        present[0] -= 1

    measured(app)
    assert present == [0, 3]


def test_workload_by_the_methods_calculator(app: gw.App) -> None:
    @app.remote(
        benchmark_dataset=[{"x": 1}, {"x": 2, "scale": 5}],
        benchmark_runs=5,
        workload_calculator=lambda x, scale=1: 100.0,
    )
    async def embed(x: int, scale: int = 1) -> None:
        await asyncio.sleep(0.005)

    found = measured(app)
    assert 100.0 / 0.1 < found.value <= 100.0 / 0.005


@pytest.mark.parametrize("odd", [True, -1, float("nan"), "1", None])
def test_what_is_no_workload_counts_as_the_default(app: gw.App, odd: Any) -> None:
    @app.remote(benchmark_dataset=ONE, benchmark_runs=1, workload_calculator=lambda x: odd)
    async def embed(x: int) -> None:
        await asyncio.sleep(0.005)

    assert 1 / 0.1 < measured(app).value <= 1 / 0.005


def test_a_calculator_with_other_parameters_than_its_task_is_told_of_once(
    app: gw.App, caplog: pytest.LogCaptureFixture
) -> None:
    @app.remote(benchmark_dataset=ONE, benchmark_runs=2, workload_calculator=lambda text: 9.0)
    async def embed(x: int) -> None:
        await asyncio.sleep(0.005)

    assert 1 / 0.1 < measured(app).value <= 1 / 0.005
    (told,) = [text for text in caplog.messages if "its workload_calculator" in text]
    assert "unexpected keyword argument 'x'" in told


def test_the_same_inputs_are_drawn_each_time_and_each_input_gets_its_own(app: gw.App) -> None:
    drawn: list[Any] = []

    @app.remote(benchmark_dataset=[{"xs": [n]} for n in range(50)], benchmark_runs=5)
    @gw.concurrent(max_inputs=4)
    async def embed(xs: list[int]) -> None:
        drawn.append(xs[0])
        xs.clear()

    measured(app)
    first = [*drawn]
    drawn.clear()
    measured(app)
    assert first == drawn
    assert len(set(first)) > 10


@pytest.mark.parametrize("is_async", [True, False])
def test_a_batched_method_is_measured_in_full_batches(app: gw.App, *, is_async: bool) -> None:
    batches: list[Any] = []

    def note(xs: list[int]) -> list[int]:
        batches.append(gw.current_batch())
        return xs

    class Embedder:
        if is_async:

            @gw.method(benchmark_dataset=[{"xs": 1}], benchmark_runs=4)
            @gw.batched(max_batch_size=8, wait_ms=20_000)
            async def embed(self, xs: list[int]) -> list[int]:
                return note(xs)
        else:

            @gw.method(benchmark_dataset=[{"xs": 1}], benchmark_runs=4)
            @gw.batched(max_batch_size=8, wait_ms=20_000)
            def embed(self, xs: list[int]) -> list[int]:
                return note(xs)

    app.cls(Embedder)
    measured(app)
    assert [(batch.size, batch.flush) for batch in batches] == [(8, "full")] * (2 * 5)


@pytest.mark.parametrize(
    ("concurrency", "max_inputs", "size", "expected"),
    [(10, 16, 8, 16), (10, 64, 32, 32), (100, 20, 8, 16), (4, 5, None, 4), (10, 5, None, 5)],
)
def test_how_many_inputs_a_round_starts(
    app: gw.App, concurrency: int, max_inputs: int, size: int | None, expected: int
) -> None:
    began: list[int] = []

    async def embed(xs: Any) -> Any:
        began.extend(xs if size else [xs])
        return xs

    body: Any = gw.batched(max_batch_size=size)(embed) if size else embed
    body = gw.concurrent(max_inputs=max_inputs)(body)
    app.remote(benchmark_dataset=[{"xs": 1}], benchmark_concurrency=concurrency, benchmark_runs=1)(
        body
    )
    measured(app)
    assert len(began) == 2 * expected


def test_a_synchronous_body_runs_in_a_thread_with_the_default_parameters(app: gw.App) -> None:
    seen: set[Any] = set()

    @app.cls()
    @gw.concurrent(max_inputs=2)
    class Model:
        label: str = gw.parameter(default="small")

        @gw.on_enter()
        def load(self) -> None:
            self.loaded = "weights"

        @gw.method(benchmark_dataset=ONE)
        def predict(self, x: int) -> int:
            is_main = threading.current_thread() is threading.main_thread()
            seen.add((self.label, self.loaded, is_main))
            return x

    assert measured(app).success_rate == 1.0
    assert seen == {("small", "weights", False)}


def test_a_body_knows_its_task_and_request_wherever_it_looks(app: gw.App) -> None:
    seen: list[Any] = []

    @app.remote(bind=True, benchmark_dataset=ONE, benchmark_runs=1)
    @gw.concurrent(max_inputs=4)
    async def embed(self: Any, x: int) -> None:
        def look() -> tuple[str, str, str]:
            return current_task.name, current_task.request.id, self.request.id

        found = {look()}
        await asyncio.sleep(0.001)
        found |= {look(), await asyncio.to_thread(look)}
        seen.append(found)

    measured(app)
    assert [len(found) for found in seen] == [1] * 8
    ((name, current, own),) = seen[0]
    assert name == embed.name
    assert current == own
    assert len({current for found in seen for _, current, _ in found}) == 8, "each has its own"


@pytest.mark.parametrize(
    "failure",
    [ValueError("no"), Ignore(), Retry("later"), SystemExit(3), KeyError("x"), MemoryError()],
    ids=repr,
)
def test_whatever_a_body_raises_is_a_failed_call(app: gw.App, failure: BaseException) -> None:
    @app.remote(benchmark_dataset=ONE, benchmark_runs=2)
    async def embed(x: int) -> None:
        raise failure

    with pytest.raises(NoScore, match="all of its 2 inputs failed, the first one with"):
        measured(app)


def test_some_failures_are_told_beside_the_score(app: gw.App) -> None:
    @app.remote(benchmark_dataset=[{"x": 0}, {"x": 1}], benchmark_runs=10)
    @gw.concurrent(max_inputs=10)
    async def embed(x: int) -> float:
        await asyncio.sleep(0.001)
        return 1 / x

    found = measured(app)
    assert 0.2 < found.success_rate < 0.8
    assert found.failure == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("is_async", [True, False])
def test_retry_sends_nothing_and_fails_the_input(
    app: gw.App, monkeypatch: pytest.MonkeyPatch, *, is_async: bool
) -> None:
    def fail(x: int) -> None:
        if x:
            raise ConnectionError("away")
        current_task.retry(exc=TimeoutError("slow"), countdown=0)

    async def fail_later(x: int) -> None:
        fail(x)

    if is_async:
        app.remote(autoretry_for=(ConnectionError,), benchmark_dataset=[{"x": 0}, {"x": 1}])(
            fail_later
        )
    else:

        @app.cls()
        class Model:
            @gw.method(autoretry_for=(ConnectionError,), benchmark_dataset=[{"x": 0}, {"x": 1}])
            def predict(self, x: int) -> None:
                fail(x)

    sent: list[Any] = []
    monkeypatch.setattr(Celery, "send_task", lambda self, *args, **kwargs: sent.append(args))
    with pytest.raises(NoScore, match="all of its 10 inputs failed"):
        measured(app)
    assert sent == []


def test_nothing_outside_learns_of_it(app: gw.App) -> None:
    heard: list[Any] = []

    def hear(sender: Any, **_: Any) -> None:
        heard.append(sender)

    @app.remote(benchmark_dataset=ONE, track_started=True)
    async def embed(x: int) -> None:
        embed.update_state(task_id="x", state="PROGRESS")
        return await asyncio.to_thread(embed.update_state, task_id="x", state="PROGRESS")

    kinds = ("task_prerun", "task_postrun", "task_success", "task_received", "before_task_publish")
    for kind in kinds:
        getattr(signals, kind).connect(hear)
    try:
        assert measured(app).success_rate == 1.0
    finally:
        for kind in kinds:
            getattr(signals, kind).disconnect(hear)
    assert heard == []


def test_a_generator_makes_each_input(app: gw.App) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(len(made))
        return {"x": len(made)}

    got: list[int] = []

    @app.remote(benchmark_generator=make, benchmark_runs=2)
    @gw.concurrent(max_inputs=3)
    async def embed(x: int) -> None:
        got.append(x)

    measured(app)
    assert got == [number + 1 for number in made]
    assert len(got) == 9


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (1, r"returned 1: it must return a dict"),
        ({"y": 1}, r"whose keys must match the parameters \(x: .int.\)"),
        ({}, r"missing a required argument: 'x'"),
        ({1: 2}, r"keys must match"),
        (ZeroDivisionError("no data"), r"benchmark_generator of .*embed raised ZeroDivisionError"),
        (SystemExit(3), r"benchmark_generator of .*embed raised SystemExit"),
        (asyncio.CancelledError(), r"benchmark_generator of .*embed raised CancelledError"),
    ],
)
def test_a_generator_that_makes_no_input_is_told_of(app: gw.App, made: Any, why: str) -> None:
    def make() -> Any:
        if isinstance(made, BaseException):
            raise made
        return made

    @app.remote(benchmark_generator=make)
    async def embed(x: int) -> None: ...

    with pytest.raises(NoScore, match=why):
        measured(app)


@pytest.mark.parametrize("is_async", [True, False])
def test_an_input_ends_at_the_time_limit_of_its_task(app: gw.App, *, is_async: bool) -> None:
    def hang() -> None:
        while True:
            time.sleep(0.01)

    if is_async:

        @app.remote(benchmark_dataset=ONE, timeout=0.1, benchmark_runs=1)
        async def embed(x: int) -> None:
            await asyncio.Event().wait()
    else:

        @app.cls(timeout=0.1)
        class Model:
            @gw.method(benchmark_dataset=ONE, benchmark_runs=1)
            def predict(self, x: int) -> None:
                hang()

    with pytest.raises(NoScore, match=r"TimeLimitExceeded: 0\.1 s"):
        measured(app)


def test_a_soft_limit_is_raised_in_the_body(app: gw.App) -> None:
    @app.remote(benchmark_dataset=ONE, soft_time_limit=0.05, benchmark_runs=1)
    async def embed(x: int) -> str:
        try:
            await asyncio.Event().wait()
        except SoftTimeLimitExceeded:
            return "what there is"
        return ""

    assert measured(app).success_rate == 1.0


def test_a_benchmark_that_is_given_up_leaves_nothing_behind(app: gw.App) -> None:
    ended: list[str] = []

    @app.remote(benchmark_dataset=ONE)
    @gw.concurrent(max_inputs=3)
    async def embed(x: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    with pytest.raises(NoScore, match="it was not over after 0 s"):
        measured(app, within=0.2)
    assert ended == ["ended"] * 3


def test_a_benchmark_is_given_up_though_an_input_cannot_be_ended(app: gw.App) -> None:
    go = threading.Event()

    @app.cls()
    class Model:
        @gw.method(benchmark_dataset=ONE)
        def predict(self, x: int) -> None:
            go.wait(60)

    began = time.monotonic()
    try:
        with pytest.raises(NoScore, match="it was not over"):
            measured(app, within=0.2, gw_cancel_timeout=0.1)
        assert time.monotonic() - began < 20, "before the test's own time was up"
    finally:
        go.set()


def test_each_method_is_measured_alone(app: gw.App) -> None:
    called: list[str] = []

    @app.cls()
    class Model:
        @gw.method(benchmark_dataset=ONE, benchmark_runs=1)
        async def embed(self, x: int) -> None:
            called.append("embed")

        @gw.method(benchmark_dataset=ONE, benchmark_runs=1)
        async def rank(self, x: int) -> None:
            called.append("rank")

    assert measured(app, name="rank").task.endswith("Model.rank")
    assert set(called) == {"rank"}


def test_what_cannot_be_measured_has_no_score(app: gw.App) -> None:
    @app.remote()
    async def embed(x: int) -> None: ...

    @app.celery.task
    def plain() -> None: ...

    with child_harness.child_of(app) as child:
        for number, (name, why) in enumerate(
            [
                (embed.name, f"{embed.name} declares no benchmark"),
                (plain.name, "no task of this name is served here"),
                ("gone", "no task of this name is served here"),
            ]
        ):
            child.send(Order.BENCHMARK, number, name, 30.0, False)
            (answer,) = child.answer(Report.MEASURED, number)
            assert json.loads(answer) == {"failure": why}
