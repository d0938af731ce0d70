"""Inputs that have waited for too long when they could begin."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from gw_celery import errors
from gw_celery.protocol import frames
from gw_celery.replica import input as replica_input
from gw_celery.replica import queue_time
from gw_celery.runtime import greenlet_bridge
from tests.unit.runtime.tracers import keep, run

LIMIT = 30.0
LATE = errors.QueueTimeExceeded("t", "q", LIMIT, 31.0, True)


def asked(ago: float, **more: Any) -> dict[str, Any]:
    return {"gw-enqueued": time.time() - ago, **more}


def test_an_input_that_waited_too_long_is_refused_with_what_it_waited_for() -> None:
    request = asked(LIMIT + 5, delivery_info={"routing_key": "gpu.embed"})
    refusal = queue_time.rejection("proj.embed", request, LIMIT)
    assert refusal is not None
    assert (refusal.task, refusal.queue, refusal.limit) == ("proj.embed", "gpu.embed", LIMIT)
    assert refusal.was_sent
    assert refusal.estimate >= LIMIT + 5


@pytest.mark.parametrize(
    "request_of",
    [
        dict,
        lambda: asked(LIMIT - 10),
        lambda: asked(-1e6),
        lambda: {"gw-enqueued": "long ago"},
        lambda: asked(LIMIT + 1, delivery_info={"redelivered": True}),
        lambda: asked(LIMIT + 1, **{"x-delivery-count": 1}),
    ],
    ids=["foreign", "in time", "from a clock that is ahead", "odd", "redelivered", "quorum"],
)
def test_what_cannot_be_called_late_may_begin(request_of: Any) -> None:
    assert queue_time.rejection("t", request_of(), LIMIT) is None


def waiting() -> tuple[replica_input.InFlight, list[tuple[Any, ...]]]:
    told: list[tuple[Any, ...]] = []
    one = replica_input.InFlight(1, "t", "a", told.append)
    one.judge = lambda: LATE
    return one, told


def test_a_late_input_is_accepted_and_fails_in_place_of_its_body() -> None:
    one, told = waiting()
    assert not one.begin()
    assert not one.begin()
    assert [report[0] for report in told] == [frames.Report.ACCEPT]
    with pytest.raises(errors.QueueTimeExceeded) as raised:
        one.run_body(lambda: "never", (), {})
    assert raised.value is LATE


def test_one_that_is_late_for_its_batch_fails_where_it_waits() -> None:
    one, told = waiting()

    async def act() -> Any:
        waits = asyncio.Event()

        async def wait() -> None:
            waits.set()
            await asyncio.Event().wait()

        async def trace() -> Any:
            one.task = asyncio.current_task()
            body = lambda: one.run_body(lambda: greenlet_bridge.drive(wait()), (), {})  # noqa: E731
            return await greenlet_bridge.step(lambda: keep(body), one)

        tracing = asyncio.create_task(trace())
        await waits.wait()
        assert not one.begin()
        outcome = await tracing
        assert tracing.cancelling() == 0
        return outcome

    assert run(act) is LATE
    assert [report[0] for report in told] == [frames.Report.ACCEPT]


def test_the_error_says_what_is_the_matter_and_comes_back_as_it_went() -> None:
    sent = errors.QueueTimeExceeded("proj.embed", "gpu.embed", 30.0, 41.26)
    assert str(sent) == (
        "proj.embed would wait for about 41.3 s in the queue 'gpu.embed', which is over "
        "max_queue_time=30, and was not sent: call it later, add replicas, or raise "
        "max_queue_time (setting gw_max_queue_time)"
    )
    again = errors.QueueTimeExceeded(*sent.args)
    assert str(again) == str(sent)
    waited = errors.QueueTimeExceeded("proj.embed", "gpu.embed", 30.0, 41.26, True)
    assert "waited 41.3 s" in str(waited)
    assert "was not started" in str(waited)
