"""What a message says of its input, also when a stranger wrote it."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from celery.utils.objects import Bunch

from gw_celery.protocol import headers

ODD = [True, "1", None, [1.0], {}, -1, -0.5, math.nan, math.inf, 10**400, 2e12, Decimal(1), 1j]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_what_is_no_workload_counts_as_the_default(odd: Any) -> None:
    assert headers.workload(odd) is None
    assert headers.workload_of({"gw-workload": odd}) == 1.0


def test_a_message_without_the_header_counts_as_the_default() -> None:
    assert headers.workload_of({"task": "t"}) == 1.0


@pytest.mark.parametrize(
    "given", [0, 3, 2.5, Fraction(1, 2), np.float32(2.5), np.int64(3), 1e12], ids=repr
)
def test_any_real_number_from_0_on_is_a_workload(given: Any) -> None:
    found = headers.workload(given)
    assert found == given
    assert type(found) is float, "it travels in a header"


@pytest.mark.parametrize(
    "odd", [None, True, "10", [10.0], math.nan, math.inf, 10**400, -(10**400)], ids=repr
)
def test_an_input_that_does_not_say_since_when_it_waits_is_never_late(odd: Any) -> None:
    assert headers.waited({"gw-enqueued": odd}, 1000.0) == 0.0
    assert headers.waited({}, 1000.0) == 0.0


def test_a_clock_that_is_ahead_makes_no_input_late_and_none_early() -> None:
    assert headers.waited({"gw-enqueued": 990.0}, 1000.0) == 10.0
    assert headers.waited({"gw-enqueued": 1010.0}, 1000.0) == 0.0


@pytest.mark.parametrize(("value", "expected"), [(2, 2.0), (-0.5, -0.5), (Fraction(1, 4), 0.25)])
def test_a_real_number_is_read_as_a_float(value: object, expected: float) -> None:
    assert headers.finite(value) == expected


@pytest.mark.parametrize(
    "value", [True, None, "1", [1], 1j, 10**400, float("nan"), float("inf")], ids=lambda one: "odd"
)
def test_anything_else_is_none(value: object) -> None:
    assert headers.finite(value) is None


@pytest.mark.parametrize(
    ("tag", "incarnation"),
    [("w@host:1.0/7", "w@host:1.0"), ("a/b@host:1.0/12", "a/b@host:1.0"), ("w\n/1", "w\n")],
)
def test_the_hold_of_a_message_names_its_incarnation(tag: str, incarnation: str) -> None:
    assert headers.hold_of({"properties": {"delivery_tag": tag}}) == tag
    assert headers.incarnation_of(tag) == incarnation


@pytest.mark.parametrize(
    "request_",
    [
        *(
            {"properties": {"delivery_tag": tag}}
            for tag in (7, None, "", "8a-43", "/1", "w/", "w/x")
        ),
        *({"properties": properties} for properties in (None, "w/1", ["w/1"])),
        *({}, None, object(), Bunch(name="unknown")),
    ],
)
def test_anything_else_names_no_hold(request_: Any) -> None:
    assert headers.hold_of(request_) is None
