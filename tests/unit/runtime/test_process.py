from __future__ import annotations

import asyncio
import threading

import pytest

import gw_celery as gw
from gw_celery import conf, errors
from gw_celery.runtime import process


@pytest.fixture
def runtime() -> process.Process:
    runtime = process.Process(conf.Settings())
    runtime.start()
    process.adopt(runtime)
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


def entered(app: gw.App, runtime: process.Process) -> None:
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
    process.adopt(None)
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
    failed = asyncio.Event()

    @app.context()
    class Broken:
        async def __aenter__(self):
            failed.set()
            raise OSError("no weights")

        async def __aexit__(self, *exc): ...

    @app.context()
    class Other:
        async def __aenter__(self): ...

        async def __aexit__(self, *exc):
            try:
                app.get_context(Broken)
            except KeyError as error:
                said.append(str(error))

    @app.remote
    async def body(): ...

    with pytest.raises(errors.StartupError):
        entered(app, runtime)
    assert all("is not entered yet" in one for one in said)


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
    process.adopt(None)
    runtime.stop()

    assert ended.is_set()
    assert runtime.loop.is_closed()


def test_a_process_of_another_pid_is_not_this_one(runtime, monkeypatch) -> None:
    assert process.current() is runtime
    monkeypatch.setattr(runtime, "pid", runtime.pid + 1)
    assert process.current() is None
    monkeypatch.undo()
