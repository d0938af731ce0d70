"""Inputs that have waited for too long when they could begin."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gw_celery import errors
from gw_celery.replica import queue_time

LIMIT = 30.0


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
