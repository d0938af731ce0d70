"""Calling our tasks from clients: Celery's ways, and ours, with answers and errors."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import ledger
import pytest
import served
from celery import chain, chord, group
from celery.exceptions import Ignore, TaskRevokedError

from gw_celery import errors, testing
from tests import processes
from tests.processes import eventually

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def module_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calling") / "ledger"


@pytest.fixture(scope="module", autouse=True)
def worker(redis_server: testing.Server, module_ledger: Path) -> Iterator[processes.WorkerProcess]:
    """One worker for this module: its tests look at answers, not at processes."""
    log_dir = module_ledger.parent
    with processes.workers(log_dir, redis_server.broker_url, redis_server.result_url) as start:
        yield start(
            "served:celery",
            pool="prefork",
            concurrency=8,
            queues="cpu,celery",
            env={"LEDGER": str(module_ledger)},
        )


@pytest.fixture(autouse=True)
def this_server(redis_server: testing.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike ``redis_url``, this keeps what the worker of the module has in its server."""
    monkeypatch.setenv("CELERY_BROKER_URL", redis_server.broker_url)
    monkeypatch.setenv("CELERY_RESULT_BACKEND", redis_server.result_url)


def test_every_way_to_call_gives_the_answer() -> None:
    async def all_ways() -> list[Any]:
        return [
            await served.square(5),
            await served.square.aremote(5),
            await served.square.spawn(5),
            await served.Classifier(threshold=0.9).classify(0.8),
        ]

    assert served.square.delay(5).get(timeout=10) == 25
    assert served.square.apply_async((5,), countdown=0.1).get(timeout=10) == 25
    assert served.square.remote(5) == 25
    assert served.square.spawn(5).get(timeout=10) == 25
    assert served.Classifier(threshold=0.9).classify.delay(0.8).get(timeout=10) == "negative"
    assert asyncio.run(all_ways()) == [25, 25, 25, "negative"]


def test_calls_in_a_body_name_it_as_their_parent() -> None:
    own, *named = served.parents.remote()
    assert named == [own, own]


def test_canvas_works_with_our_tasks_and_class_methods() -> None:
    assert chain(served.square.s(2), served.plain.s(), served.square.s())().get(timeout=10) == 25
    assert group(served.square.s(x) for x in range(4))().get(timeout=10) == [0, 1, 4, 9]
    total = chord([served.square.s(x) for x in range(4)])(served.echo.s())
    assert total.get(timeout=10) == [0, 1, 4, 9]
    labelled = chain(served.echo.s(0.8), served.Classifier(threshold=0.9).classify.s())
    assert labelled().get(timeout=10) == "negative"
    assert chain(served.echo.s(1), served.square.si(3))().get(timeout=10) == 9


def test_retry_and_autoretry_run_the_body_again() -> None:
    assert served.retried.delay(2).get(timeout=10) == (2, True)
    assert served.autoretried.delay(2).get(timeout=10) == 2.0
    with pytest.raises(ZeroDivisionError):
        served.autoretried.delay(9).get(timeout=10)


def test_a_retry_keeps_the_parameters_of_a_class_task() -> None:
    assert served.Classifier(threshold=0.9).on_second_thoughts.remote(0.8) == "negative"
    assert served.Classifier().on_second_thoughts.remote(0.8) == "positive"


def test_ignore_and_reject_are_celerys(module_ledger: Path) -> None:
    sent = served.ignored.delay()
    eventually(lambda: sent.state == "CUSTOM")
    assert Ignore.__name__ not in str(sent.result)
    rejected = served.rejected.delay()
    eventually(lambda: ledger.words(module_ledger, "rejected"))
    assert served.square.remote(2) == 4
    assert rejected.state in ("PENDING", "FAILURE")  # Celery 5.6, 5.7
    assert len(ledger.words(module_ledger, "rejected")) == 1


def test_replace_hands_the_answer_over() -> None:
    assert served.replaced.delay(4).get(timeout=10) == 16


def test_pydantic_models_arrive_validated_and_come_back_as_dicts() -> None:
    query = served.Query(text="hi")
    assert served.typed.delay(query.model_dump()).get(timeout=10) == {"text": "HI", "top_k": 3}


def test_wrong_arguments_raise_at_the_caller() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        served.square.delay()
    with pytest.raises(TypeError):
        served.Classifier().classify.delay(1, 2)
    with pytest.raises(TypeError):
        asyncio.run(served.square(1, 2))


