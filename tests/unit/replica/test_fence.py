"""A child stores and announces nothing once its worker was declared lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import current_task, signals

import gw_celery as gw
from tests import child_harness, outages, services
from tests.child_harness import Outcome, Report
from tests.processes import eventually

LOST = "w@host:1.0"
FENCED = (Report.ERROR, Outcome.FENCED, "DeclaredLost")
UNSTORED = (Report.ERROR, Outcome.UNSTORED)
SIGNATURE = {"task": "unit.other", "args": [], "kwargs": {}, "options": {}, "immutable": True}


def held(tag: Any = f"{LOST}/7", **more: Any) -> dict[str, Any]:
    """Headers of an input whose message has such a delivery tag."""
    return {"properties": {"delivery_tag": tag}, **more}


@pytest.fixture
def results(result_url: str) -> Iterator[redis.Redis]:
    with services.redis_at(result_url) as client:
        yield client


@pytest.fixture
def broker(redis_url: str) -> Iterator[redis.Redis]:
    with services.redis_at(redis_url) as client:
        yield client


@pytest.fixture
def published() -> Iterator[list[str]]:
    """The ids of what this process publishes."""
    ids: list[str] = []

    def note(headers: Any = None, **_: Any) -> None:
        ids.append(headers["id"])

    signals.before_task_publish.connect(note)
    yield ids
    signals.before_task_publish.disconnect(note)


def declare(app: gw.App, body: Callable[..., Any], **options: Any) -> str:
    if asyncio.iscoroutinefunction(body):
        return str(app.remote(**options)(gw.concurrent(max_inputs=50)(body)).name)
    return str(app.celery.task(body, **options).name)


async def answers(x: Any = None) -> Any:
    return x


def answers_in_thread(x: Any = None) -> Any:
    return x


async def fails(x: int) -> None:
    raise ValueError(x)


def fails_in_thread(x: int) -> None:
    raise ValueError(x)


async def retries(x: int) -> None:
    raise current_task.retry(exc=ValueError("later"), countdown=1)


def retries_in_thread(x: int) -> None:
    raise current_task.retry(exc=ValueError("later"), countdown=1)


async def replaces(x: int) -> Any:
    return current_task.replace(current_task.app.signature("unit.other"))


async def says_progress(x: int) -> int:
    current_task.update_state(state="PROGRESS", meta={"done": 1})
    return x


BODIES = [answers, answers_in_thread, fails, fails_in_thread, retries, replaces, says_progress]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("body", BODIES)
def test_a_worker_that_was_declared_lost_stores_nothing(
    app: gw.App,
    body: Any,
    result_url: str,
    results: redis.Redis,
    published: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = declare(app, body)
    results.set(f"gw:dead:{LOST}", "other")
    with child_harness.child_of(app, backend=result_url) as child, results.pubsub() as told:
        told.psubscribe("*")
        eventually(lambda: told.get_message(timeout=0.1))
        assert child.outcome(child.run(task, 1, **held())) == FENCED
        assert child.outcome(child.run(task, 1, **held("w@host:1.1/8"))) != FENCED
        assert results.get(f"celery-task-meta-{child.id(1)}") is None
        assert child.id(1).encode() not in str(told.get_message(timeout=0.1)).encode()
        assert [
            line for line in caplog.messages if "declared lost" in line and "reject" not in line
        ]
        assert child.id(1) not in published
        assert not [record for record in caplog.records if record.levelno >= logging.CRITICAL]


@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
def test_the_fence_and_a_stored_success_hold_with_every_serializer(
    app: gw.App, result_url: str, results: redis.Redis, serializer: str
) -> None:
    done, failed = declare(app, answers), declare(app, fails)
    results.set(f"gw:dead:{LOST}", "other")
    settings = {"result_serializer": serializer, "result_accept_content": [serializer]}
    with child_harness.child_of(app, backend=result_url, **settings) as child:
        assert child.outcome(child.run(done, 1, **held())) == FENCED
        assert results.get(f"celery-task-meta-{child.id(1)}") is None
        assert child.outcome(child.run(done, "first", id="same", **held("w/1")))[0] == Report.DONE
        stored = results.get("celery-task-meta-same")
        child.outcome(child.run(failed, 1, id="same", **held("w/2")))
        assert results.get("celery-task-meta-same") == stored
        child.outcome(child.run(failed, 1, id="again"))
        assert child.outcome(child.run(done, 1, id="again"))[0] == Report.DONE
        assert app.celery.AsyncResult("again").state == "SUCCESS"


def test_a_success_that_another_worker_stores_meanwhile_stays(
    app: gw.App, result_url: str, results: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A serializer that the script cannot read: what was read is compared."""
    task = declare(app, fails_in_thread)
    settings = {"result_serializer": "yaml", "result_accept_content": ["yaml"]}
    success = "result: 1\nstatus: SUCCESS\n"
    with child_harness.child_of(app, backend=result_url, **settings) as child:
        backend: Any = app.celery.backend
        run_script = backend.run_script

        def store_before(*arguments: Any) -> Any:
            results.set("celery-task-meta-same", success, nx=True)
            return run_script(*arguments)

        monkeypatch.setattr(backend, "run_script", store_before)
        child.outcome(child.run(task, 1, id="same"))
        assert results.get("celery-task-meta-same") == success.encode()


