"""Contexts and hooks of what a process serves, and the loop that they share with bodies."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable

import pytest
from celery import current_task

import gw_celery as gw
from gw_celery import errors
from gw_celery.testing import in_process

LONG = 60.0


def context_of(app: gw.App, log: list[str], name: str):
    class Context:
        async def __aenter__(self):
            log.append(f"enter {name}")
            return name

        async def __aexit__(self, *exc):
            log.append(f"leave {name}")

    Context.__qualname__ = name
    return app.context()(Context)


def test_contexts_enter_once_when_a_service_of_their_app_is_served(app) -> None:
    log: list[str] = []
    weights = context_of(app, log, "Weights")

    @app.remote
    async def first(): ...

    @app.remote
    async def second(): ...

    other = gw.App("other", celery=app.celery)
    context_of(other, log, "Elsewhere")
    with in_process(other):  # which has nothing to serve
        first.local()
        second.local()
        assert log == ["enter Weights"]
        assert app.get_context(weights) == "Weights"
    assert log == ["enter Weights", "leave Weights"]


def test_a_class_that_cannot_be_served_leaves_no_context_entered(app) -> None:
    log: list[str] = []
    context_of(app, log, "Weights")

    @app.cls
    class Model:
        def __init_subclass__(cls):
            raise TypeError("this class is final")

        @gw.method()
        def predict(self): ...

    with pytest.raises(TypeError, match="final"), in_process(app):
        raise AssertionError("served")
    assert log == []


def test_a_failed_start_can_be_tried_again(app) -> None:
    log: list[str] = []
    context_of(app, log, "Weights")

    @app.cls
    class Model:
        is_broken = True

        @gw.on_enter()
        def load(self):
            if Model.is_broken:
                raise OSError("no weights")

        @gw.method()
        def predict(self):
            return "ready"

    for _ in range(2):
        with pytest.raises(errors.StartupError, match=r"Model: OSError: no weights"):
            Model().predict.local()
        assert log in ([], ["enter Weights", "leave Weights"])
        log.clear()

    Model.is_broken = False
    assert Model().predict.local() == "ready"
    assert log == ["enter Weights"]


def test_a_context_that_failed_is_not_entered_for_those_that_leave(app) -> None:
    said: list[str] = []
    other_entered = asyncio.Event()

    @app.context()
    class Broken:
        async def __aenter__(self):
            await other_entered.wait()
            raise OSError("no weights")

        async def __aexit__(self, *exc): ...

    @app.context()
    class Other:
        async def __aenter__(self):
            other_entered.set()

        async def __aexit__(self, *exc):
            try:
                app.get_context(Broken)
            except KeyError as error:
                said.append(str(error))

    @app.remote
    async def body(): ...

    with pytest.raises(errors.StartupError):
        body.local()
    assert ["is not entered yet" in one for one in said] == [True]


def test_the_wording_of_a_context_that_is_not_registered(app) -> None:
    class Unknown: ...

    with pytest.raises(KeyError) as caught:
        app.get_context(Unknown)
    assert "Unknown is not registered: decorate it with @app.context()" in str(caught.value)


def test_the_wording_of_a_process_that_serves_nothing(app) -> None:
    weights = context_of(app, [], "Weights")

    with pytest.raises(KeyError) as caught:
        app.get_context(weights)
    assert "Weights is not entered in process" in str(caught.value)
    assert "this is not a GPU worker" in str(caught.value)


def test_the_wording_of_a_context_that_is_not_entered_yet(app) -> None:
    said: list[str] = []

    @app.context()
    class Late:
        async def __aenter__(self):
            await asyncio.Event().wait()

        async def __aexit__(self, *exc): ...

    @app.context()
    class Early:
        async def __aenter__(self):
            try:
                app.get_context(Late)
            except KeyError as error:
                said.append(str(error))
            raise RuntimeError("enough")

        async def __aexit__(self, *exc): ...

    @app.remote
    async def body(): ...

    with pytest.raises(errors.StartupError):
        body.local()
    assert "Late is not entered yet in process" in said[0]


def test_bodies_and_contexts_share_one_loop(app) -> None:
    @app.context()
    class Loop:
        async def __aenter__(self):
            return asyncio.get_running_loop()

        async def __aexit__(self, *exc): ...

    @app.remote
    async def is_shared():
        return app.get_context(Loop) is asyncio.get_running_loop()

    assert is_shared.local() is True


def test_stopping_ends_the_thread_and_cancels_what_is_left_on_the_loop(app) -> None:
    ended = threading.Event()

    async def linger() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    @app.remote
    async def start():
        app.lingering = asyncio.create_task(linger())
        await asyncio.sleep(0)
        return asyncio.get_running_loop(), threading.current_thread()

    with in_process(app):
        loop, thread = start.local()

    assert ended.is_set()
    assert loop.is_closed()
    assert not thread.is_alive()


# Celery's table of pools may have imported eventlet, which warns at every fork.
@pytest.mark.filterwarnings("ignore:Using fork:DeprecationWarning")
def test_a_fork_of_a_process_that_serves_has_a_loop_of_its_own(app) -> None:
    @app.remote
    async def pid():
        return os.getpid()

    forking = multiprocessing.get_context("fork")
    answers = forking.SimpleQueue()
    with in_process(app):
        assert pid.local() == os.getpid()
        child = forking.Process(target=lambda: answers.put(pid.local()))
        child.start()
        child.join(LONG)
        child.kill()
    assert child.exitcode == 0
    assert answers.get() == child.pid


class Blocked:
    """Declares a context that blocks the event loop until it is released."""

    def __init__(self, app: gw.App) -> None:
        release = self.release = threading.Event()

        @app.context()
        class Weights:
            async def __aenter__(self):
                release.wait(LONG)

            async def __aexit__(self, *exc): ...

        @app.remote
        async def body(): ...


def test_a_context_that_blocks_the_loop_is_given_up_at_the_deadline(app, caplog) -> None:
    blocked = Blocked(app)
    app.celery.conf.update(gw_start_timeout=0.05, gw_cancel_timeout=0.05)

    began = time.monotonic()
    with (
        pytest.raises(errors.StartupError, match="TimeoutError: still blocks the event") as late,
        in_process(app),
    ):
        raise AssertionError("served")
    # Nothing can be left on a loop that is blocked.
    assert time.monotonic() - began < app.celery.conf.get("gw_exit_timeout", 10.0)

    assert "await asyncio.to_thread(...)" in str(late.value)
    assert "release.wait(LONG)" in caplog.text
    (line,) = [one for one in caplog.messages if "still blocks the event loop" in one]
    assert re.search(r"Weights .* at \S+test_in_process.py:\d+ in __aenter__: load in", line)
    blocked.release.set()


def slow(app: gw.App, log: list[str]) -> threading.Event:
    """Declare a context that enters at once and one that never does; set when the first has."""
    has_entered = threading.Event()

    @app.context()
    class Fast:
        async def __aenter__(self):
            asyncio.get_running_loop().call_soon(has_entered.set)

        async def __aexit__(self, *exc):
            log.append("leave Fast")

    @app.context()
    class Slow:
        async def __aenter__(self):
            await asyncio.Event().wait()

        async def __aexit__(self, *exc):
            log.append("leave Slow")

    @app.remote
    async def body(): ...

    app.body = body
    return has_entered


def test_stopping_ends_a_load_of_another_thread(app) -> None:
    log: list[str] = []
    has_entered = slow(app, log)
    raised: list[BaseException] = []

    def enter() -> None:
        try:
            app.body.local()
        except errors.StartupError as exc:
            raised.append(exc)

    with in_process(gw.App("other", celery=app.celery)):
        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        assert has_entered.wait(LONG)
    thread.join(LONG)

    assert log == ["leave Fast"]
    assert len(raised) == 1


def in_background(app: gw.App, ask: Callable[[], object]) -> None:
    """Declare a body that leaves a task behind, and one that lets it ask and answers for it."""
    go, said = asyncio.Event(), asyncio.Queue()

    async def outlive() -> None:
        await go.wait()
        said.put_nowait(ask())
        said.put_nowait(await asyncio.to_thread(ask))

    @app.remote
    async def begin():
        app.outliving = asyncio.create_task(outlive())
        return current_task.request.id

    @app.remote
    async def listen():
        go.set()
        return [await said.get(), await said.get()]

    app.begin, app.listen = begin, listen


def test_a_task_that_outlives_its_body_never_has_the_request_of_another(app) -> None:
    in_background(app, lambda: bool(current_task))

    assert app.begin.local() is not None
    assert app.listen.local() == [False, False]


def test_a_task_of_a_context_never_has_the_request_of_a_body(app) -> None:
    go, said = asyncio.Event(), asyncio.Queue()

    async def beat() -> None:
        await go.wait()
        said.put_nowait(bool(current_task))

    @app.context()
    class Heart:
        async def __aenter__(self):
            self.task = asyncio.create_task(beat())

        async def __aexit__(self, *exc): ...

    @app.remote
    async def listen():
        go.set()
        return await said.get(), bool(current_task)

    assert listen.local() == (False, True)


class Recorded:
    """A context that knows the threads that it was made, entered and left in."""

    def __init__(self, threads: list[threading.Thread]) -> None:
        self.threads = threads
        threads.append(threading.current_thread())


class InThreads(Recorded):
    def __enter__(self) -> str:
        self.threads.append(threading.current_thread())
        return "entered"

    def __exit__(self, *exc: object) -> None:
        self.threads.append(threading.current_thread())


class OnLoop(Recorded):
    async def __aenter__(self) -> str:
        self.threads.append(threading.current_thread())
        return "entered"

    async def __aexit__(self, *exc: object) -> None:
        self.threads.append(threading.current_thread())


@pytest.mark.parametrize(
    ("cls", "on_loop"), [(InThreads, [False] * 3), (OnLoop, [False, True, True])]
)
def test_a_context_is_made_and_a_sync_one_entered_and_left_in_threads(app, cls, on_loop) -> None:
    threads: list[threading.Thread] = []
    app.context(threads)(type("Context", (cls,), {}))

    @app.remote
    async def where():
        return threading.current_thread()

    with in_process(app):
        loop = where.local()
    assert [thread is loop for thread in threads] == on_loop
    assert threading.current_thread() not in threads
