"""Outcomes that can never be stored: each becomes, at once, a stored failure that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import celery
import pytest

import gw_celery as gw
from gw_celery import codec, errors
from tests import child_harness
from tests.child_harness import Outcome, Report

#: Bytes that a document may have in these tests.
LIMIT = 20_000
FAILED = (Report.ERROR, Outcome.FAILURE)
Declare = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("ignore:Exception raised outside body")


@pytest.fixture(autouse=True)
def small_documents(app: gw.App) -> Iterator[None]:
    codec.configure(codec.Limits(size=LIMIT))
    yield
    codec.configure(codec.Limits())


@pytest.fixture(params=["memory", "redis"])
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The options of a child that stores in threads, or on its loop."""
    if request.param == "memory":
        return {}
    return {"backend": request.getfixturevalue("result_url")}


@pytest.fixture(params=["on the loop", "in a thread"])
def declare(request: pytest.FixtureRequest, app: gw.App) -> Declare:
    """Declare a task whose body raises ``exc`` or returns, and return its name."""

    def make(exc: Exception | None = None, **options: Any) -> str:
        def ends() -> str:
            if exc is not None:
                raise exc
            return "value"

        async def ends_on_the_loop() -> str:
            return ends()

        if request.param == "on the loop":
            return str(app.remote(**options)(ends_on_the_loop).name)
        return str(app.celery.task(ends, **options).name)

    return make


def failure(app: gw.App, child: child_harness.Child, number: int) -> tuple[str, str]:
    """The class and the text of the stored failure of an input."""
    record = app.celery.backend.get_task_meta(child.id(number))
    assert record["status"] == "FAILURE"
    return type(record["result"]).__name__, errors.text_of(record["result"])


#: Each argument of an error is cut; together, these are too long for a document.
TOO_LONG = LookupError(*["y" * 900] * 50)