@pytest.mark.parametrize("tag", [7, "8a6d-43", None, "w@host:1.0", "w/x"])
def test_a_message_without_a_hold_is_stored(
    app: gw.App, result_url: str, results: redis.Redis, tag: Any
) -> None:
    task = declare(app, answers)
    results.set(f"gw:dead:{LOST}", "other")
    with child_harness.child_of(app, backend=result_url) as child:
        assert child.outcome(child.run(task, 1, **held(tag)))[0] == Report.DONE


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        (answers, "callbacks", [SIGNATURE]),
        (answers_in_thread, "callbacks", [SIGNATURE]),
        (answers, "chain", [SIGNATURE]),
        (fails, "errbacks", [SIGNATURE]),
        (fails_in_thread, "errbacks", [SIGNATURE]),
    ],
)
@pytest.mark.parametrize("ignores", [False, True])
def test_it_announces_nothing_either(
    app: gw.App,
    body: Any,
    name: str,
    value: Any,
    ignores: bool,
    result_url: str,
    results: redis.Redis,
    published: list[str],
) -> None:
    task = declare(app, body, ignore_result=ignores)
    embed = {name: value}
    with child_harness.child_of(app, backend=result_url) as child:
        child.outcome(child.run(task, 1, embed=embed, **held()))
        assert len(published) == 1
        results.set(f"gw:dead:{LOST}", "other")
        assert child.outcome(child.run(task, 1, embed=embed, **held())) == FENCED
        assert len(published) == 1


@pytest.mark.parametrize("body", [retries, retries_in_thread, replaces])
def test_it_neither_retries_nor_replaces(
    app: gw.App, body: Any, result_url: str, results: redis.Redis, published: list[str]
) -> None:
    task = declare(app, body)
    with child_harness.child_of(app, backend=result_url) as child:
        child.outcome(child.run(task, 1, **held()))
        assert len(published) == 1
        results.set(f"gw:dead:{LOST}", "other")
        assert child.outcome(child.run(task, 1, **held())) == FENCED
        assert len(published) == 1


@pytest.mark.parametrize("body", [answers, answers_in_thread, fails])
def test_results_elsewhere_ask_the_broker(
    app: gw.App, body: Any, redis_url: str, broker: redis.Redis
) -> None:
    app.celery.conf.broker_url = redis_url
    task = declare(app, body)
    with child_harness.child_of(app) as child:
        child.outcome(child.run(task, 1, **held()))
        assert len(child.store.states) == 1
        broker.set(f"gw:dead:{LOST}", "other")
        assert child.outcome(child.run(task, 1, **held())) == FENCED
        assert len(child.store.states) == 1


def test_results_elsewhere_do_not_wait_for_a_broker_that_is_away(app: gw.App) -> None:
    app.celery.conf.broker_url = "redis://127.0.0.1:1"
    task = declare(app, answers)
    with child_harness.child_of(app) as child:
        assert child.outcome(child.run(task, 1, **held()))[0] == Report.DONE


def test_a_server_that_has_forgotten_the_script_learns_it_again(
    app: gw.App, result_url: str, results: redis.Redis
) -> None:
    task, other = declare(app, answers), declare(app, answers_in_thread)
    with child_harness.child_of(app, backend=result_url) as child:
        for name in (task, other):
            results.script_flush()
            numbers = [child.run(name, 1) for _ in range(3)]
            assert {child.outcome(number)[0] for number in numbers} == {Report.DONE}
        assert child.outages() == []


