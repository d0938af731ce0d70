"""What becomes of one body: its arguments, its answer, what it raises, and what interrupts it."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import greenlet
import pytest
from billiard import common
from celery import current_task
from celery.exceptions import (
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    WorkerShutdown,
    WorkerTerminate,
)

import gw_celery as gw
from gw_celery import errors
from tests import child_harness
from tests.child_harness import Outcome, Report
from tests.processes import eventually

LONG = 60.0
#: In the path of our files.
OURS = "/gw_celery/"


def answering(app: gw.App, answer: Callable[[list[Any]], Any], *, is_async: bool) -> Any:
    """Return a batched method that answers with ``answer([texts, languages])``."""

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

    return app.cls(AsyncEmbedder if is_async else Embedder)().embed


EITHER = pytest.mark.parametrize("is_async", [False, True])


@EITHER
def test_a_batched_method_gets_lists_of_one_with_its_defaults(app, is_async: bool) -> None:
    embed = answering(app, lambda got: [got], is_async=is_async)

    assert embed.local("a text") == [["a text"], ["en"]]
    assert embed.local("a text", language="de") == [["a text"], ["de"]]


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
def test_the_answer_of_one_input_is_taken_out_of_the_list(app, is_async, answer) -> None:
    embed = answering(app, lambda _: answer, is_async=is_async)

    assert embed.local("a text") == "one"


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
    app, is_async, answer, said
) -> None:
    embed = answering(app, lambda _: answer, is_async=is_async)

    with pytest.raises(gw.UsageError, match=f"got 1 input and answered with {said}"):
        embed.local("a text")


@EITHER
def test_an_exception_in_a_batched_answer_is_raised(app, is_async) -> None:
    embed = answering(app, lambda _: [KeyError("unknown language")], is_async=is_async)

    with pytest.raises(KeyError, match="unknown language"):
        embed.local("a text")


@EITHER
def test_an_exit_in_a_batched_answer_is_a_failure_as_in_a_replica(app, is_async) -> None:
    embed = answering(app, lambda _: [SystemExit(3)], is_async=is_async)

    with pytest.raises(errors.BodyExited, match=r"answered with SystemExit\(3\)"):
        embed.local("a text")


def test_a_stop_iteration_in_a_thread_ends_the_wait_of_who_awaits_it(app, serve) -> None:
    @app.cls
    class Inner:
        @gw.method()
        def stop(self):
            raise StopIteration

    @app.remote
    async def outer():
        await asyncio.wait_for(Inner().stop(), 10)

    serve()
    with pytest.raises(gw.BodyExited, match="StopIteration"):
        outer.local()


def test_a_batched_function_gets_lists_of_one(app) -> None:
    @app.remote
    @gw.batched(max_batch_size=2)
    async def embed(texts):
        return [len(texts)]

    assert embed.local("a text") == 1


def test_a_sync_method_runs_in_the_thread_of_the_tracer(app) -> None:
    @app.cls
    class Model:
        @gw.method()
        def predict(self):
            return threading.current_thread()

    assert Model().predict.local() is threading.current_thread()


def test_a_sync_method_that_is_awaited_does_not_block_the_loop(app, serve) -> None:
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
    serve()
    assert ask.local() == (True, True)


def waiting(app: gw.App, how: list[str], **options: Any) -> Any:
    """Return a task whose body waits, and notes how it ended."""

    @app.remote(**options)
    async def wait():
        try:
            await asyncio.Event().wait()
        except BaseException as exc:
            how.append(type(exc).__name__)
            raise

    return wait


def test_a_soft_limit_is_raised_in_the_body(app) -> None:
    how: list[str] = []
    with pytest.raises(SoftTimeLimitExceeded):
        waiting(app, how, soft_time_limit=0.01).local()
    assert how == ["SoftTimeLimitExceeded"]


def test_a_hard_limit_ends_the_wait_and_cancels_the_body(app) -> None:
    how: list[str] = []
    with pytest.raises(TimeLimitExceeded):
        waiting(app, how, time_limit=0.01).local()
    assert eventually(lambda: how) == ["CancelledError"]


def test_limits_that_the_pool_enforces_are_not_the_childs(app) -> None:
    @app.cls
    class Model:
        name: str = gw.parameter(default="small")

        @gw.on_enter()
        async def load(self):
            self.loaded = self.name
            for _ in range(3):
                await asyncio.sleep(0)

        @gw.method(soft_time_limit=1e-9, time_limit=1e-9)
        def predict(self):
            return self.loaded

    (service,) = app.registry.services.values()
    name = service.methods["predict"].task_name
    with child_harness.child_of(app) as child:
        number = child.run(name, headers={"gw_params": '{"name":"large"}'})
        assert child.outcome(number) == (Report.DONE, "'large'")


@pytest.mark.parametrize("method", ["fail", "fail_too"])
def test_an_instance_is_given_back_when_its_body_fails(app, method: str) -> None:
    @app.cls
    class Model:
        name: str = gw.parameter()

        @gw.method()
        async def fail(self):
            raise ValueError(self.name)

        @gw.method()
        def fail_too(self):
            raise ValueError(self.name)

    app.celery.conf.gw_max_instances = 1
    for name in ("a", "b"):  # one of which must go for the other
        with pytest.raises(ValueError, match=name):
            getattr(Model(name=name), method).local()


def test_whenever_a_limit_comes_as_a_load_ends_the_instance_can_go_for_another(app) -> None:
    app.celery.conf.gw_max_instances = 1
    loaded: list[str] = []

    @app.cls
    class Model:
        name: str = gw.parameter()

        @gw.on_enter()
        def load(self):
            loaded.append(self.name)

        @gw.method(soft_time_limit=5)
        def predict(self):
            return self.name

    def is_interrupted(moment: int) -> bool:
        """Raise at our n-th call from when it has loaded: Python looks for exceptions there."""
        name, left, before = str(moment), moment, sys.gettrace()

        def interrupt(frame: types.FrameType, event: str, arg: object) -> None:
            nonlocal left
            left -= name in loaded and OURS in frame.f_code.co_filename
            if frame.f_code.co_name == "predict":
                sys.settrace(before)
            elif left == 0:
                raise SoftTimeLimitExceeded("interrupted")

        sys.settrace(interrupt)
        try:
            assert Model(name=name).predict.local() == name
        except SoftTimeLimitExceeded as exc:
            if exc.args != ("interrupted",):
                raise AssertionError("the last one cannot go, and this one waits for it") from exc
        finally:
            sys.settrace(before)
        return left <= 0

    moments = next(moment for moment in itertools.count(1) if not is_interrupted(moment))
    assert moments > 5


def raising(app: gw.App, exc: BaseException) -> Any:
    """Return an object whose bodies raise ``exc``."""

    @app.cls
    class Model:
        @gw.method()
        def leave(self):
            raise exc

        @gw.method()
        @gw.batched(max_batch_size=1)
        def leave_batch(self):
            raise exc

        @gw.method()
        async def leave_async(self):
            await asyncio.sleep(0)
            raise exc

    return Model()


class Panic(BaseException):
    """As a library written in Rust raises."""


@pytest.mark.parametrize("method", ["leave", "leave_batch", "leave_async"])
@pytest.mark.parametrize(
    "exc",
    [
        Panic("index out of bounds"),
        BaseExceptionGroup("two", [Panic(), ValueError()]),
        GeneratorExit(),
        asyncio.CancelledError(),
        greenlet.GreenletExit(),
        SystemExit(3),
    ],
    ids=repr,
)
def test_what_a_body_raises_that_is_no_exception_is_its_failure(app, method: str, exc) -> None:
    model = raising(app, exc)

    with pytest.raises(errors.BodyExited) as caught:
        getattr(model, method).local()
    assert caught.value.__cause__ is exc
    assert repr(exc) in str(caught.value)


def test_a_body_that_is_cancelled_by_one_that_awaits_it_has_not_failed(app, serve) -> None:
    @app.remote
    async def inner(began):
        began.set()
        await asyncio.Event().wait()

    @app.remote
    async def outer():
        began = asyncio.Event()
        waiting = asyncio.ensure_future(inner(began))
        await began.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        return waiting.cancelled()

    serve()
    assert outer.local() is True


def test_an_interrupt_of_a_synchronous_body_in_a_thread_is_its_failure(app) -> None:
    model = raising(app, KeyboardInterrupt())
    caught: list[BaseException] = []

    def trace() -> None:
        try:
            model.leave.local()
        except BaseException as exc:
            caught.append(exc)

    thread = threading.Thread(target=trace)
    thread.start()
    thread.join(LONG)
    assert isinstance(caught[0], errors.BodyExited)


@pytest.mark.parametrize("exc", [WorkerShutdown(0), WorkerTerminate(1), KeyboardInterrupt()])
def test_what_ends_the_worker_or_comes_from_the_keyboard_is_not_the_bodys(app, exc) -> None:
    model = raising(app, exc)

    with pytest.raises(type(exc)) as caught:
        model.leave.local()
    assert caught.value is exc


def test_an_exit_in_a_process_that_was_told_to_end_ends_it(app, monkeypatch) -> None:
    model = raising(app, SystemExit(-241))
    monkeypatch.setattr(common, "_should_have_exited", [True])  # as billiard's handler of signals

    with pytest.raises(SystemExit):
        model.leave.local()


def test_a_body_that_awaits_one_that_exits_gets_its_failure(app, serve) -> None:
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

    serve()
    assert ask.local("leave") == "SystemExit(3)"
    assert ask.local("leave_too") == "SystemExit(4)"


class Loading:
    """Declares a class whose load of another model than the default waits for the test."""

    def __init__(self, app: gw.App, **limits: float) -> None:
        self.began = threading.Event()
        self.goes_on = threading.Event()
        loading = self
        app.celery.conf.gw_max_instances = 2

        @app.cls
        class Model:
            name: str = gw.parameter(default="small")

            @gw.on_enter()
            def load(self):
                self.loaded = self.name
                if self.loaded == "large":
                    loading.began.set()
                    loading.goes_on.wait(LONG)

            @gw.method(**limits)
            def predict(self):
                return self.loaded

            @gw.method(**limits)
            async def predict_async(self):
                return self.loaded

            @gw.method()
            def unlimited(self):
                return self.loaded

        self.model: Any = Model

    def end(self) -> None:
        """Let the load go on; what it made is used, and can go for another."""
        self.goes_on.set()
        assert self.model(name="large").unlimited.local() == "large"
        assert self.model(name="other").unlimited.local() == "other"


METHODS = pytest.mark.parametrize("method", ["predict", "predict_async"])


@METHODS
@pytest.mark.parametrize(
    ("limit", "error"),
    [("soft_time_limit", SoftTimeLimitExceeded), ("time_limit", TimeLimitExceeded)],
)
def test_a_limit_ends_the_wait_for_a_load_which_goes_on(app, method, limit, error) -> None:
    loading = Loading(app, **{limit: 0.05})
    with pytest.raises(error):
        getattr(loading.model(name="large"), method).local()
    loading.end()


@METHODS
def test_a_revoked_input_does_not_wait_for_its_load(app, method: str) -> None:
    loading = Loading(app)
    (service,) = app.registry.services.values()
    name, headers = service.methods[method].task_name, {"gw_params": '{"name":"large"}'}
    with child_harness.child_of(app) as child:
        revoked = child.run(name, headers=headers)
        assert loading.began.wait(LONG)
        child.stop(revoked)
        assert child.outcome(revoked) == (Report.ERROR, Outcome.IGNORE, "Ignore")
        loading.goes_on.set()
        for model in ("large", "other"):  # for which the one that was loaded can go
            number = child.run(name, headers={"gw_params": f'{{"name":"{model}"}}'})
            assert child.outcome(number) == (Report.DONE, f"'{model}'")