def test_an_error_comes_back_as_its_class_with_the_remote_traceback() -> None:
    with pytest.raises(served.ModelError) as caught:
        served.fail.remote("known")
    assert caught.value.args == ("no such token", 7)
    assert "served.py" in str(caught.value.__cause__)

    async def awaited() -> None:
        await served.fail("known")

    with pytest.raises(served.ModelError) as caught:
        asyncio.run(awaited())
    assert caught.value.args == ("no such token", 7)
    assert "in fail" in str(caught.value.__cause__)


def test_an_unknown_error_comes_back_as_a_remote_task_error() -> None:
    with pytest.raises(errors.RemoteTaskError, match="Unheard: of") as caught:
        served.fail.remote("local")
    assert "in fail" in caught.value.traceback


def test_an_error_whose_class_cannot_be_made_again_says_what_it_said() -> None:
    """Not what its class makes of its ``args``; the same from every way of ours to call."""

    async def awaited() -> None:
        await served.fail("coded")

    for call in (
        lambda: asyncio.run(awaited()),
        lambda: served.fail.remote("coded"),
        lambda: served.fail.spawn("coded").get(timeout=10),
    ):
        with pytest.raises(errors.RemoteTaskError) as caught:
            call()
        assert (caught.value.type_name, caught.value.message) == ("served.CodeError", "E404: nope")
        assert "in fail" in caught.value.traceback


def test_a_group_of_errors_comes_back_as_a_remote_task_error() -> None:
    with pytest.raises(errors.RemoteTaskError, match=r"both.*ModelError\('one'\)") as caught:
        served.fail.remote("errors")
    assert caught.value.type_name == "builtins.ExceptionGroup"
    assert "in fail" in caught.value.traceback


def test_a_system_exit_of_a_body_never_reaches_the_caller() -> None:
    with pytest.raises(errors.BodyExited, match="SystemExit"):
        served.fail.delay("exit").get(timeout=10)
    assert served.square.options(timeout=10).remote(2) == 4


def test_what_a_stranger_wrote_into_the_backend_is_not_raised() -> None:
    sent = served.echo.apply_async((1,), queue="unread")
    record = {
        "status": "FAILURE",
        "result": {"exc_type": "SystemExit", "exc_module": "builtins", "exc_message": [3]},
        "traceback": "\x1b[2Jgone",
        "task_id": sent.id,
        "children": [],
    }
    backend = served.celery.backend
    backend.set(backend.get_key_for_task(sent.id), backend.encode(record))
    with pytest.raises(errors.RemoteTaskError, match=r"builtins\.SystemExit") as caught:
        sent.get(timeout=10)
    assert "\x1b" not in caught.value.traceback


def test_what_a_stranger_wrote_into_the_backend_is_not_raised_by_a_group() -> None:
    sent = group(served.echo.s(x).set(queue="unread") for x in range(2))()
    backend = served.celery.backend
    for one in sent.results:
        record = {
            "status": "FAILURE",
            "result": {"exc_type": "SystemExit", "exc_module": "builtins", "exc_message": [3]},
            "traceback": None,
            "task_id": one.id,
            "children": [],
        }
        backend.set(backend.get_key_for_task(one.id), backend.encode(record))
    with pytest.raises(errors.RemoteTaskError, match=r"builtins\.SystemExit"):
        sent.get(timeout=10)
    with pytest.raises(errors.RemoteTaskError, match=r"builtins\.SystemExit"):
        sent.join(timeout=10)


def test_an_answer_that_cannot_be_read_ends_the_wait_with_its_reason() -> None:
    task_id, backend = uuid4().hex, served.celery.backend
    stored = '{"status": "SUCCESS", "result": {"~obj": ["other.Type@1", {}]}}'
    backend.set(backend.get_key_for_task(task_id), stored)

    with pytest.raises(errors.SerializationError, match=r"other\.Type"):
        served.echo.options(task_id=task_id, queue="unread", timeout=5).remote(1)


def test_types_survive_the_way_there_and_back() -> None:
    value = {"t": (1, 2), 3: {b"x", b"y"}, "l": [None, True, 1.5], "label": served.Label("a", 0.1)}
    back = served.echo.remote(value)
    assert back == value
    assert type(back["t"]) is tuple


