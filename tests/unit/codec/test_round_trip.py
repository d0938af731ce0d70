from __future__ import annotations

import datetime as dt
import decimal
import json
import zoneinfo

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.codec import models
from tests.unit.codec.sameness import same

MICROSECONDS_OF_A_DAY = 24 * 60 * 60 * 1_000_000 - 1


def fixed_zones():
    offsets = st.integers(-MICROSECONDS_OF_A_DAY, MICROSECONDS_OF_A_DAY).map(
        lambda microseconds: dt.timedelta(microseconds=microseconds)
    )
    return st.builds(dt.timezone, offsets) | st.builds(dt.timezone, offsets, st.text(max_size=5))


def with_any_fold(moments):
    return st.builds(lambda moment, fold: moment.replace(fold=fold), moments, st.integers(0, 1))


# Prefixed keys (posix/, right/) are not among the available zones, and are refused.
named_zones = st.timezone_keys(allow_prefix=False).map(zoneinfo.ZoneInfo)
zones = st.none() | st.just(dt.UTC) | fixed_zones() | named_zones
any_text = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(4000, 14284).map(lambda bits: -(2**bits) + 1),
    st.floats(),
    any_text,
    st.sampled_from(["~tuple", "~obj", "~", "\ud83d\ude00", '"~']),
    st.binary(max_size=50),
    with_any_fold(st.datetimes(timezones=zones)),
    with_any_fold(st.times(timezones=st.none() | fixed_zones())),
    st.dates(),
    st.timedeltas(),
    st.decimals(),
    st.uuids(),
    st.sampled_from([*models.Color, *models.Level, *models.Word]),
    st.sampled_from([*models.Access, models.Access(0), models.Access(3), models.Bits(3)]),
    st.floats(allow_nan=False).map(models.Celsius),
)


def can_be_hashed(value):
    """Everything but a signalling NaN, which refuses."""
    return not (isinstance(value, decimal.Decimal) and value.is_snan())


hashable = st.recursive(
    scalars.filter(can_be_hashed),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.frozensets(inner, max_size=3)
        | st.builds(models.Point, inner, inner)
    ),
    max_leaves=5,
)


def containers(inner):
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(any_text, inner, max_size=4),
        st.dictionaries(st.sampled_from(["~tuple", "~dict", "~obj"]), inner, max_size=1),
        st.dictionaries(hashable, inner, max_size=4),
        st.sets(hashable, max_size=4),
        st.frozensets(hashable, max_size=4),
        st.builds(models.Doc, inner, inner),
        st.builds(models.Point, inner, inner),
        st.dictionaries(any_text, inner, max_size=3).map(a_bag),
    )


def a_bag(attributes):
    bag = models.Bag()
    vars(bag).update(attributes)
    return bag


values = st.recursive(scalars, containers, max_leaves=15)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_any_value_comes_back_equal_and_of_the_same_types_throughout(value):
    assert same(models.there_and_back(value), value)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_the_text_is_strict_json_that_utf8_can_carry(value):
    constants = []
    json.loads(models.knowing.dumps(value).encode("utf-8"), parse_constant=constants.append)
    assert constants == []


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text().filter(lambda key: not key.startswith("~")), inner, max_size=4)
    ),
    max_leaves=15,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plain)
def test_a_client_with_stock_json_reads_plain_values_as_they_are(value):
    assert same(json.loads(models.knowing.dumps(value)), value)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plain)
def test_a_client_with_stock_json_writes_plain_values_as_it_does(value):
    assert same(models.knowing.loads(json.dumps(value)), value)


def test_the_comparison_used_here_tells_types_and_signs_apart():
    assert same([1, float("nan")], [1, float("nan")])
    for left, right in [
        (1, True), (1, 1.0), (0.0, -0.0), ((1,), [1]), ({1}, frozenset({1})),
        (models.Level.LOW, 1), ([(1,)], [[1]]), ({"a": 1}, {"a": True}), ({1: 2}, {1.0: 2}),
        (dt.time(1, fold=1), dt.time(1)), (models.Doc(1), models.Doc(True)),
    ]:  # fmt: skip
        assert not same(left, right), (left, right)
