"""Inputs that have waited for too long when they could begin."""

from __future__ import annotations

import time
from typing import Any

import gw_celery as gw
from gw_celery import errors
from tests import child_harness
from tests.child_harness import Outcome, Report

LIMIT = 30.0


def asked(ago: float, **more: Any) -> dict[str, Any]:
    return {"gw-enqueued": time.time() - ago, **more}


def test_an_input_that_waited_too_long_is_refused_with_what_it_waited_for(app: gw.App) -> None:
    @app.remote()
    async def embed() -> None: ...

    with child_harness.child_of(app, gw_max_queue_time=LIMIT) as child:
        number = child.run(embed.name, **asked(LIMIT + 5, delivery_info={"routing_key": "gpu.a"}))
        assert child.outcome(number) == (Report.ERROR, Outcome.FAILURE, "QueueTimeExceeded")
        refusal = child.result(number)
    assert (refusal.task, refusal.queue, refusal.limit) == (embed.name, "gpu.a", LIMIT)
    assert refusal.was_sent
    assert refusal.estimate >= LIMIT + 5


def test_what_cannot_be_called_late_may_begin(app: gw.App) -> None:
    @app.remote()
    async def embed() -> None: ...

    requests: dict[str, dict[str, Any]] = {
        "foreign": {},
        "in time": asked(LIMIT - 10),
        "from a clock that is ahead": asked(-1e6),
        "odd": {"gw-enqueued": "long ago"},
        "redelivered": asked(LIMIT + 1, delivery_info={"redelivered": True}),
        "quorum": asked(LIMIT + 1, **{"x-delivery-count": 1}),
    }
    with child_harness.child_of(app, gw_max_queue_time=LIMIT) as child:
        outcomes = {
            name: child.outcome(child.run(embed.name, **request))
            for name, request in requests.items()
        }
    assert outcomes == dict.fromkeys(requests, (Report.DONE, "None"))


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
