from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from billiard import common
from celery import current_task
from celery.exceptions import SoftTimeLimitExceeded, WorkerShutdown, WorkerTerminate

import gw_celery as gw
from gw_celery import conf, errors
from gw_celery.client import execution
from gw_celery.declare import parameters, services
from gw_celery.runtime import async_exception, body, in_process

LONG = 60.0


@pytest.fixture
def run(app: gw.App):
    """A function that runs one input of the only service, as the tracer of a stock pool does."""
    runtime = in_process.Process(conf.Settings(cancel_timeout=LONG))
    runtime.start()
    execution.install(runtime)

    def run(method: str, *args: Any, **given: Any) -> Any:
        (service,) = app.registry.services.values()
        runtime.enter([app.registry], [service])
        return body.run(runtime, one_input(service, method, args, **given))

    return run


def one_input(service: services.Service, method: str, args: tuple, **given: Any) -> body.Call:
    known = {
        "service": service,
        "method": service.methods[method],
        "values": parameters.complete(service.parameters, given.pop("given", {})),
        "args": args,
    }
    return body.Call(**{**known, **given})


def answering(app: gw.App, answer: Callable[[list[Any]], Any], *, is_async: bool) -> None:
    """Declare a batched class whose method ``embed`` answers with ``answer(texts)``."""

    class Embedder:
        @gw.method()
        @gw.batched(max_batch_size=4)
        def embed(self, texts, language="en"):
            return answer([texts, language])

    class AsyncEmbedder:
        @gw.method()
        @gw.batched(max_batch_size=4)
        async def embed(self, texts, language="en"):
            return answer([texts, language])

    app.cls(AsyncEmbedder if is_async else Embedder)


EITHER = pytest.mark.parametrize("is_async", [False, True])


@EITHER
def test_a_batched_method_gets_lists_of_one_with_its_defaults(app, run, is_async: bool) -> None:
    answering(app, lambda got: [got], is_async=is_async)

    assert run("embed", "a text") == [["a text"], ["en"]]
    assert run("embed", "a text", kwargs={"language": "de"}) == [["a text"], ["de"]]


class Array:
    """What numpy and torch answer with, as far as it is looked at."""

    def __init__(self, *rows: object) -> None:
        self.rows = rows

    def __array__(self) -> None: ...

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> object:
        return self.rows[index]


@EITHER
@pytest.mark.parametrize("answer", [["one"], ("one",), Array("one")])
def test_the_answer_of_one_input_is_taken_out_of_the_list(app, run, is_async, answer) -> None:
    answering(app, lambda _: answer, is_async=is_async)

    assert run("embed", "a text") == "one"


@EITHER
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([], "a list of 0 entries"),
        ([1, 2], "a list of 2 entries"),
        ("x", "a str of 1 entries"),
        (b"x", "a bytes of 1 entries"),
        ({0: 1}, "a dict of 1 entries"),
        ((one for one in [1]), "a generator of no entries"),
        ({1}, "a set of 1 entries"),
        (None, "a NoneType of no entries"),
        (Array(1, 2, 3), "a Array of 3 entries"),
    ],
)
def test_an_answer_of_another_length_or_kind_is_an_error_with_both(
    app, run, is_async, answer, said
) -> None:
    answering(app, lambda _: answer, is_async=is_async)

    with pytest.raises(gw.UsageError, match=f"got 1 input and answered with {said}"):
        run("embed", "a text")


@EITHER
def test_an_exception_in_a_batched_answer_is_raised(app, run, is_async) -> None:
    answering(app, lambda _: [KeyError("unknown language")], is_async=is_async)

    with pytest.raises(KeyError, match="unknown language"):
        run("embed", "a text")


def test_a_stop_iteration_in_a_thread_ends_the_wait_of_who_awaits_it(app, run) -> None:
    @app.cls
    class Inner:
        @gw.method()
        def stop(self):
            raise StopIteration

    @app.remote
    async def outer():
        await asyncio.wait_for(Inner().stop(), 10)

    inner, service = app.registry.services.values()
    runtime = execution.current()
    assert runtime is not None
    runtime.enter([app.registry], [inner, service])
    with pytest.raises(RuntimeError, match="StopIteration"):
        body.run(runtime, one_input(service, "outer", ()))