def test_an_input_knows_the_name_of_its_hold(app: gw.App, result_url: str) -> None:
    async def asks() -> Any:
        return await asyncio.to_thread(gw.hold_id), gw.hold_id()

    def asks_in_thread() -> Any:
        return gw.hold_id()

    @app.remote()
    @gw.batched(max_batch_size=2, wait_ms=1)
    async def asks_batched(xs: list[int]) -> list[Any]:
        return [gw.hold_id() for _ in xs]

    here, there = declare(app, asks), declare(app, asks_in_thread)
    assert gw.hold_id() is None
    with child_harness.child_of(app, backend=result_url) as child:
        hold = f"{LOST}/7"
        assert child.outcome(child.run(here, **held())) == (Report.DONE, str((hold, hold)))
        assert child.outcome(child.run(there, **held())) == (Report.DONE, repr(hold))
        assert child.outcome(child.run(there, **held(7))) == (Report.DONE, "None")
        assert child.outcome(child.run(asks_batched.name, 1, **held())) == (Report.DONE, "None")


def test_eager_mode_has_no_holds(app: gw.App) -> None:
    async def asks() -> Any:
        return gw.hold_id()

    name = declare(app, asks)
    app.celery.conf.task_always_eager = True
    assert app.celery.tasks[name].delay().get() is None


# -- a server that is there, and refuses --


@pytest.fixture
def server(tmp_path: Path) -> Iterator[outages.Outage]:
    with outages.outage(tmp_path / "results") as made:
        yield made


@pytest.mark.parametrize("kind", outages.REFUSALS)
@pytest.mark.parametrize("body", [answers, fails_in_thread])
def test_a_refusal_is_an_outage_like_any_other(
    app: gw.App,
    body: Any,
    kind: str,
    server: outages.Outage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task, ended = declare(app, body), {Report.DONE, Report.ERROR}
    with child_harness.child_of(app, backend=server.server.result_url) as child:
        assert child.outcome(child.run(task, 0))[0] in ended
        with outages.refusing(server.server.socket, kind):
            numbers = [child.run(task, x) for x in range(1, 6)]
            (reason,) = eventually(child.outages)
            assert not {Report.DONE, Report.ERROR} & {
                kind for number in numbers for kind in child.told(number)
            }
        outcomes = {child.outcome(number)[:2] for number in numbers}
        assert UNSTORED not in outcomes
        states = server.states([child.id(number) for number in numbers])
        assert states == {"SUCCESS" if body is answers else "FAILURE"}
        eventually(lambda: child.outages() == [reason, ""])
        begun = [line for line in caplog.messages if "results cannot be stored: " in line]
        assert len(begun) == 1
        eventually(lambda: [line for line in caplog.messages if "outage is over" in line])


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
@pytest.mark.parametrize("kind", ["READONLY", "NOPERM"])
def test_a_refusal_that_lasts_gives_inputs_up_and_ends_with_a_write_only(
    app: gw.App, kind: str, server: outages.Outage
) -> None:
    """Such a server answers a PING, and a GET."""
    task = declare(app, answers)
    settings = {"gw_store_timeout": 0.1}
    with child_harness.child_of(app, backend=server.server.result_url, **settings) as child:
        assert child.outcome(child.run(task, 0))[0] == Report.DONE
        with outages.refusing(server.server.socket, kind):
            lost = [child.run(task, 1), child.run(task, 2)]
            assert [child.outcome(number)[:2] for number in lost] == [UNSTORED, UNSTORED]
            assert len(child.outages()) == 1
        eventually(lambda: child.outages()[1:] == [""])
        assert child.outcome(child.run(task, 3)) == (Report.DONE, "3")


def test_one_refused_command_among_others_is_tried_again_alone(
    app: gw.App, server: outages.Outage
) -> None:
    """As where the access rules of a user name keys."""
    task = declare(app, answers)
    with (
        child_harness.child_of(app, backend=server.server.result_url) as child,
        redis.Redis(unix_socket_path=str(server.server.socket)) as client,
    ):
        allowed = [redis_key("good*"), "gw:*"]
        client.acl_setuser("default", enabled=True, reset_keys=True, keys=allowed)
        good, bad = child.run(task, 1, id="good"), child.run(task, 2, id="bad")
        assert child.outcome(good)[0] == Report.DONE
        (reason,) = eventually(child.outages)
        assert child.told(bad) == [Report.ACCEPT]
        client.acl_setuser("default", enabled=True, reset_keys=True, keys=["*"])
        assert child.outcome(bad)[0] == Report.DONE
        eventually(lambda: child.outages() == [reason, ""])


def redis_key(name: str) -> str:
    return f"celery-task-meta-{name}"
