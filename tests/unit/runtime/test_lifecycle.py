"""How the contexts of a process enter and leave: all at once, and each whatever the others do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

import gw_celery as gw
from gw_celery import errors
from gw_celery.testing import in_process

LONG = 60.0

Act = Callable[[], Awaitable[object]]


async def nothing() -> None: ...


async def forever() -> None:
    await asyncio.Event().wait()


def failing(exc: BaseException) -> Act:
    async def act() -> None:
        raise exc

    return act


def swallowing(release: asyncio.Event, log: list[str]) -> Act:
    """Wait for ``release``, and ignore cancellation."""

    async def wait() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                log.append("swallowed")

    return wait


class Contexts:
    """Contexts of an App with one service, which write down what happens to them."""

    def __init__(self, app: gw.App) -> None:
        self.app = app
        self.log: list[str] = []
        self.tasks: list[asyncio.Task[None] | None] = []
        app.celery.conf.update(gw_start_timeout=LONG, gw_exit_timeout=LONG)

        @app.remote
        async def body() -> None: ...

    def add(self, name: str, enter: Act = nothing, leave: Act = nothing) -> type:
        contexts = self

        class Context:
            async def __aenter__(self) -> str:
                contexts.tasks.append(asyncio.current_task())
                try:
                    await enter()
                except asyncio.CancelledError:
                    contexts.log.append(f"cancel {name}")
                    raise
                contexts.log.append(f"enter {name}")
                return f"value of {name}"

            async def __aexit__(self, *exc: object) -> None:
                contexts.tasks.append(asyncio.current_task())
                await leave()
                contexts.log.append(f"leave {name}")

        Context.__qualname__ = name
        return self.app.context()(Context)

    def failed(self) -> errors.StartupError:
        """Serve the App, which fails."""
        with pytest.raises(errors.StartupError) as caught, in_process(self.app):
            raise AssertionError("served")
        return caught.value


@pytest.fixture
def contexts(app: gw.App) -> Contexts:
    return Contexts(app)


def names(error: errors.StartupError) -> list[str]:
    return sorted(name.rpartition(".")[2] for name in error.causes)


def test_contexts_enter_in_parallel_and_leave_in_parallel(contexts: Contexts) -> None:
    entering, leaving = asyncio.Barrier(2), asyncio.Barrier(2)  # each needs the other one
    added = [contexts.add(name, entering.wait, leaving.wait) for name in ("first", "second")]

    with in_process(contexts.app):
        values = [contexts.app.get_context(context) for context in added]
    assert values == ["value of first", "value of second"]
    assert sorted(contexts.log[2:]) == ["leave first", "leave second"]


def test_entering_and_leaving_happen_in_the_same_task(contexts: Contexts) -> None:
    contexts.add("model")
    with in_process(contexts.app):
        pass
    entered, left = contexts.tasks
    assert entered is left is not None


def test_one_that_fails_cancels_the_rest_and_those_that_entered_are_left(
    contexts: Contexts,
) -> None:
    contexts.add("entered")
    contexts.add("broken", failing(OSError("no weights")))
    contexts.add("slow", forever)

    error = contexts.failed()
    assert contexts.log == ["enter entered", "cancel slow", "leave entered"]
    assert names(error) == ["broken"]
    assert "broken: OSError: no weights" in str(error)


def test_one_that_enters_in_spite_of_being_cancelled_is_left(contexts: Contexts) -> None:
    async def enter_anyhow() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            contexts.log.append("swallowed")

    contexts.add("stubborn", enter_anyhow)
    contexts.add("broken", failing(OSError()))

    contexts.failed()
    assert contexts.log == ["swallowed", "enter stubborn", "leave stubborn"]


def test_all_causes_are_reported_together(contexts: Contexts) -> None:
    met = asyncio.Barrier(2)

    async def fail_together() -> None:
        await met.wait()
        raise ValueError("both")

    for name in ("first", "second"):
        contexts.add(name, fail_together)

    error = contexts.failed()
    assert names(error) == ["first", "second"]
    assert "2 of the classes to load failed" in str(error)


@pytest.mark.parametrize("exc", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_what_is_no_exception_fails_the_start_too(contexts: Contexts, exc: BaseException) -> None:
    contexts.add("broken", failing(exc))
    error = contexts.failed()
    assert names(error) == ["broken"]
    assert type(exc).__name__ in str(error)


def test_a_start_that_takes_too_long_names_those_that_were_late(contexts: Contexts) -> None:
    contexts.app.celery.conf.gw_start_timeout = 0.05
    contexts.add("entered")
    contexts.add("slow", forever)

    error = contexts.failed()
    assert names(error) == ["slow"]
    assert "gw_start_timeout" in str(error)
    assert contexts.log == ["enter entered", "cancel slow", "leave entered"]


@pytest.mark.parametrize(
    ("leave", "limit", "said"),
    [
        (failing(RuntimeError("stuck")), LONG, ["broken failed to leave", "stuck"]),
        (forever, 0.01, ["broken did not leave", "gw_exit_timeout"]),
    ],
    ids=["fails", "takes too long"],
)
def test_one_that_does_not_leave_skips_no_other(
    contexts: Contexts, leave: Act, limit: float, said: list[str], caplog
) -> None:
    contexts.app.celery.conf.gw_exit_timeout = limit
    contexts.add("broken", leave=leave)
    contexts.add("other")
    with in_process(contexts.app):
        pass
    assert contexts.log[-1] == "leave other"
    assert [text for text in said if text not in caplog.text] == []


def test_one_that_ignores_its_limit_holds_no_other_up(contexts: Contexts, caplog) -> None:
    contexts.app.celery.conf.gw_exit_timeout = 0.05
    contexts.add("stubborn", leave=swallowing(asyncio.Event(), contexts.log))
    contexts.add("other")
    with in_process(contexts.app):
        pass
    assert {"leave other", "swallowed"} <= set(contexts.log)
    assert "stubborn did not leave" in caplog.text


def test_one_that_never_stops_entering_does_not_hold_up_a_failed_start(contexts: Contexts) -> None:
    contexts.app.celery.conf.gw_exit_timeout = 0.05
    contexts.add("stubborn", swallowing(asyncio.Event(), contexts.log))
    contexts.add("broken", failing(OSError("no weights")))

    assert "no weights" in str(contexts.failed())
    assert "swallowed" in contexts.log
