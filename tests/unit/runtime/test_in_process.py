from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable

import pytest
from celery import current_task

import gw_celery as gw
from gw_celery import conf, errors
from gw_celery.client import execution
from gw_celery.runtime import in_process
from tests.processes import eventually

LONG = 60.0


@pytest.fixture
def runtime() -> in_process.Process:
    runtime = in_process.Process(conf.Settings())
    runtime.start()
    execution.install(runtime)
    return runtime


def context_of(app: gw.App, log: list[str], name: str):
    class Context:
        async def __aenter__(self):
            log.append(f"enter {name}")
            return name

        async def __aexit__(self, *exc):
            log.append(f"leave {name}")

    Context.__qualname__ = name
    return app.context()(Context)


def entered(app: gw.App, runtime: in_process.Process) -> None:
    runtime.enter([app.registry], list(app.registry.services.values()))


def test_contexts_enter_once_when_a_service_of_their_app_is_served(app, runtime) -> None:
    log: list[str] = []
    weights = context_of(app, log, "Weights")

    @app.remote
    async def first(): ...

    @app.remote
    async def second(): ...

    one, two = app.registry.services.values()
    runtime.enter([app.registry], [one])
    runtime.enter([app.registry], [one, two])

    assert log == ["enter Weights"]
    assert app.get_context(weights) == "Weights"
    assert runtime.serves(one.key)
    assert runtime.serves(two.key)
    execution.install(None)
    runtime.stop()
    assert log == ["enter Weights", "leave Weights"]


def test_contexts_of_an_app_that_is_not_served_are_not_made(app, runtime, celery_app) -> None:
    log: list[str] = []
    other = gw.App("other", celery=celery_app)
    context_of(other, log, "Elsewhere")

    @app.remote
    async def here(): ...

    runtime.enter([app.registry, other.registry], list(app.registry.services.values()))
    assert log == []


def test_a_failed_start_serves_nothing_and_can_be_tried_again(app, runtime) -> None:
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

    with pytest.raises(errors.StartupError, match=r"Model: OSError: no weights"):
        entered(app, runtime)
    (service,) = app.registry.services.values()
    assert not runtime.serves(service.key)
    assert log in ([], ["enter Weights", "leave Weights"])

    Model.is_broken = False
    entered(app, runtime)
    assert runtime.serves(service.key)


def test_a_context_that_failed_is_not_entered_for_those_that_leave(app, runtime) -> None:
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
        entered(app, runtime)
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


def test_the_wording_of_a_context_that_is_not_entered_yet(app, runtime) -> None:
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
        entered(app, runtime)
    assert "Late is not entered yet in process" in said[0]


def test_bodies_and_contexts_share_one_loop(app, runtime) -> None:
    @app.context()
    class Loop:
        async def __aenter__(self):
            return asyncio.get_running_loop()

        async def __aexit__(self, *exc): ...

    @app.remote
    async def is_shared():
        return app.get_context(Loop) is asyncio.get_running_loop()

    entered(app, runtime)
    assert is_shared.local() is True


def test_stopping_ends_the_thread_and_cancels_what_is_left_on_the_loop(app, runtime) -> None:
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

    entered(app, runtime)
    start.local()
    execution.install(None)
    runtime.stop()

    assert ended.is_set()
    assert runtime.loop.is_closed()


def test_a_process_of_another_pid_is_not_this_one(runtime, monkeypatch) -> None:
    assert execution.current() is runtime
    monkeypatch.setattr(runtime, "pid", runtime.pid + 1)
    assert execution.current() is None
    monkeypatch.undo()


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
    runtime = in_process.Process(conf.Settings(start_timeout=0.05, cancel_timeout=0.05))
    runtime.start()

    with pytest.raises(errors.StartupError, match="TimeoutError: still blocks the event") as late:
        entered(app, runtime)
    runtime.stop()  # at once: nothing can be left on a loop that is blocked

    assert "await asyncio.to_thread(...)" in str(late.value)
    assert "release.wait(LONG)" in caplog.text
    (line,) = [one for one in caplog.messages if "still blocks the event loop" in one]
    assert re.search(r"Weights .* at \S+test_in_process.py:\d+ in __aenter__: load in", line)
    blocked.release.set()
    eventually(runtime.loop.is_closed)


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

    return has_entered


def test_a_load_that_is_given_up_leaves_what_has_entered(app, runtime) -> None:
    log: list[str] = []
    has_entered = slow(app, log)

    def check() -> None:
        if has_entered.is_set():
            raise SystemExit(0)

    with pytest.raises(SystemExit):
        runtime.enter([app.registry], list(app.registry.services.values()), check)
    runtime.stop()
    execution.install(None)

    assert log == ["leave Fast"]


def test_stopping_ends_a_load_of_another_thread(app, runtime) -> None:
    log: list[str] = []
    has_entered = slow(app, log)
    raised: list[BaseException] = []

    def enter() -> None:
        try:
            entered(app, runtime)
        except errors.StartupError as exc:
            raised.append(exc)

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    has_entered.wait(LONG)
    execution.install(None)
    runtime.stop()
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


def test_a_task_that_outlives_its_body_never_has_the_request_of_another(app, runtime) -> None:
    in_background(app, lambda: bool(current_task))
    entered(app, runtime)

    assert app.begin.local() is not None
    assert app.listen.local() == [False, False]


def test_a_task_of_a_context_never_has_the_request_of_a_body(app, runtime) -> None:
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

    entered(app, runtime)
    assert listen.local() == (False, True)
