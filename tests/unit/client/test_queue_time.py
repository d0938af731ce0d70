"""What is written into the headers of a message, and which is not sent: no broker, no Redis."""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, group
from celery.exceptions import SoftTimeLimitExceeded

import gw_celery as gw

LIMIT = 5.0


class Panic(BaseException):
    """What a library written in Rust raises."""


@pytest.fixture
def weigh(app: gw.App) -> Any:
    @app.remote(workload_calculator=lambda text, factor=1.0: len(text) * factor)
    async def weigh(text, factor=1.0):
        return text

    return weigh


def workloads(sent: list[dict[str, Any]]) -> list[Any]:
    return [one.get("gw-workload") for one in sent]


# -- workload --


def test_every_way_of_calling_carries_the_workload(weigh: Any, sent: list[dict[str, Any]]) -> None:
    weigh.delay("abc")
    weigh.apply_async(("abc",), {"factor": 2})
    weigh.apply_async(["abc"])
    weigh.s("abc").delay()
    weigh.si("abc").apply_async(countdown=1)
    weigh.options(priority=3).delay("abc")
    group(weigh.s("a"), weigh.s("ab")).delay()
    assert workloads(sent) == [3.0, 6.0, 3.0, 3.0, 3.0, 3.0, 1.0, 2.0]
    assert all(type(one) is float for one in workloads(sent))


def test_methods_are_weighed_without_self(app: gw.App, sent: list[dict[str, Any]]) -> None:
    @app.cls
    class Scale:
        unit: float = gw.parameter(default=1.0)

        @gw.method(workload_calculator=lambda x, times: x * times)
        def weigh(self, x, times):
            return x

    Scale(unit=2.0).weigh.delay(3, times=4)
    assert workloads(sent) == [12.0]
    assert "gw_params" in sent[0], "the headers of others stay"


def test_a_bound_task_is_weighed_without_its_task(app: gw.App, sent: list[dict[str, Any]]) -> None:
    @app.remote(bind=True, workload_calculator=lambda x: x)
    async def own(self, x):
        return x

    own.delay(3)
    assert workloads(sent) == [3.0]


def test_a_task_without_a_calculator_carries_no_header_not_even_of_another(
    app: gw.App, weigh: Any, sent: list[dict[str, Any]]
) -> None:
    @app.remote
    async def plain(text=""):
        return text

    plain.delay()
    plain.apply_async(headers={"gw-workload": 7.0, "gw-enqueued": 1.0, "mine": "x"})
    assert workloads(sent) == [None, None]
    assert "gw-enqueued" not in sent[1]
    assert sent[1]["mine"] == "x"
    weigh.apply_async(("ab",), headers={"gw-workload": 7.0})
    assert workloads(sent)[-1] == 2.0


@pytest.mark.parametrize(
    "calculate",
    [
        lambda x: True,
        lambda x: -1,
        lambda x: float("nan"),
        lambda x: float("inf"),
        lambda x: "1",
        lambda x: None,
        lambda x: 10**400,
        lambda x: 1 / 0,
        lambda: 1.0,
    ],
)
def test_a_calculator_that_does_not_say_counts_as_the_default_with_one_warning(
    app: gw.App,
    sent: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    calculate: Callable[..., Any],
) -> None:
    # Each has a name of its own: a process warns of a task once.
    @app.remote(workload_calculator=calculate, name=f"odd.{uuid4().hex}")
    async def odd(x):
        return x

    for _ in range(3):
        odd.delay(1)
    assert workloads(sent) == [1.0] * 3
    (warning,) = [one for one in caplog.records if "workload_calculator" in one.getMessage()]
    assert warning.levelno == logging.WARNING
    assert odd.name in warning.getMessage()


def test_a_calculator_that_panics_breaks_no_call(app: gw.App, sent: list[dict[str, Any]]) -> None:
    def panic(x):
        raise Panic

    async def later(x):
        return 1.0

    @app.remote(workload_calculator=panic)
    async def rusty(x):
        return x

    @app.remote(workload_calculator=later)
    async def awaited(x):
        return x

    rusty.delay(1)
    awaited.delay(1)
    assert workloads(sent) == [1.0, 1.0]


def test_what_interrupts_the_calling_body_is_not_the_calculators(app: gw.App) -> None:
    def limited(x):
        raise SoftTimeLimitExceeded(1)

    @app.remote(workload_calculator=limited)
    async def interrupted(x):
        return x

    with pytest.raises(SoftTimeLimitExceeded):
        interrupted.delay(1)


def test_a_call_that_celery_refuses_is_not_blamed_on_the_calculator(
    weigh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TypeError):
        weigh.delay()
    assert "workload_calculator" not in caplog.text


def test_eager_mode_works_with_a_calculator_and_a_limit(
    app: gw.App, celery_app: Celery, serve: Callable[[], None]
) -> None:
    @app.remote(workload_calculator=lambda x: x, max_queue_time=LIMIT)
    async def both(x):
        return x

    serve()
    assert both.local(2) == 2
    celery_app.conf.task_always_eager = True
    assert both.delay(2).get() == 2
    assert both.remote(2) == 2


# -- since when it waits --


@pytest.fixture
def patient(app: gw.App) -> Any:
    @app.remote(max_queue_time=LIMIT)
    async def patient(x=0):
        return x

    return patient


def test_only_what_may_wait_for_so_long_says_since_when(
    weigh: Any, patient: Any, sent: list[dict[str, Any]]
) -> None:
    before = time.time()
    weigh.delay("a")
    patient.delay()
    assert "gw-enqueued" not in sent[0]
    assert before <= sent[1]["gw-enqueued"] <= time.time()


def test_what_the_projects_limit_is_for_says_it_too(
    celery_app: Celery, weigh: Any, sent: list[dict[str, Any]]
) -> None:
    celery_app.conf.gw_max_queue_time = 60.0
    weigh.delay("a")
    assert "gw-enqueued" in sent[0]


def test_the_clock_starts_at_the_eta(patient: Any, sent: list[dict[str, Any]]) -> None:
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    patient.apply_async(countdown=3600)
    patient.apply_async(eta=soon)
    patient.apply_async(eta=soon.isoformat())
    patient.apply_async(eta=dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))
    now = time.time()
    for one in sent[:3]:
        assert one["gw-enqueued"] == pytest.approx(now + 3600, abs=60)
    assert sent[3]["gw-enqueued"] == pytest.approx(now, abs=60)


def test_a_repeated_message_waits_anew(patient: Any, sent: list[dict[str, Any]]) -> None:
    patient.apply_async(headers={"gw-enqueued": 1.0}, retries=1)
    assert sent[0]["gw-enqueued"] == pytest.approx(time.time(), abs=60)
