from __future__ import annotations

import fractions

import pytest

from gw_celery.protocol import untrusted


@pytest.mark.parametrize(
    ("value", "expected"), [(2, 2.0), (-0.5, -0.5), (fractions.Fraction(1, 4), 0.25)]
)
def test_a_real_number_is_read_as_a_float(value: object, expected: float) -> None:
    assert untrusted.finite(value) == expected


@pytest.mark.parametrize(
    "value", [True, None, "1", [1], 1j, 10**400, float("nan"), float("inf")], ids=lambda one: "odd"
)
def test_anything_else_is_none(value: object) -> None:
    assert untrusted.finite(value) is None
