"""What Celery hears of the exception with which the tracer of a child ended."""

from __future__ import annotations

import json
from typing import Any

from celery.exceptions import Reject, Retry

from gw_celery.replica import tracer
from tests.pool_harness import Harness


def arrived(harness: Harness, exc: BaseException) -> Any:
    request = harness.submit()
    child = harness.child(0)
    child.accept(request)
    child.report(list(tracer.failure(request.handle.number, exc, "")))
    return request.answer.exception


def test_a_rejection_arrives_with_the_reason_that_was_given(harness: Harness) -> None:
    assert arrived(harness, Reject("no model", requeue=True)).reason == "no model"


def test_a_retry_arrives_with_its_cause(harness: Harness) -> None:
    exc = arrived(harness, Retry("later", ValueError("busy"), 3))
    assert str(exc) == "later"
    assert repr(exc.exc) == "ValueError('busy')"


def test_a_failure_arrives_with_its_class_and_text(harness: Harness) -> None:
    exc = arrived(harness, json.JSONDecodeError("bad", "doc", 0))
    assert str(exc) == "json.decoder.JSONDecodeError: bad: line 1 column 1 (char 0)"
