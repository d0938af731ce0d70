"""Inputs that have waited for too long when they could begin."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from gw_celery import conf, errors
from gw_celery.pool import jobs, wire
from tests.unit.pool.handmade import Child, Pool, Request

LIMIT = 30.0


@pytest.fixture
def pool(child: Child) -> Pool:
    made = Pool(child)
    made.inputs._queue_times = {"embed": LIMIT}
    return made


def enqueued(ago: float) -> dict[str, Any]:
    return {"gw-enqueued": time.time() - ago}


def test_an_input_that_is_late_never_starts_and_frees_its_slot(pool: Pool, child: Child) -> None:
    late = pool.submit("late", headers=enqueued(LIMIT + 1))
    for one in "ab":
        pool.submit(one, headers=enqueued(LIMIT - 10))
    pool.dispatch()
    assert pool.heard(late) == [errors.QueueTimeExceeded]
    assert child.runs == ["a", "b"]
    tally = pool.inputs.tallies.seen()["embed"]
    assert (tally.given_back_inputs, tally.running_inputs, tally.waiting_inputs) == (1, 2, 0)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"headers": enqueued(-1e6)},
        {"headers": {"gw-enqueued": "long ago"}},
        {"headers": enqueued(LIMIT + 1), "is_redelivered": True},
        {"headers": enqueued(LIMIT + 1) | {"x-delivery-count": 1}},
    ],
    ids=["foreign", "from a clock that is ahead", "odd", "redelivered", "of a quorum queue"],
)
def test_what_cannot_be_called_late_starts(pool: Pool, child: Child, given: Any) -> None:
    pool.submit("a", **given)
    pool.dispatch()
    assert child.runs == ["a"]


def test_a_service_without_a_limit_starts_whatever_comes(pool: Pool, child: Child) -> None:
    pool.inputs._queue_times = {}
    pool.submit("a", headers=enqueued(10 * LIMIT))
    pool.dispatch()
    assert child.runs == ["a"]


def test_what_has_expired_as_well_is_celerys_to_answer(pool: Pool) -> None:
    job = pool.submit("a", headers=enqueued(LIMIT + 1))
    pool.requests[job].is_revoked = True
    pool.dispatch()
    assert pool.heard(job) == ["revoked"]


def test_an_input_that_was_late_in_its_child_is_refused(pool: Pool) -> None:
    job = pool.submit("a", headers=enqueued(LIMIT - 10), gathers=True)
    pool.dispatch()
    job.request.update(enqueued(LIMIT + 1))
    pool.report(job, wire.Report.EXPIRED)
    pool.report(job, wire.Report.GONE)
    assert pool.heard(job) == [errors.QueueTimeExceeded]


class Early(Request):
    """A request that is acknowledged when it begins."""

    task = SimpleNamespace(acks_late=False)
    acknowledged = False

    def acknowledge(self) -> None:
        self.acknowledged = True


def test_one_that_would_be_acknowledged_at_its_start_is_acknowledged_with_its_twins() -> None:
    requests = Early(), Early()
    job, twin = (
        jobs.Job(number, ("t", "a", {}), "embed", one.options(), lambda job, signum: None)
        for number, one in enumerate(requests)
    )
    job.join(twin, 0.0)
    job.refuse(errors.QueueTimeExceeded("t", "q", 1.0, 2.0, True))
    assert [one.heard for one in requests] == [[errors.QueueTimeExceeded]] * 2
    assert all(one.acknowledged for one in requests)


def test_celery_logs_it_without_the_lines_of_ours_that_refused_it() -> None:
    told: list[Any] = []
    job = jobs.Job(0, ("t", "a", {}), "embed", {"error_callback": told.append}, lambda *_: None)
    job.refuse(errors.QueueTimeExceeded("t", "q", 1.0, 2.0, True))
    (einfo,) = told
    logged = logging.Formatter().formatException(einfo.exc_info)
    assert logged == "gw_celery.errors." + str(einfo)
    assert str(einfo).startswith("QueueTimeExceeded: t waited 2.0 s")


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


def test_the_projects_limit_is_for_services_that_have_none() -> None:
    assert conf.Settings().max_queue_time is None