def test_a_batched_function_gets_lists_of_one(app, run) -> None:
    @app.remote
    @gw.batched(max_batch_size=2)
    async def embed(texts):
        return [len(texts)]

    assert run("embed", "a text") == 1


def test_a_sync_method_runs_in_the_thread_of_the_tracer(app, run) -> None:
    @app.cls
    class Model:
        @gw.method()
        def predict(self):
            return threading.current_thread()

    assert run("predict") is threading.current_thread()


def test_a_sync_method_that_is_awaited_does_not_block_the_loop(app, run) -> None:
    @app.cls
    class Slow:
        @gw.method()
        def wait(self):
            return went_on.wait(LONG), bool(current_task)

    @app.remote
    async def ask():
        asyncio.get_running_loop().call_later(0, went_on.set)
        return await Slow().wait()

    went_on = threading.Event()
    runtime = execution.current()
    runtime.enter([app.registry], list(app.registry.services.values()))

    assert ask.local() == (True, True)


def test_an_async_body_runs_on_the_loop(app, run) -> None:
    @app.remote
    async def where():
        return execution.current().is_on_loop()

    assert run("where") is True


class Waiting:
    """Declares a body that waits, and knows when it began and how it ended."""

    def __init__(self, app: gw.App) -> None:
        self.began = threading.Event()
        self.ended = threading.Event()
        self.how = ""

        @app.remote
        async def wait():
            self.began.set()
            try:
                await asyncio.Event().wait()
            except BaseException as exc:
                self.how = type(exc).__name__
                raise
            finally:
                self.ended.set()


def test_a_soft_limit_is_raised_in_the_body(app, run) -> None:
    waiting = Waiting(app)

    with pytest.raises(SoftTimeLimitExceeded):
        run("wait", soft_limit=0.01)
    assert waiting.how == "SoftTimeLimitExceeded"


def test_a_hard_limit_ends_the_wait_and_cancels_the_body(app, run) -> None:
    waiting = Waiting(app)

    with pytest.raises(execution.HardLimit):
        run("wait", hard_limit=0.01)
    waiting.ended.wait(LONG)
    assert waiting.how == "CancelledError"


@contextlib.contextmanager
def revoked_once(began: threading.Event) -> Iterator[None]:
    """Raise in this thread what a child raises there in an input that is revoked."""
    thread = threading.get_ident()

    def revoke() -> None:
        began.wait(LONG)
        async_exception.Thrown(thread, execution.Revoked)

    helper = threading.Thread(target=revoke)
    helper.start()
    try:
        yield
    finally:
        helper.join()


def test_a_revoked_input_ends_the_wait_and_cancels_the_body(app, run) -> None:
    waiting = Waiting(app)

    with revoked_once(waiting.began), pytest.raises(execution.Revoked):
        run("wait")
    waiting.ended.wait(LONG)
    assert waiting.how == "CancelledError"


def test_limits_that_the_pool_enforces_are_not_ours(app) -> None:
    runtime = in_process.Process(conf.Settings(), enforces_limits=False)
    runtime.start()
    execution.install(runtime)

    @app.remote
    async def rest():
        for _ in range(3):
            await asyncio.sleep(0)
        return "rested"

    (service,) = app.registry.services.values()
    runtime.enter([app.registry], [service])
    one = one_input(service, "rest", (), soft_limit=1e-9, hard_limit=1e-9)
    assert body.run(runtime, one) == "rested"


def test_an_instance_is_given_back_when_its_body_fails(app, run) -> None:
    @app.cls
    class Model:
        @gw.method()
        async def fail(self):
            raise ValueError

        @gw.method()
        def fail_too(self):
            raise ValueError

    for method in ("fail", "fail_too"):
        with pytest.raises(ValueError):
            run(method)
    (service,) = app.registry.services.values()
    (loaded,) = execution.current().instances_of(service)._loaded
    assert loaded.in_use == 0


def raising(app: gw.App, exc: BaseException) -> None:
    """Declare a class whose synchronous bodies raise ``exc``."""

    @app.cls
    class Model:
        @gw.method()
        def leave(self):
            raise exc

        @gw.method()
        @gw.batched(max_batch_size=1)
        def leave_batch(self):
            raise exc