class Panic(BaseException):
    """As libraries in Rust raise it."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Unshowable(Exception):
    def __repr__(self) -> str:
        raise KeyboardInterrupt


class Broken(Exception):
    def __str__(self) -> str:
        raise Panic

    __repr__ = __str__


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit(4)


@pytest.mark.parametrize(
    ("exc", "says"),
    [
        (TOO_LONG, ["LookupError", f"{LIMIT} are allowed", "'yyy"]),
        (Unpicklable("z"), ["SystemExit", "4"]),
    ],
    ids=["its arguments", "its pickling"],
)
def test_for_an_error_that_cannot_be_stored_a_short_one_is_stored(
    app: gw.App, declare: Declare, backend: dict[str, Any], exc: Exception, says: list[str]
) -> None:
    task = declare(exc)
    with child_harness.child_of(app, **backend) as child:
        number = child.run(task)
        assert child.outcome(number)[:2] == FAILED
        kind, text = failure(app, child, number)
        assert kind == "OutcomeNotStored"
        assert len(text) < 2000
        assert all(part in text for part in says)


@pytest.mark.parametrize(
    "exc", [ValueError("x" * 2 * LIMIT), KeyError(*["y"] * LIMIT), ValueError(["z" * 2 * LIMIT])]
)
def test_a_long_error_is_stored_cut(
    app: gw.App, declare: Declare, backend: dict[str, Any], exc: Exception
) -> None:
    task = declare(exc)
    with child_harness.child_of(app, **backend) as child:
        number = child.run(task)
        reported = child.outcome(number)
        assert reported[:2] == FAILED
        assert len(str(reported)) < LIMIT
        kind, text = failure(app, child, number)
        assert kind == type(exc).__name__
        assert len(text) < 1100
        assert str(exc)[:90] in text


@pytest.mark.parametrize("exc", [Unspeakable("x"), Unshowable("x"), Broken("x")])
def test_an_error_whose_text_raises_is_reported_without_it(
    app: gw.App, declare: Declare, backend: dict[str, Any], exc: Exception
) -> None:
    task = declare(exc)
    with child_harness.child_of(app, **backend) as child:
        number = child.run(task)
        assert child.outcome(number)[:2] == FAILED
        assert app.celery.backend.get_task_meta(child.id(number))["status"] == "FAILURE"
        assert child.outcome(child.run(task))[:2] == FAILED  # the child lives


def test_a_retry_whose_error_cannot_be_stored_stays_a_retry(
    app: gw.App, backend: dict[str, Any]
) -> None:
    """Its message has been sent: a failure would call the errbacks of a task that may succeed."""

    @app.celery.task(bind=True)
    def retries(self: Any) -> None:
        raise self.retry(exc=TOO_LONG, countdown=60)

    with child_harness.child_of(app, **backend) as child:
        number = child.run(retries.name)
        assert child.outcome(number)[:2] == (Report.ERROR, Outcome.RETRY)
        assert app.celery.backend.get_task_meta(child.id(number))["status"] == "RETRY"


@pytest.mark.parametrize("exc", [ValueError("short"), TOO_LONG])
@pytest.mark.parametrize("broken", [{"task": "x"}, {"task": 1}, {}, "x", None, 5])
def test_a_broken_errback_costs_neither_the_failure_nor_the_others(
    app: gw.App, declare: Declare, backend: dict[str, Any], exc: Exception, broken: Any
) -> None:
    called: list[str] = []

    @app.celery.task
    def errback(request: Any, exc: Exception, traceback: Any) -> None:
        called.append(request.id)

    task, good = declare(exc), dict(errback.s())
    with child_harness.child_of(app, **backend) as child:
        number = child.run(task, embed={"errbacks": [good, broken, good]})
        assert child.outcome(number)[:2] == FAILED
        assert called == [child.id(number)] * 2
        kind, _ = failure(app, child, number)
        assert kind == ("OutcomeNotStored" if exc is TOO_LONG else "ValueError")


@pytest.mark.parametrize("exc", [ValueError("short"), None])
@pytest.mark.parametrize("broken", [{"task": "x"}, "x", 5])
def test_an_input_of_a_broken_chord_fails(
    app: gw.App, declare: Declare, backend: dict[str, Any], exc: Exception | None, broken: Any
) -> None:
    task = declare(exc)
    with child_harness.child_of(app, **backend) as child:
        number = child.run(task, group="g", embed={"chord": broken})
        kind, *content = child.outcome(number)
        state = app.celery.backend.get_task_meta(child.id(number))["status"]
        assert (kind, *content[:1]) == FAILED or (kind, state) == (Report.DONE, "SUCCESS")


@pytest.mark.parametrize(
    "raised", [SystemExit(5), ValueError("hook"), OSError("hook"), Broken("hook")]
)
@pytest.mark.parametrize("hook", ["on_failure", "after_return", "before_start"])
def test_a_hook_that_raises_does_not_make_its_input_run_again(
    app: gw.App, declare: Declare, backend: dict[str, Any], raised: BaseException, hook: str
) -> None:
    called: list[str] = []

    @app.celery.task
    def errback(request: Any, exc: Exception, traceback: Any) -> None:
        called.append(request.id)

    def refuse(self: Any, *_: Any) -> None:
        raise raised

    base = type("Hooked", (celery.Task,), {hook: refuse})
    task = declare(LookupError("body"), base=base)
    with child_harness.child_of(app, **backend) as child:
        number = child.run(task, embed={"errbacks": [dict(errback.s())]})
        assert child.outcome(number)[:2] == FAILED
        failure(app, child, number)
        assert called == [child.id(number)]


@pytest.mark.parametrize("hook", ["on_failure", "after_return"])
@pytest.mark.parametrize("raised", [SystemExit(5), ValueError("hook"), MemoryError("hook")])
def test_a_hook_that_raises_changes_neither_the_stored_error_nor_the_part_of_a_chord(
    app: gw.App, declare: Declare, result_url: str, raised: BaseException, hook: str
) -> None:
    def refuse(self: Any, *_: Any) -> None:
        raise raised

    task = declare(LookupError("body"), base=type("Hooked", (celery.Task,), {hook: refuse}))
    chord = {"task": "unit.other", "args": [], "kwargs": {}, "options": {}, "chord_size": 5}
    with child_harness.child_of(app, backend=result_url) as child:
        number = child.run(task, group="g", group_index=0, embed={"chord": chord})
        assert child.outcome(number)[:2] == FAILED
        assert failure(app, child, number)[0] == "LookupError"
        backend: Any = app.celery.backend
        assert backend.client.zcard(backend.get_key_for_group("g", ".j")) == 1


class OutOfMemory(MemoryError):
    """As numpy raises it."""


@pytest.mark.parametrize("raised", [MemoryError("hook"), OutOfMemory("hook")])
@pytest.mark.parametrize("hook", ["on_failure", "after_return"])
def test_a_hook_without_memory_tells_the_worker_so(
    app: gw.App, declare: Declare, backend: dict[str, Any], raised: BaseException, hook: str
) -> None:
    """The worker then replaces the child."""

    def refuse(self: Any, *_: Any) -> None:
        raise raised

    task = declare(LookupError("body"), base=type("Hooked", (celery.Task,), {hook: refuse}))
    with child_harness.child_of(app, **backend) as child:
        assert child.outcome(child.run(task))[:3] == (*FAILED, "MemoryError")


def test_a_task_that_only_the_parent_knows_fails(app: gw.App, backend: dict[str, Any]) -> None:
    with child_harness.child_of(app, **backend) as child:
        number = child.run("proj.unknown")
        assert child.outcome(number)[:2] == FAILED
        assert "proj.unknown" in failure(app, child, number)[1]
