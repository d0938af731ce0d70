"""Waiting for answers with a backend that has to be asked; Redis is in the integration tests."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import celery.exceptions
import pytest
from celery import Celery, signals, states
from celery.backends import cache

import gw_celery as gw
from gw_celery.testing import workers
from tests.processes import environment, eventually

LONG = 60.0


@pytest.fixture
def square(app: gw.App) -> Any:
    app.celery.conf.gw_poll_interval = 0.001
    cache._DUMMY_CLIENT_CACHE.clear()  # Celery's in-memory backend is one for the process

    @app.remote
    async def square(x): ...

    yield square
    workers.close_all()


def answer(task: Any, task_id: str, result: Any, state: str = states.SUCCESS) -> None:
    """Answer a call as its worker would."""
    task.backend.store_result(task_id, result, state, traceback="the remote traceback")


def revoked(task: Any, monkeypatch) -> list[str]:
    ids: list[str] = []
    monkeypatch.setattr(task.app.control, "revoke", lambda task_id, *_, **__: ids.append(task_id))
    return ids


def test_an_answer_is_awaited(square) -> None:
    async def main() -> Any:
        calling = asyncio.ensure_future(square.options(task_id="1").aremote(5))
        await asyncio.sleep(0)
        answer(square, "1", 25)
        return await calling

    assert asyncio.run(main()) == 25


def test_an_answer_that_is_there_already_is_found(square) -> None:
    answer(square, "1", (1, 2))

    async def main() -> Any:
        return await square.options(task_id="1").spawn(5)

    assert asyncio.run(main()) == (1, 2)


def test_an_error_is_raised_with_the_remote_traceback(square) -> None:
    answer(square, "1", ValueError("bad", 3), states.FAILURE)

    async def main() -> Any:
        await square.options(task_id="1")(5)

    with pytest.raises(ValueError, match="bad") as caught:
        asyncio.run(main())
    assert caught.value.args == ("bad", 3)
    assert "the remote traceback" in str(caught.value.__cause__)


class CodeError(Exception):
    """Its arguments are not those that it is made with."""

    def __init__(self, message: str, code: int = 500) -> None:
        super().__init__(f"E{code}: {message}")


@pytest.mark.parametrize(
    ("error", "type_name", "message"),
    [
        (CodeError("nope", 404), f"{__name__}.CodeError", "E404: nope"),
        (ExceptionGroup("both", [ValueError(3)]), "builtins.ExceptionGroup", "both"),
    ],
    ids=["coded", "group"],
)
def test_an_error_that_celery_would_rebuild_wrongly_says_what_it_said(
    square, error: Exception, type_name: str, message: str
) -> None:
    answer(square, "1", error, states.FAILURE)

    with pytest.raises(gw.RemoteTaskError) as caught:
        square.options(task_id="1").remote(5)
    assert caught.value.type_name == type_name
    assert caught.value.message.startswith(message)
    assert caught.value.traceback == "the remote traceback"


@pytest.mark.parametrize("backend", [None, "disabled://"])
def test_without_a_result_backend_a_call_that_waits_is_refused_before_it_is_sent(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CELERY_RESULT_BACKEND", raising=False)
    celery_app = Celery("mute", broker="memory://", backend=backend, set_as_current=False)
    gw.preset(celery_app)

    @gw.App("mute", celery_app).remote
    async def square(x): ...

    sent: list[Any] = []
    monkeypatch.setattr(celery_app.amqp, "send_task_message", lambda *args, **_: sent.append(args))
    before = threading.active_count()
    for call in (
        lambda: asyncio.run(square.aremote(5)),
        lambda: asyncio.run(_awaited(square)),
        lambda: square.remote(5),
        lambda: square.spawn(5),
    ):
        with pytest.raises(gw.ConfigurationError, match=r"result_backend.*CELERY_RESULT_BACKEND"):
            call()
    assert sent == []
    assert threading.active_count() == before
    square.delay(5)
    assert len(sent) == 1


async def _awaited(square: Any) -> None:
    await square(5)


@pytest.mark.parametrize("where", ["option", "setting"])
def test_a_call_without_a_result_is_not_waited_for(app: gw.App, where: str) -> None:
    app.celery.conf.task_ignore_result = where == "setting"

    @app.remote
    async def square(x): ...

    task = square.options(ignore_result=True) if where == "option" else square

    for call in (
        lambda: asyncio.run(task.aremote(5)),
        lambda: asyncio.run(_awaited(task)),
        lambda: task.remote(5),
        lambda: task.spawn(5),
    ):
        with pytest.raises(gw.UsageError, match="ignores its result"):
            call()


def test_many_calls_share_the_threads_that_wait(square) -> None:
    square.app.conf.gw_publish_threads = 1
    before = set(threading.enumerate())  # some of other tests may end meanwhile

    async def main() -> list[Any]:
        sent = [square.options(task_id=str(n)).spawn(n) for n in range(300)]
        waits = [asyncio.ensure_future(spawned) for spawned in sent]
        await asyncio.sleep(0)
        made = {thread.name for thread in set(threading.enumerate()) - before}
        # The last one reads from a backend that cannot notify.
        assert {"gw-watcher", "gw-publish-0"} <= made
        assert made <= {"gw-watcher", "gw-publish-0", "gw-results-0"}
        for n in range(300):
            answer(square, str(n), n * n)
        return await asyncio.gather(*waits)

    assert asyncio.run(main()) == [n * n for n in range(300)]


def test_a_process_that_may_have_no_more_threads_keeps_none_of_a_call(square, monkeypatch) -> None:
    start, before = threading.Thread.start, threading.enumerate()

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "gw-publish-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="thread"):
        square.spawn(5)
    assert eventually(lambda: set(threading.enumerate()) <= set(before))


def test_a_process_that_may_open_no_more_files_is_told_so_and_calls_again_later(
    square, monkeypatch
) -> None:
    outcomes: list[object] = []

    def refuse() -> None:
        raise OSError("Too many open files")

    def call() -> None:
        try:
            outcomes.append(square.options(task_id="1").spawn(5).id)
        except OSError as refusal:
            outcomes.append(str(refusal))

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.events, "new_event_loop", refuse)
        calling = threading.Thread(target=call, daemon=True)
        calling.start()
        calling.join(10)
    assert outcomes == ["Too many open files"]
    call()
    assert outcomes[1:] == ["1"]


def test_the_threads_that_publish_share_one_pool_of_producers(square, monkeypatch) -> None:
    """Made before them: threads that came at once would each make one."""
    connect, makers = square.app.connection_for_write, []

    def note(*args: Any, **kwargs: Any) -> Any:
        makers.append(threading.current_thread())
        return connect(*args, **kwargs)

    monkeypatch.setattr(square.app, "connection_for_write", note)
    square.spawn(5)
    assert makers[0] is threading.main_thread()


def test_a_timeout_of_the_broker_is_not_one_of_the_call(square, monkeypatch) -> None:
    def send(*_: Any, **__: Any) -> None:
        raise TimeoutError("of the broker")

    monkeypatch.setattr(square.app.amqp, "send_task_message", send)
    with pytest.raises(TimeoutError, match="of the broker") as caught:
        square.options(timeout=LONG).remote(5)
    assert not isinstance(caught.value, gw.CallTimeout)


def test_a_call_is_published_in_the_context_of_its_caller(square) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("trace")
    seen: list[tuple[str, bool]] = []

    def note(*_: Any, **__: Any) -> None:
        seen.append((variable.get(), threading.current_thread() is threading.main_thread()))

    signals.before_task_publish.connect(note)
    variable.set("of the caller")
    square.spawn(5)
    signals.before_task_publish.disconnect(note)
    assert seen == [("of the caller", False)]


def test_two_that_wait_for_one_answer_both_get_it(square) -> None:
    async def main() -> list[Any]:
        sent = square.options(task_id="1").spawn(5)
        waits = [asyncio.ensure_future(sent) for _ in range(2)]
        await asyncio.sleep(0)
        answer(square, "1", 25)
        return await asyncio.gather(*waits)

    assert asyncio.run(main()) == [25, 25]


def test_a_call_that_is_not_answered_in_time_is_revoked(square, monkeypatch) -> None:
    ids = revoked(square, monkeypatch)

    async def main() -> None:
        await square.options(task_id="1", timeout=0.5)(5)

    with pytest.raises(gw.CallTimeout) as caught:
        asyncio.run(main())
    assert "square[1] was not answered within 0.5 s and was revoked" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert eventually(lambda: ids) == ["1"]


def test_a_wait_that_is_cancelled_revokes_the_call(square, monkeypatch) -> None:
    ids = revoked(square, monkeypatch)

    async def main() -> None:
        calling = asyncio.ensure_future(square.options(task_id="1").spawn(5))
        await asyncio.sleep(0)
        calling.cancel()
        await asyncio.wait([calling])
        assert calling.cancelled()

    asyncio.run(main())
    assert eventually(lambda: ids) == ["1"]


def test_too_many_that_wait_are_refused(square) -> None:
    square.app.conf.gw_max_waiting = 1

    async def both() -> list[Any]:
        sent = [square.options(task_id=one).spawn(5) for one in ("1", "2")]
        waits = [asyncio.ensure_future(one) for one in sent]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        answer(square, "1", 1)
        return await asyncio.gather(*waits, return_exceptions=True)

    first, second = asyncio.run(both())
    assert first == 1
    assert isinstance(second, gw.UsageError)
    assert "gw_max_waiting" in str(second)


def test_a_blocking_call_that_is_not_answered_in_time_is_revoked(square, monkeypatch) -> None:
    ids = revoked(square, monkeypatch)

    with pytest.raises(gw.CallTimeout, match="was revoked"):
        square.options(task_id="1", timeout=0.5).remote(5)
    assert eventually(lambda: ids) == ["1"]


def test_a_blocking_call_returns_what_was_answered(square) -> None:
    answer(square, "1", 25)

    assert square.options(task_id="1").remote(5) == 25
    sent = square.options(task_id="1").spawn(5)
    assert (sent.id, sent.get()) == ("1", 25)
    assert repr(sent) == f"<Spawned {square.name}[1]>"


class Freeze(threading.Event):
    """Publishing blocks, as with a broker that accepts and never answers, until it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = threading.Event()

    def block(self, *_: Any, **__: Any) -> None:
        self.has_begun.set()
        self.wait(LONG)


