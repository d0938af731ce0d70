"""What a child writes to its result backend, from where, and what becomes of it in an outage."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, current_task, states
from celery.backends.redis import RedisBackend
from celery.utils import imports

import gw_celery as gw
from gw_celery.testing import workers
from tests import child_harness, outages, services
from tests.child_harness import DEADLINE, Order, Outcome, Report
from tests.processes import eventually

Serve = Callable[..., child_harness.Child]
UNSTORED = (Report.ERROR, Outcome.UNSTORED)


@pytest.fixture
def results(result_url: str) -> Iterator[redis.Redis]:
    with services.redis_at(result_url) as client:
        yield client


def key(child: child_harness.Child, number: int) -> str:
    return f"celery-task-meta-{child.id(number)}"


def status(results: redis.Redis, child: child_harness.Child, number: int) -> str | None:
    stored = results.get(key(child, number))
    return json.loads(stored)["status"] if stored else None


def declare(app: gw.App, body: Callable[..., Any], **options: Any) -> str:
    """Declare ``body`` as a task that runs on the loop, or in a thread; return its name."""
    if asyncio.iscoroutinefunction(body):
        return str(app.remote(**options)(gw.concurrent(max_inputs=50)(body)).name)
    # A synchronous function of Celery's own: any task may be served.
    return str(app.celery.task(body, **options).name)


async def answers(x: Any = None) -> Any:
    return x


def answers_in_thread(x: Any = None) -> Any:
    return x


# -- every backend --


async def says_progress(x: int) -> int:
    current_task.update_state(state="PROGRESS", meta={"done": 1})
    return x


async def fails(x: int) -> None:
    raise ValueError(x)


async def retries(x: int) -> None:
    raise current_task.retry(exc=ValueError("later"), countdown=1)


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        (answers, ["STARTED", "SUCCESS"]),
        (says_progress, ["STARTED", "PROGRESS", "SUCCESS"]),
        (fails, ["STARTED", "FAILURE"]),
        (retries, ["STARTED", "RETRY"]),
    ],
)
def test_every_write_of_an_input_on_the_loop_is_made_in_a_thread(
    app: gw.App, body: Any, stored: list[str]
) -> None:
    task = declare(app, body, track_started=True)
    with child_harness.child_of(app) as child:
        child.outcome(child.run(task, 1))
        assert child.store.states == stored
        assert {name.rpartition("_")[0] for name in child.store.threads} == {"gw-store"}


def test_a_look_at_a_result_is_taken_from_a_thread(app: gw.App) -> None:
    """Django refuses it on a loop."""
    task = declare(app, answers)
    settings = {"worker_deduplicate_successful_tasks": True, "task_acks_late": True}
    with child_harness.child_of(app, **settings) as child:
        again = {"delivery_info": {"redelivered": True}}
        assert child.outcome(child.run(task, 1, **again)) == (Report.DONE, "1")
        assert len(child.store.threads) > len(child.store.states)
        assert {name.rpartition("_")[0] for name in child.store.threads} == {"gw-store"}


def test_an_input_in_a_thread_stores_from_its_own(app: gw.App) -> None:
    task = declare(app, answers_in_thread)
    with child_harness.child_of(app) as child:
        assert child.outcome(child.run(task, 1)) == (Report.DONE, "1")
        assert {name.rpartition("_")[0] for name in child.store.threads} == {"gw-body"}


def test_a_result_that_cannot_be_stored_fails_its_input(app: gw.App) -> None:
    task = declare(app, answers_a_lock)
    with child_harness.child_of(app) as child:
        assert child.outcome(child.run(task))[:2] == (Report.ERROR, Outcome.FAILURE)
        assert child.store.states[-1] == "FAILURE"


async def answers_a_lock() -> Any:
    return threading.Lock()


def test_an_app_without_results_needs_none(app: gw.App) -> None:
    task = declare(app, answers)
    with child_harness.child_of(app, backend="disabled://") as child:
        assert child.outcome(child.run(task, 1)) == (Report.DONE, "1")


@pytest.fixture
def installed_later() -> Iterator[None]:
    """Celery 5.7 remembers which packages have backends."""
    forget = getattr(imports.load_extension_class_names, "cache_clear", lambda: None)
    forget()
    yield
    forget()


@pytest.mark.usefixtures("installed_later")
def test_a_backend_of_another_package_stores_off_the_loop_too(
    app: gw.App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As django-celery-results has its own: Celery lets its name win over every override."""
    (tmp_path / "gw_test_results.py").write_text(
        "from tests.child_harness import HeldBackend\nclass Ours(HeldBackend): ...\n"
    )
    (tmp_path / "gw_test_results-1.dist-info").mkdir()
    (tmp_path / "gw_test_results-1.dist-info" / "METADATA").write_text("Name: gw_test_results\n")
    (tmp_path / "gw_test_results-1.dist-info" / "entry_points.txt").write_text(
        "[celery.result_backends]\ngw-test = gw_test_results:Ours\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task = declare(app, answers)
    with child_harness.child_of(app, backend="gw-test", cache_backend="memory") as child:
        assert child.outcome(child.run(task, 1)) == (Report.DONE, "1")
        assert child.store.states == ["SUCCESS"]
        assert {name.rpartition("_")[0] for name in child.store.threads} == {"gw-store"}


# -- Redis --


@pytest.fixture(params=[answers, answers_in_thread])
def task(request: pytest.FixtureRequest, app: gw.App) -> str:
    """The name of a task that answers with its argument, on the loop or in a thread."""
    return declare(app, request.param)


def test_a_result_is_stored_for_its_time_and_those_who_wait_are_told(
    app: gw.App, task: str, results: redis.Redis, result_url: str
) -> None:
    with (
        child_harness.child_of(app, backend=result_url, result_expires=60) as child,
        results.pubsub() as told,
    ):
        told.subscribe(key(child, 1))
        eventually(lambda: told.get_message(timeout=0.1))
        assert child.outcome(child.run(task, "answer"))[0] == Report.DONE
        assert child.result(1) == "answer"
        assert 0 < results.ttl(key(child, 1)) <= 60
        message: Any = eventually(lambda: told.get_message(timeout=0.1))
        assert json.loads(message["data"])["status"] == "SUCCESS"


def test_a_result_without_a_lifetime_is_kept_for_ever(
    app: gw.App, task: str, results: redis.Redis, result_url: str
) -> None:
    with child_harness.child_of(app, backend=result_url, result_expires=None) as child:
        child.outcome(child.run(task))
        assert results.ttl(key(child, 1)) == -1


def test_a_success_that_is_stored_is_not_written_over(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    task = declare(app, fails)
    with child_harness.child_of(app, backend=result_url) as child:
        results.set(key(child, 1), json.dumps({"status": "SUCCESS", "result": 1}))
        assert child.outcome(child.run(task, 1))[0] == Report.ERROR
        assert status(results, child, 1) == "SUCCESS"


def test_a_body_may_store_with_a_lifetime_of_its_own_and_by_name(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    @app.remote()
    async def stores() -> None:
        backend = app.celery.backend
        backend.set("mine", "value", expires=5)
        backend.set("kept", "value", expires=0)
        backend.mark_as_done(
            task_id="other", result="x", request=None, store_result=True, state="DONE"
        )

    with child_harness.child_of(app, backend=result_url) as child:
        assert child.outcome(child.run(stores.name))[0] == Report.DONE
    assert 0 < results.ttl("mine") <= 5
    assert results.ttl("kept") == -1
    assert json.loads(results.get("celery-task-meta-other") or "")["status"] == "DONE"


def test_what_the_loop_cannot_wait_for_is_written_all_the_same(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    @app.remote()
    async def works() -> None:
        async def part() -> None:  # another task than the input's: nothing parks it
            app.celery.backend.set("part", "value")

        await asyncio.gather(part())

    with child_harness.child_of(app, backend=result_url) as child:
        assert child.outcome(child.run(works.name))[0] == Report.DONE
    assert results.get("part") == b"value"


def together(app: gw.App, at: int) -> str:
    """A task whose inputs wait in their bodies until there are so many; its name."""
    present: list[int] = []
    all_here = asyncio.Event()

    @app.remote()
    @gw.concurrent(max_inputs=at)
    async def wait(x: int) -> int:
        present.append(x)
        if len(present) == at:
            all_here.set()
        await all_here.wait()
        return x

    return str(wait.name)


def test_results_that_are_ready_together_share_round_trips(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    many = 100
    task = together(app, many)
    with child_harness.child_of(app, backend=result_url) as child:
        before = results.info("stats")["total_reads_processed"]
        numbers = [child.run(task, x) for x in range(many)]
        assert [child.outcome(number) for number in numbers] == [
            (Report.DONE, str(x)) for x in range(many)
        ]
        assert results.info("stats")["total_reads_processed"] - before < many
        assert {status(results, child, number) for number in numbers} == {"SUCCESS"}


def test_a_refused_command_fails_the_one_that_waits_for_it(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    task = together(app, 5)
    with child_harness.child_of(app, backend=result_url) as child:
        results.lpush(key(child, 3), "no result")
        outcomes = [child.outcome(number) for number in [child.run(task, x) for x in range(5)]]
    assert [outcome[:2] for outcome in outcomes] == [
        UNSTORED if x == 2 else (Report.DONE, str(x)) for x in range(5)
    ]


def test_a_result_too_large_for_redis_fails_alone(
    app: gw.App, result_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis would close the connection, and its group would be tried again until the limit."""
    monkeypatch.setattr(RedisBackend, "_MAX_STR_VALUE_SIZE", 2000)
    task = declare(app, answers)
    with child_harness.child_of(app, backend=result_url) as child:
        large, small = child.run(task, "x" * 3000), child.run(task, "x")
        assert child.outcome(large)[:2] in (UNSTORED, (Report.ERROR, Outcome.FAILURE))
        assert child.outcome(small)[0] == Report.DONE
        assert child.outages() == []


@pytest.mark.parametrize(
    ("body", "name", "header"),
    [
        (fails, "mark_as_failure", {}),
        (answers, "on_chord_part_return", {"group": "g"}),
    ],
)
def test_what_may_publish_is_called_in_a_thread(
    app: gw.App,
    result_url: str,
    monkeypatch: pytest.MonkeyPatch,
    body: Any,
    name: str,
    header: dict[str, Any],
) -> None:
    threads: list[str] = []

    def note(self: Any, *_: Any, **__: Any) -> None:
        threads.append(threading.current_thread().name)

    monkeypatch.setattr(RedisBackend, name, note)
    task = declare(app, body)
    with child_harness.child_of(app, backend=result_url) as child:
        chord = {"task": "t", "kwargs": {}, "args": [], "options": {}}
        child.outcome(child.run(task, 1, embed={"chord": chord} if header else None, **header))
    assert [thread.rpartition("_")[0] for thread in threads] == ["gw-store"]


# -- a Redis that is away --


@pytest.fixture
def server(tmp_path: Path) -> Iterator[outages.Outage]:
    with outages.outage(tmp_path / "results") as made:
        yield made


def test_results_wait_for_a_server_that_is_away_and_the_parent_is_told(
    app: gw.App, task: str, server: outages.Outage
) -> None:
    with child_harness.child_of(app, backend=server.server.result_url) as child:
        assert child.outcome(child.run(task, 0))[0] == Report.DONE
        assert child.outages() == []
        server.stop()
        numbers = [child.run(task, x) for x in range(1, 6)]
        (reason,) = eventually(child.outages)
        assert "Error" in reason
        server.start()
        assert {child.outcome(number)[0] for number in numbers} == {Report.DONE}
        assert server.states([child.id(number) for number in numbers]) == {"SUCCESS"}
        eventually(lambda: child.outages() == [reason, ""])


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
def test_what_was_given_up_is_unstored_and_no_failure_of_the_task(
    app: gw.App, task: str, server: outages.Outage
) -> None:
    """The tracer would store a failure, with time of its own, and the input would not run again."""
    settings = {"gw_store_timeout": 0.1}
    with child_harness.child_of(app, backend=server.server.result_url, **settings) as child:
        server.stop()
        began = time.monotonic()
        lost = [child.run(task, 1), child.run(task, 2)]
        assert [child.outcome(number)[:2] for number in lost] == [UNSTORED, UNSTORED]
        assert time.monotonic() - began >= 0.1
        assert len(child.outages()) == 1
        server.start()
        # Nothing is left that would be stored.
        eventually(lambda: child.outages()[1:] == [""])
        assert child.outcome(child.run(task, 3)) == (Report.DONE, "3")
        assert server.states([child.id(number) for number in (1, 2, 3)]) == {"PENDING", "SUCCESS"}


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
def test_a_server_that_answers_the_probe_with_another_error_is_back(
    app: gw.App, task: str, server: outages.Outage
) -> None:
    url, settings = server.server.result_url, {"gw_store_timeout": 0.1}
    with child_harness.child_of(app, backend=url, **settings) as child:
        assert child.outcome(child.run(task, 0))[0] == Report.DONE
        with services.redis_at(url) as client:
            client.lpush("gw:probe", "no string")
        server.stop()
        assert child.outcome(child.run(task, 1))[:2] == UNSTORED
        server.start()
        eventually(lambda: child.outages()[1:] == [""])


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
def test_a_server_that_is_back_at_once_is_not_told_that_the_task_has_failed(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    """What the tracer stores when a write of its was given up."""
    task = declare(app, answers)
    with child_harness.child_of(app, backend=result_url, gw_store_timeout=1e-6) as child:
        assert child.outcome(child.run(task, 0))[0] == Report.DONE
        (client,) = child.clients
        send, sent = client.pipeline, []

        def send_but_the_first(**options: Any) -> Any:
            sent.append(options)
            if len(sent) == 1:
                raise redis.ConnectionError("away for a moment")
            return send(**options)

        client.pipeline = send_but_the_first
        number = child.run(task, 1)
        assert child.outcome(number)[:2] == UNSTORED
        assert status(results, child, number) is None


def test_results_that_are_ready_soon_after_each_other_share_round_trips(
    app: gw.App, result_url: str
) -> None:
    go = asyncio.Event()

    @app.remote()
    @gw.concurrent(max_inputs=2)
    async def wait(x: float) -> float:
        await (asyncio.sleep(x) if go.is_set() else go.wait())
        await asyncio.sleep(x)
        return x

    with child_harness.child_of(app, backend=result_url) as child:
        go.set()
        assert child.outcome(child.run(wait.name, 0))[0] == Report.DONE
        go.clear()
        (client,) = child.clients
        send, sent = client.pipeline, []

        def note(**options: Any) -> Any:
            sent.append(options)
            return send(**options)

        client.pipeline = note
        numbers = [child.run(wait.name, x) for x in (0, 0.001)]
        child.settle()
        child.call(go.set)
        assert {child.outcome(number)[0] for number in numbers} == {Report.DONE}
        assert len(sent) == 1


def test_an_input_that_is_stopped_while_it_waits_for_a_server_disturbs_no_other(
    app: gw.App, server: outages.Outage
) -> None:
    task = declare(app, says_progress)
    with child_harness.child_of(app, backend=server.server.result_url) as child:
        server.stop()
        stopped, stays = child.run(task, 1), child.run(task, 2)
        eventually(child.outages)
        child.stop(stopped)
        assert child.outcome(stopped) == (Report.ERROR, Outcome.IGNORE, "Ignore")
        server.start()
        assert child.outcome(stays) == (Report.DONE, "2")
        assert server.states([child.id(stays)]) == {"SUCCESS"}


# -- the records of inputs that are acknowledged when they begin --

RECORDS = "gw:early:w@h:1"


def holding(app: gw.App, results: redis.Redis, **options: Any) -> tuple[str, list[int], Any]:
    """A task that notes how many records there are; its name, what it noted, and what ends it."""
    seen: list[int] = []
    go = threading.Event()

    @app.celery.task(name="unit.holds", **options)
    def hold(x: int) -> int:
        seen.append(results.hlen(RECORDS))
        assert go.wait(DEADLINE)
        return x

    return str(hold.name), seen, go


def test_a_record_is_there_before_its_input_begins_and_until_it_has_ended(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    task, seen, go = holding(app, results, acks_late=False)
    with child_harness.child_of(app, backend=result_url, worker="w@h:1") as child:
        number = child.run(task, 1, embed={"errbacks": [{"task": "note"}]})
        eventually(lambda: child.told(number) == [Report.ACCEPT])
        (record,) = results.hvals(RECORDS)
        assert child.id(number).encode() in record
        assert b"note" in record
        assert b"[1" not in record, "not what it was called with"
        go.set()
        assert child.outcome(number)[0] == Report.DONE
        eventually(lambda: not results.exists(RECORDS))
    assert seen == [1]


def test_a_batched_input_is_on_record_when_its_batch_begins(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    seen: list[int] = []

    @app.remote(acks_late=False)
    @gw.batched(max_batch_size=2, wait_ms=10_000)
    async def embed(x: list[int]) -> list[int]:
        seen.append(results.hlen(RECORDS))
        return x

    with child_harness.child_of(app, backend=result_url, worker="w@h:1") as child:
        first = child.run(embed.name, 1)
        child.settle()
        assert (child.told(first), results.hlen(RECORDS)) == ([], 0)
        second = child.run(embed.name, 2)
        assert {child.outcome(first)[0], child.outcome(second)[0]} == {Report.DONE}
        eventually(lambda: not results.exists(RECORDS))
    assert seen == [2]


@pytest.mark.parametrize(("acks_late", "worker"), [(True, "w@h:1"), (False, None)])
def test_nothing_is_recorded_that_would_not_be_looked_for(
    app: gw.App, result_url: str, results: redis.Redis, acks_late: bool, worker: str | None
) -> None:
    task, seen, go = holding(app, results, acks_late=acks_late)
    go.set()
    with child_harness.child_of(app, backend=result_url, worker=worker) as child:
        assert child.outcome(child.run(task, 1)) == (Report.DONE, "1")
    assert seen == [0]


def test_a_backend_that_keeps_no_records_is_asked_for_none(app: gw.App) -> None:
    task = declare(app, answers, acks_late=False)
    with child_harness.child_of(app, worker="w@h:1") as child:
        assert child.outcome(child.run(task, 1)) == (Report.DONE, "1")


def test_without_redis_an_early_input_starts_all_the_same(
    app: gw.App, server: outages.Outage, caplog: pytest.LogCaptureFixture
) -> None:
    task = declare(app, answers, acks_late=False, ignore_result=True)
    settings = {"gw_store_timeout": 0.1}
    url = server.server.result_url
    with child_harness.child_of(app, backend=url, worker="w@h:1", **settings) as child:
        server.stop()
        number = child.run(task, 1, ignore_result=True)
        assert child.outcome(number) == (Report.DONE, "1")
        assert child.told(number) == [Report.ACCEPT, Report.DONE]
        eventually(lambda: f"the record of task {task}[{child.id(number)}] stays" in caplog.text)
    assert f"{task}[{child.id(number)}] starts without a record" in caplog.text


def test_callbacks_that_cannot_be_written_cost_their_record_only(
    app: gw.App, result_url: str, results: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    task, seen, go = holding(app, results, acks_late=False)
    go.set()
    with child_harness.child_of(app, backend=result_url, worker="w@h:1") as child:
        assert child.outcome(child.run(task, 1, embed={"chain": [object()]}))[0] == Report.ERROR
    assert seen == [1]
    assert "has callbacks that cannot be recorded" in caplog.text


def test_a_benchmark_and_its_body_store_nothing(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    @app.remote(benchmark_dataset=[{"x": 1}], benchmark_runs=1, track_started=True)
    async def embed(x: int) -> None:
        embed.update_state(task_id="of a benchmark", state="PROGRESS")
        await asyncio.to_thread(embed.update_state, task_id="of a benchmark", state="PROGRESS")
        result = app.celery.AsyncResult("of a benchmark")
        assert result.state == states.PENDING, "a look at a result is taken"

    with child_harness.child_of(app, backend=result_url) as child:
        child.send(Order.BENCHMARK, 1, embed.name, 30.0, False)
        assert "score" in json.loads(child.answer(Report.MEASURED, 1)[0])
    assert results.keys("celery-task-meta-*") == []


def test_clients_read_what_a_child_stored(app: gw.App, task: str, result_url: str) -> None:
    with child_harness.child_of(app, backend=result_url) as child:
        number = child.run(task, {"a": [1, 2]})
        assert child.outcome(number)[0] == Report.DONE
        with Celery("client", backend=result_url, set_as_current=False) as client:
            gw.preset(client)
            assert client.AsyncResult(child.id(number)).get(timeout=DEADLINE) == {"a": [1, 2]}
            workers.close_results(client)