@pytest.mark.parametrize("method", ["leave", "leave_batch"])
def test_an_exit_of_a_synchronous_body_is_its_failure(app, run, method: str) -> None:
    exc = SystemExit(3)
    raising(app, exc)

    with pytest.raises(errors.BodyExited, match=r"SystemExit\(3\)") as caught:
        run(method)
    assert caught.value.__cause__ is exc


def test_an_interrupt_of_a_synchronous_body_in_a_thread_is_its_failure(app, run) -> None:
    raising(app, KeyboardInterrupt())
    caught: list[BaseException] = []

    def trace() -> None:
        try:
            run("leave")
        except BaseException as exc:
            caught.append(exc)

    thread = threading.Thread(target=trace)
    thread.start()
    thread.join(LONG)
    assert isinstance(caught[0], errors.BodyExited)


@pytest.mark.parametrize("exc", [WorkerShutdown(0), WorkerTerminate(1), KeyboardInterrupt()])
def test_what_ends_the_worker_or_comes_from_the_keyboard_is_not_the_bodys(app, run, exc) -> None:
    raising(app, exc)

    with pytest.raises(type(exc)) as caught:
        run("leave")
    assert caught.value is exc


def test_an_exit_in_a_process_that_was_told_to_end_ends_it(app, run, monkeypatch) -> None:
    raising(app, SystemExit(-241))
    monkeypatch.setattr(common, "_should_have_exited", [True])  # as billiard's handler of signals

    with pytest.raises(SystemExit):
        run("leave")


def test_a_body_that_awaits_one_that_exits_gets_its_failure(app, run) -> None:
    @app.cls
    class Model:
        @gw.method()
        def leave(self):
            raise SystemExit(3)

        @gw.method()
        async def leave_too(self):
            raise SystemExit(4)

    @app.remote
    async def ask(name):
        try:
            await getattr(Model(), name)()
        except errors.BodyExited as exc:
            return repr(exc.__cause__)

    execution.current().enter([app.registry], list(app.registry.services.values()))

    assert ask.local("leave") == "SystemExit(3)"
    assert ask.local("leave_too") == "SystemExit(4)"


class Loading:
    """Declares a class whose load of another model than the default waits for the test."""

    def __init__(self, app: gw.App) -> None:
        self.began = threading.Event()
        self.goes_on = threading.Event()
        loading = self

        @app.cls
        class Model:
            name: str = gw.parameter(default="small")

            @gw.on_enter()
            def load(self):
                self.loaded = self.name
                if self.loaded == "large":
                    loading.began.set()
                    loading.goes_on.wait(LONG)

            @gw.method()
            def predict(self):
                return self.loaded

            @gw.method()
            async def predict_async(self):
                return self.loaded

    def end(self, app: gw.App) -> Any:
        """Let the load go on; returns the instance that it made, once it is there."""
        self.goes_on.set()
        (service,) = app.registry.services.values()
        return execution.current().instances_of(service)


LARGE = {"name": "large"}
METHODS = pytest.mark.parametrize("method", ["predict", "predict_async"])


@METHODS
@pytest.mark.parametrize(
    ("limit", "error"),
    [("soft_limit", SoftTimeLimitExceeded), ("hard_limit", execution.HardLimit)],
)
def test_a_limit_ends_the_wait_for_a_load_which_goes_on(app, run, method, limit, error) -> None:
    loading = Loading(app)

    with pytest.raises(error):
        run(method, given=LARGE, **{limit: 0.05})
    owner = loading.end(app)
    assert run(method, given=LARGE) == "large"
    assert [one.in_use for one in owner._loaded] == [0, 0]


@METHODS
def test_a_revoked_input_does_not_wait_for_its_load(app, run, method: str) -> None:
    loading = Loading(app)

    with revoked_once(loading.began), pytest.raises(execution.Revoked):
        run(method, given=LARGE)
    owner = loading.end(app)
    assert run(method, given=LARGE) == "large"
    assert [one.in_use for one in owner._loaded] == [0, 0]