@pytest.fixture
def frozen(square) -> Iterator[Freeze]:
    freeze = Freeze()
    signals.before_task_publish.connect(freeze.block)
    yield freeze
    signals.before_task_publish.disconnect(freeze.block)
    freeze.set()


async def awaited(call: Any) -> Any:
    return await call(5)


WAYS = {
    "remote": lambda call: call.remote(5),
    "spawn": lambda call: call.spawn(5).get(),
    "await": lambda call: asyncio.run(awaited(call)),
    "aremote": lambda call: asyncio.run(call.aremote(5)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_timeout_bounds_the_sending_too(square, frozen, monkeypatch, way: str) -> None:
    ids = revoked(square, monkeypatch)

    with pytest.raises(gw.CallTimeout, match=r"square could not be sent within 0\.05 s"):
        WAYS[way](square.options(task_id="1", timeout=0.05))
    frozen.set()  # no caller waits for what is sent at last
    assert eventually(lambda: ids) == ["1"]


def test_a_call_that_was_not_sent_yet_is_not_sent_any_more(square, frozen) -> None:
    square.app.conf.gw_publish_threads = 1
    published: list[str] = []

    def note(headers: dict[str, Any], **_: Any) -> None:
        published.append(headers["id"])

    signals.after_task_publish.connect(note)
    for task_id in ("1", "2"):
        with pytest.raises(gw.CallTimeout):
            square.options(task_id=task_id, timeout=0.05).spawn(5)
    frozen.set()
    square.options(task_id="3").spawn(5)
    signals.after_task_publish.disconnect(note)
    assert published == ["1", "3"]


def test_too_many_that_wait_to_be_sent_are_refused(square, frozen) -> None:
    square.app.conf.gw_publish_threads = 1
    square.app.conf.gw_max_waiting = 1

    async def main() -> None:
        waits = [asyncio.ensure_future(square(5))]
        await asyncio.to_thread(frozen.has_begun.wait, LONG)
        waits.append(asyncio.ensure_future(square(5)))
        await asyncio.sleep(0)
        with pytest.raises(gw.UsageError, match=r"1 calls wait to be sent already .*max_waiting"):
            await square(5)
        frozen.set()
        for waiting in waits:
            waiting.cancel()
        await asyncio.wait(waits)

    asyncio.run(main())


@pytest.mark.parametrize("way", WAYS)
def test_a_timeout_of_the_body_is_not_one_of_the_call(square, monkeypatch, way: str) -> None:
    ids = revoked(square, monkeypatch)
    answer(square, "1", celery.exceptions.TimeoutError("of the body"), states.FAILURE)

    with pytest.raises(celery.exceptions.TimeoutError, match="of the body") as caught:
        WAYS[way](square.options(task_id="1", timeout=LONG))
    assert not isinstance(caught.value, gw.CallTimeout)
    assert ids == []


def test_a_blocking_call_leaves_the_event_loop_of_its_thread_alone(square) -> None:
    answer(square, "1", 25)
    mine = asyncio.new_event_loop()
    asyncio.set_event_loop(mine)
    try:
        assert square.options(task_id="1").remote(5) == 25
        assert asyncio.get_event_loop_policy().get_event_loop() is mine
    finally:
        asyncio.set_event_loop(None)
        mine.close()


def test_a_spawned_call_can_be_cancelled(square, monkeypatch) -> None:
    ids = revoked(square, monkeypatch)
    square.options(task_id="1").spawn(5).cancel()

    assert ids == ["1"]


def test_what_is_given_up_is_revoked_before_its_process_exits() -> None:
    code = """
import threading
from celery import Celery
import gw_celery as gw
celery_app = Celery("x", broker="memory://", backend="cache+memory://")
gw.preset(celery_app)
def revoke(task_id, **_):
    threading.Event().wait(0.3)
    print("revoked", task_id, flush=True)
celery_app.control.revoke = revoke
@gw.App("x", celery_app).remote
async def square(x): ...
try:
    square.options(task_id="1", timeout=0.05).remote(5)
except gw.CallTimeout:
    print("late", flush=True)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["late", "revoked 1"]


def test_a_call_that_is_made_as_its_process_exits_is_refused() -> None:
    code = """
import atexit
from celery import Celery
import gw_celery as gw
celery_app = Celery("x", broker="memory://", backend="cache+memory://")
gw.preset(celery_app)
@gw.App("x", celery_app).remote
async def square(x): ...
def call():
    try:
        square.options(timeout=5).spawn(5)
    except gw.UsageError as refusal:
        print(refusal)
atexit.register(call)
square.spawn(5)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True)
    assert done.stdout == "this process is exiting: make calls before it does\n"


def test_a_process_that_waits_for_no_answer_does_not_load_the_redis_clients() -> None:
    code = """
import sys
import gw_celery as gw
app = gw.App("x")
@app.remote
async def square(x): ...
sys.exit("redis" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert done.returncode == 0
