from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gw_celery import errors
from gw_celery.runtime import lifecycle

LONG = 60.0


class Probe:
    """A unit that writes down what happens to it, and does what it is told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.tasks: list[asyncio.Task[None] | None] = []
        self.enter: Callable[[], Awaitable[object]] = self._nothing
        self.leave: Callable[[], Awaitable[object]] = self._nothing

    async def _nothing(self) -> None: ...

    def life(self, exit_timeout: float = LONG) -> lifecycle.Entered:
        return lifecycle.Entered(self.name, self, exit_timeout)

    async def __aenter__(self) -> str:
        self.tasks.append(asyncio.current_task())
        try:
            await self.enter()
        except asyncio.CancelledError:
            self.log.append(f"cancel {self.name}")
            raise
        self.log.append(f"enter {self.name}")
        return f"value of {self.name}"

    async def __aexit__(self, *exc: object) -> None:
        self.tasks.append(asyncio.current_task())
        await self.leave()
        self.log.append(f"leave {self.name}")


def probes(*names: str) -> tuple[list[Probe], list[str]]:
    log: list[str] = []
    return [Probe(name, log) for name in names], log


def failing(exc: BaseException) -> Callable[[], Awaitable[object]]:
    async def enter() -> None:
        raise exc

    return enter


def swallowing(release: asyncio.Event, log: list[str]) -> Callable[[], Awaitable[object]]:
    """Wait for ``release``, and ignore cancellation."""

    async def wait() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                log.append("swallowed")

    return wait


async def forever() -> None:
    await asyncio.Event().wait()


def test_units_enter_in_parallel() -> None:
    async def main() -> None:
        (first, second), log = probes("first", "second")
        met = asyncio.Barrier(2)
        first.enter = second.enter = met.wait  # each needs the other to be entering, too

        lives = [first.life(), second.life()]
        await lifecycle.settle_all(lives, LONG)

        assert [life.value.result() for life in lives] == ["value of first", "value of second"]
        await lifecycle.leave_all(lives)
        assert sorted(log[2:]) == ["leave first", "leave second"]

    asyncio.run(main())


def test_units_leave_in_parallel() -> None:
    async def main() -> None:
        (first, second), log = probes("first", "second")
        met = asyncio.Barrier(2)
        first.leave = second.leave = met.wait  # each needs the other to be leaving, too
        lives = [first.life(), second.life()]
        await lifecycle.settle_all(lives, LONG)

        await lifecycle.leave_all(lives)
        assert sorted(log[2:]) == ["leave first", "leave second"]

    asyncio.run(main())


def test_entering_and_leaving_happen_in_the_same_task() -> None:
    async def main() -> None:
        (unit,), _ = probes("model")
        life = unit.life()
        await lifecycle.settle_all([life], LONG)
        await lifecycle.leave_all([life])

        assert unit.tasks[0] is unit.tasks[1]
        assert unit.tasks[0] is not asyncio.current_task()

    asyncio.run(main())


def test_one_that_fails_cancels_the_rest_and_those_that_entered_are_left() -> None:
    async def main() -> None:
        (entered, broken, slow), log = probes("entered", "broken", "slow")
        broken.enter = failing(OSError("no weights"))
        slow.enter = forever

        with pytest.raises(errors.StartupError) as caught:
            await lifecycle.settle_all([entered.life(), broken.life(), slow.life()], LONG)

        assert log == ["enter entered", "cancel slow", "leave entered"]
        assert list(caught.value.causes) == ["broken"]
        assert "broken: OSError: no weights" in str(caught.value)

    asyncio.run(main())


def test_one_that_enters_in_spite_of_being_cancelled_is_left() -> None:
    async def main() -> None:
        (stubborn, broken), log = probes("stubborn", "broken")

        async def enter_anyhow() -> None:
            try:
                await forever()
            except asyncio.CancelledError:
                log.append("swallowed")

        stubborn.enter = enter_anyhow
        broken.enter = failing(OSError())

        with pytest.raises(errors.StartupError):
            await lifecycle.settle_all([stubborn.life(), broken.life()], LONG)

        assert log == ["swallowed", "enter stubborn", "leave stubborn"]

    asyncio.run(main())


def test_all_causes_are_reported_together() -> None:
    async def main() -> None:
        (first, second), _ = probes("first", "second")
        met = asyncio.Barrier(2)

        async def fail_together() -> None:
            await met.wait()
            raise ValueError("both")

        first.enter = second.enter = fail_together

        with pytest.raises(errors.StartupError) as caught:
            await lifecycle.settle_all([first.life(), second.life()], LONG)

        assert sorted(caught.value.causes) == ["first", "second"]
        assert "2 of the classes to load failed" in str(caught.value)

    asyncio.run(main())


@pytest.mark.parametrize("exc", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_what_is_no_exception_fails_the_start_too(exc: BaseException) -> None:
    async def main() -> None:
        (broken,), _ = probes("broken")
        broken.enter = failing(exc)

        with pytest.raises(errors.StartupError, match="broken"):
            await lifecycle.settle_all([broken.life()], LONG)

    asyncio.run(main())


def test_a_start_that_takes_too_long_names_who_was_late() -> None:
    async def main() -> None:
        (entered, slow), log = probes("entered", "slow")
        slow.enter = forever

        with pytest.raises(errors.StartupError) as caught:
            await lifecycle.settle_all([entered.life(), slow.life()], timeout=0.01)

        assert list(caught.value.causes) == ["slow"]
        assert "gw_start_timeout" in str(caught.value)
        assert log == ["enter entered", "cancel slow", "leave entered"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("leave", "limit", "said"),
    [
        (failing(RuntimeError("stuck")), LONG, ["broken failed to leave", "stuck"]),
        (forever, 0.01, ["broken did not leave", "gw_exit_timeout"]),
    ],
    ids=["fails", "takes too long"],
)
def test_one_that_does_not_leave_skips_no_other(leave, limit, said, caplog) -> None:
    async def main() -> None:
        (broken, other), log = probes("broken", "other")
        broken.leave = leave
        lives = [broken.life(exit_timeout=limit), other.life()]
        await lifecycle.settle_all(lives, LONG)
        await lifecycle.leave_all(lives)

        assert log[-1] == "leave other"

    asyncio.run(main())
    assert [one for one in said if one not in caplog.text] == []


def test_one_that_ignores_its_limit_holds_no_other_up(caplog) -> None:
    async def main() -> None:
        (stubborn, other), log = probes("stubborn", "other")
        release = asyncio.Event()
        stubborn.leave = swallowing(release, log)
        lives = [stubborn.life(exit_timeout=0.01), other.life()]
        await lifecycle.settle_all(lives, LONG)
        await lifecycle.leave_all(lives)

        assert {"leave other", "swallowed"} <= set(log)
        release.set()

    asyncio.run(main())
    assert "stubborn did not leave" in caplog.text


def test_one_that_never_stops_entering_does_not_hold_up_a_failed_start() -> None:
    async def main() -> None:
        (stubborn, broken), log = probes("stubborn", "broken")
        release = asyncio.Event()
        stubborn.enter = swallowing(release, log)
        broken.enter = failing(OSError("no weights"))

        with pytest.raises(errors.StartupError, match="no weights"):
            await lifecycle.settle_all([stubborn.life(0.01), broken.life()], LONG)
        assert "swallowed" in log
        release.set()

    asyncio.run(main())


def test_a_start_that_is_cancelled_leaves_those_that_entered() -> None:
    async def main() -> None:
        (entered, slow), log = probes("entered", "slow")
        slow.enter = forever
        lives = [entered.life(), slow.life()]
        starting = asyncio.create_task(lifecycle.settle_all(lives, LONG))
        await lives[0].value

        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert log == ["enter entered", "cancel slow", "leave entered"]

    asyncio.run(main())
