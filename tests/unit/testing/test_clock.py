from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

import gw_celery as gw
from gw_celery.testing import FakeClock

CONTEXT = contextvars.copy_context()


def timed(*times: float) -> tuple[FakeClock, list[float]]:
    """A clock, and which of the timers set for these times have rung: on the running loop."""
    clock, rung = FakeClock(), []
    for when in times:
        clock.call_at(when, lambda when=when: rung.append(when), CONTEXT)
    return clock, rung


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_time_passes_when_it_is_told_to() -> None:
    async def main() -> None:
        clock, rung = timed(0.2, 0.1, 0.4)
        clock.advance(0.25)
        assert rung == []  # a timer never runs inside of the call that moves the clock
        await turns()
        assert rung == [0.1, 0.2]
        assert clock.now() == 0.25
        assert await clock.armed() == pytest.approx(0.15)

    asyncio.run(main())


def test_a_cancelled_timer_does_not_ring_even_when_its_time_has_come() -> None:
    async def main() -> None:
        clock, rung = timed()
        timers = [clock.call_at(1, lambda: rung.append(1), CONTEXT) for _ in range(2)]
        timers[0].cancel()
        clock.advance(1)
        timers[1].cancel()
        await turns()
        assert rung == []
        with pytest.raises(gw.CallTimeout, match="nothing waits for this clock after 0 s"):
            await clock.armed(timeout=0)

    asyncio.run(main())


def test_a_timer_for_a_time_that_has_come_rings_at_once() -> None:
    async def main() -> None:
        _, rung = timed(0)
        await turns()
        assert rung == [0]

    asyncio.run(main())


def test_sums_of_seconds_reach_the_time_that_they_mean() -> None:
    async def main() -> None:
        clock, rung = timed(0.8)
        for _ in range(8):
            clock.advance(0.1)
        await turns()
        assert rung == [0.8]
        assert clock.now() >= rung[0]

    assert sum([0.1] * 8) < 0.8
    asyncio.run(main())


def test_a_thread_may_move_the_clock_of_a_loop() -> None:
    async def main() -> None:
        clock, done, rang_in = FakeClock(), asyncio.Event(), []

        def ring() -> None:
            rang_in.append(threading.get_ident())
            done.set()

        clock.call_at(5, ring, CONTEXT)
        threading.Thread(target=clock.advance, args=(5,)).start()
        await asyncio.wait_for(done.wait(), 10)
        assert rang_in == [threading.get_ident()]

    # Debugging: a loop that another thread does not ask as it must complains.
    asyncio.run(main(), debug=True)


def test_time_never_goes_backwards() -> None:
    with pytest.raises(gw.UsageError, match="time goes forwards"):
        FakeClock().advance(-1)