def test_a_thousand_awaits_take_a_handful_of_threads_and_never_block_the_loop() -> None:
    others = threading.active_count()

    async def thousand() -> tuple[list[int], int, float, float]:
        lag, busy, most = 0.0, 0.0, 0
        calls = asyncio.gather(*(served.square(x) for x in range(1000)))
        while not calls.done():
            before, worked = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.01)
            lag = max(lag, time.perf_counter() - before - 0.01)
            busy = max(busy, time.thread_time() - worked)
            most = max(most, threading.active_count())
        return await calls, most, lag, busy

    answers, threads, lag, busy = asyncio.run(thousand())
    print(
        f"1,000 awaits: {threads} threads at most ({others} before), loop lag "
        f"{lag * 1000:.0f} ms at most, of which it worked {busy * 1000:.0f} ms"
    )
    assert answers == [x * x for x in range(1000)]
    # 4 that publish and one that watches, where no test before has started them.
    assert threads - others <= 6
    # To publish them on the loop takes it a second of work; to wait there, longer than any load.
    assert busy < 0.4
    assert lag < 5.0


def test_a_cancelled_await_revokes_the_task(
    worker: processes.WorkerProcess, module_ledger: Path
) -> None:
    inspect = served.celery.control.inspect(destination=[worker.node])

    async def cancelled() -> None:
        call = asyncio.ensure_future(served.record.options(countdown=3)("cancelled"))
        await asyncio.to_thread(eventually, lambda: inspect.scheduled()[worker.node])
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    asyncio.run(cancelled())
    eventually(lambda: inspect.revoked()[worker.node])
    (revoked,) = inspect.revoked()[worker.node]
    with pytest.raises(TaskRevokedError):
        served.celery.AsyncResult(revoked).get(timeout=10)
    assert ["cancelled"] not in [line[2:] for line in ledger.words(module_ledger, "began")]


def test_a_call_without_a_worker_times_out_and_says_what_to_do() -> None:
    with pytest.raises(errors.CallTimeout, match="is a worker consuming its queue"):
        served.square.options(timeout=0.3, queue="unread").remote(1)

    async def awaited() -> None:
        await served.square.options(timeout=0.3, queue="unread")(1)

    with pytest.raises(errors.CallTimeout, match=r"not answered within 0\.3 s"):
        asyncio.run(awaited())


def test_blocking_calls_are_refused_on_an_event_loop() -> None:
    async def blocking() -> None:
        served.square.remote(1)

    with pytest.raises(errors.BlockingCallError, match="await it instead"):
        asyncio.run(blocking())


def test_a_queue_that_the_caller_names_wins_over_the_queue_of_the_service() -> None:
    sent = served.square.apply_async((3,), queue="celery")
    assert sent.get(timeout=10) == 9


def test_an_awaited_call_fails_soon_and_clearly_while_the_server_is_away(tmp_path: Path) -> None:
    """A client of a server that has gone: its loop is free and the error comes in seconds."""
    with testing.server(tmp_path / "gone") as gone:
        urls = {"CELERY_BROKER_URL": gone.broker_url, "CELERY_RESULT_BACKEND": gone.result_url}
    client = processes.Process(
        [sys.executable, "-m", "ask", "away"], tmp_path / "away.log", env=urls
    )
    assert client.wait_exit(30) == 0, client.log_text()
    name, seconds = json.loads(client.log_text().splitlines()[-1])
    assert name == "OperationalError"
    assert seconds < 10


def test_a_timeout_ends_calls_and_their_process_while_the_broker_is_frozen(tmp_path: Path) -> None:
    """A server that is stopped, or a network that drops packets: accepted, never answered."""
    with testing.server(tmp_path / "frozen") as frozen:
        env = {
            "CELERY_BROKER_URL": frozen.broker_url,
            "CELERY_RESULT_BACKEND": frozen.result_url,
            "FREEZE": str(frozen.pid),
        }
        command = [sys.executable, "-m", "ask", "frozen"]
        client = processes.Process(command, tmp_path / "frozen.log", env=env)
        try:
            assert client.wait_exit(60) == 0, client.log_text()
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
            client.stop()
    endings = json.loads(client.log_text().splitlines()[-1])
    assert {way: name for way, (name, _) in endings.items()} == dict.fromkeys(
        ("remote", "await", "spawn"), "CallTimeout"
    )
    assert max(seconds for _, seconds in endings.values()) < 10
