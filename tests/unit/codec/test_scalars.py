from __future__ import annotations

import datetime as dt
import decimal
import json
import re
import sys
import zoneinfo

import pytest

from gw_celery import errors
from tests.unit.codec import models
from tests.unit.codec.sameness import same

UTC = dt.UTC
PARIS = zoneinfo.ZoneInfo("Europe/Paris")


class Moon(dt.tzinfo):
    def utcoffset(self, when):
        return dt.timedelta(hours=1)

    def __repr__(self):
        return "Moon()"


def written(value):
    return json.loads(models.knowing.dumps(value))


@pytest.mark.parametrize(
    ("value", "document"),
    [
        (b"\x00\xff", {"~bytes": "AP8="}),
        (float("-inf"), {"~float": "-inf"}),
        (dt.date(2024, 2, 29), {"~date": "2024-02-29"}),
        (dt.timedelta(milliseconds=-1), {"~timedelta": -1000}),
        (dt.datetime(2024, 1, 2, 3, tzinfo=UTC), {"~datetime": "2024-01-02T03:00:00+00:00"}),
        (
            dt.datetime(2024, 1, 2, tzinfo=PARIS),
            {"~datetime": ["2024-01-02T00:00:00", 0, "Europe/Paris"]},
        ),
        (
            dt.time(1, 2, tzinfo=dt.timezone(dt.timedelta(hours=1), "CET")),
            {"~time": ["01:02:00", 0, [3600_000_000, "CET"]]},
        ),
    ],
)
def test_the_document_of_a_value_is_this_one(value, document):
    assert written(value) == document


@pytest.mark.parametrize(
    "value",
    [
        0.1, -0.0, 5e-324, float("inf"), 2**53 + 1, 10**4000, -(10**4299), True, 1,
        "\ud800", "\ud83d\ude00", "😀", "\x00\x7f\u2028", "",
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_numbers_and_strings_at_the_edge_come_back_exactly(value):
    assert same(models.there_and_back(value), value)
    assert same(models.there_and_back([value, {"k": value}]), [value, {"k": value}])


LONG = "9" * 4301
LONG_NUMBERS = [10**4300, -(1 << 14_400), decimal.Decimal(LONG), decimal.Decimal(f"-{LONG}E-9")]


@pytest.fixture(params=[0, 640, 4300, 100_000])
def _digits_of_python(request):
    """What the user lets Python convert: any length, or at most so many digits."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(request.param)
    yield
    sys.set_int_max_str_digits(before)


@pytest.mark.usefixtures("_digits_of_python")
@pytest.mark.parametrize(
    "place", [lambda n: n, lambda n: [{"k": n}], lambda n: {n}, lambda n: {n: 1}]
)
@pytest.mark.parametrize("number", range(len(LONG_NUMBERS)))
def test_a_number_of_more_digits_than_allowed_is_not_written(number, place):
    with pytest.raises(errors.SerializationError, match=r"where (4300|14284) are allowed"):
        models.knowing.dumps(place(LONG_NUMBERS[number]))


@pytest.mark.usefixtures("_digits_of_python")
@pytest.mark.parametrize(
    "text",
    [
        LONG, f"[-{LONG}]", f'{{"~dict":[[{LONG},1]]}}', f'{{"~int":"0x{LONG}"}}',
        f'{{"~int":"0x{"f" * 3572}"}}', f'{{"~decimal":"{LONG}"}}', f'{{"~decimal":"-0.{LONG}E9"}}',
        f'{{"~set":[{{"~decimal":"1"}},{{"~int":"0x{"0" * 5000}1"}}]}}', f'{{"~timedelta":{LONG}}}',
        f'{{"~obj":["tests.unit.codec.models.Bits@1",{LONG}]}}',
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_number_of_more_digits_than_allowed_is_not_read(text):
    with pytest.raises(errors.SerializationError):
        models.knowing.loads(text)


def test_a_named_zone_comes_back_as_the_zone_and_not_as_its_offset():
    first, second = (dt.datetime(2024, 10, 27, 2, 30, fold=fold, tzinfo=PARIS) for fold in (0, 1))
    back = models.there_and_back([first, second])
    assert [moment.tzinfo for moment in back] == [PARIS, PARIS]
    assert [moment.utcoffset() for moment in back] == [first.utcoffset(), second.utcoffset()]


def test_a_zone_of_another_kind_is_refused_with_the_kinds_that_work():
    moment = dt.datetime(2024, 1, 1, tzinfo=Moon())
    with pytest.raises(errors.SerializationError, match=r"zone Moon\(\).*zoneinfo\."):
        models.knowing.dumps(moment)


@pytest.mark.parametrize("key", ["Mars/Olympus", "../../etc/passwd", "/etc/passwd", "os", ""])
def test_a_zone_that_is_not_in_the_database_is_not_looked_for(key, monkeypatch):
    monkeypatch.setattr(zoneinfo, "ZoneInfo", lambda key: pytest.fail(f"looked for {key}"))
    document = {"~datetime": ["2024-01-02T00:00:00", 0, key]}
    with pytest.raises(errors.SerializationError, match=re.escape(repr(key))):
        models.knowing.loads(json.dumps(document))


@pytest.mark.parametrize(
    "document",
    [
        {"~bytes": "a"}, {"~bytes": "*AP8="}, {"~bytes": 1}, {"~bytes": ["AP8="]},
        {"~int": "ten"}, {"~int": 10}, {"~float": None}, {"~float": "x"}, {"~str": "~"},
        {"~str": "/w=="}, {"~date": "2024-13-01"}, {"~date": 0}, {"~uuid": "1"},
        {"~uuid": {"hex": "0"}}, {"~decimal": "one"}, {"~decimal": 1.5}, {"~timedelta": "1"},
        {"~timedelta": 10**30}, {"~timedelta": True}, {"~datetime": "yesterday"},
        {"~datetime": None}, {"~datetime": []}, {"~datetime": ["2024-01-02T00:00:00", 2, None]},
        {"~datetime": ["2024-01-02T00:00:00", False, None]}, {"~time": ["01:00:00", 0, [10**12]]},
        {"~time": ["01:00:00", 0, [1, 2]]}, {"~time": ["01:00:00", 0, {}]},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_a_payload_that_does_not_fit_its_marker_is_refused(document):
    with pytest.raises(errors.SerializationError, match="not written by gw-json"):
        models.knowing.loads(json.dumps(document))
