"""The scalar values that JSON lacks: for each a marker, and functions to write and read a payload.

Every process uses this module. A payload is untrusted: each ``read`` checks its type first. The
caller turns any exception of ``read`` into a ``SerializationError`` that names the marker.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import functools
import math
import sys
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any, TypeVar

from gw_celery import errors

T = TypeVar("T")
Moment = TypeVar("Moment", dt.datetime, dt.time)

#: Python refuses to convert longer ints to and from decimal digits (by default above 4300 digits,
#: at the strictest above 640), but not to hexadecimal digits.
_DECIMAL_BITS = 2048

#: Maximum number of decimal digits, Python's own default for ints: the time in which Python
#: compares an int with a Decimal of the same hash grows with the square of their length.
_MOST_DIGITS = 4300
_MOST_BITS = 14_284

_MICROSECONDS_OF_A_MINUTE = 60_000_000
_MICROSECOND = dt.timedelta(microseconds=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Scalar:
    """A kind of value: its class, its marker, and the conversions to and from a payload."""

    cls: type
    marker: str
    write: Callable[[Any], object]
    read: Callable[[object], object]


def json_changes(value: object) -> bool:
    """Return whether JSON text would change or refuse this str, int or float."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, int) and value.bit_length() > _DECIMAL_BITS


def expect(cls: type[T], payload: object) -> T:
    """Return ``payload`` if its type is exactly ``cls``; else raise ``SerializationError``."""
    if type(payload) is cls:
        return payload
    raise errors.SerializationError(
        f"the payload is of type {type(payload).__name__} where {cls.__name__} is needed: "
        "the message was not written by gw-json"
    )


def _reader(kind: type[T], convert: Callable[[T], object]) -> Callable[[object], object]:
    return lambda payload: convert(expect(kind, payload))


def bounds_ints() -> bool:
    """Return whether Python itself refuses JSON ints of more than the maximum length."""
    return 0 < sys.get_int_max_str_digits() <= _MOST_DIGITS


def parse_int(digits: str) -> int:
    """Return an int of JSON text, where Python does not bound its length."""
    return int(_check_length(digits))


def _check_length(digits: str) -> str:
    if len(digits) > _MOST_DIGITS:
        raise errors.SerializationError(
            f"a number has {len(digits)} digits where {_MOST_DIGITS} are allowed: send it as text"
        )
    return digits


def _check_bits(value: int) -> int:
    if value.bit_length() > _MOST_BITS:
        raise errors.SerializationError(
            f"an int has {value.bit_length()} bits where {_MOST_BITS} are allowed: send it as bytes"
        )
    return value


def _write_int(value: int) -> str:
    return hex(_check_bits(value))


def _read_int(digits: str) -> int:
    return _check_bits(int(_check_length(digits), 16))


def _write_decimal(value: decimal.Decimal) -> str:
    return _check_length(str(value))


def _read_decimal(digits: str) -> decimal.Decimal:
    return decimal.Decimal(_check_length(digits))


def _to_base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _write_text(value: str) -> str:
    # UTF-8 instead of UTF-16, which would join two lone surrogates into one character.
    return _to_base64(value.encode("utf-8", "surrogatepass"))


def _read_text(text: str) -> str:
    return _from_base64(text).decode("utf-8", "surrogatepass")


def _microseconds(value: dt.timedelta) -> int:
    return value // _MICROSECOND


def _read_timedelta(payload: object) -> dt.timedelta:
    return dt.timedelta(microseconds=expect(int, payload))


def _write_moment(value: dt.datetime | dt.time) -> object:
    zone = _write_zone(value.tzinfo)
    # fromisoformat reads an offset of some microseconds as UTC: use ISO only for whole minutes.
    is_iso = zone is None or (
        isinstance(zone, list) and len(zone) == 1 and zone[0] % _MICROSECONDS_OF_A_MINUTE == 0
    )
    if value.fold == 0 and is_iso:
        return value.isoformat()
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, zone]


def _moment_reader(cls: type[Moment]) -> Callable[[object], Moment]:
    def read(payload: object) -> Moment:
        if isinstance(payload, str):
            return cls.fromisoformat(payload)
        text, fold, zone = expect(list, payload)
        moment = cls.fromisoformat(expect(str, text))
        return moment.replace(tzinfo=_read_zone(zone), fold=expect(int, fold))

    return read


def _write_zone(zone: dt.tzinfo | None) -> object:
    """Write a named zone as its key, and a fixed offset as ``[microseconds]`` with its name."""
    if type(zone) is zoneinfo.ZoneInfo and zone.key in _zone_keys():
        return zone.key
    if type(zone) is dt.timezone:
        # Only these arguments distinguish a given name from a derived one.
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        return [_microseconds(offset), *name]
    if zone is None:
        return None
    raise errors.SerializationError(
        f"gw-json cannot write the time zone {zone!r} of type {type(zone).__qualname__}: "
        "use one of zoneinfo.available_timezones(), or datetime.timezone(offset)"
    )


def _read_zone(payload: object) -> dt.tzinfo | None:
    if payload is None:
        return None
    if not isinstance(payload, str):
        offset, *name = expect(list, payload)
        return dt.timezone(_read_timedelta(offset), *(expect(str, part) for part in name))
    # ZoneInfo searches the tzdata package for an unknown key, and imports modules named by it.
    if payload not in _zone_keys():
        raise errors.SerializationError(
            f"the time zone {payload[:80]!r} is not known here: install the tzdata package"
        )
    return zoneinfo.ZoneInfo(payload)


@functools.cache
def _zone_keys() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


SCALARS = (
    Scalar(str, "~str", _write_text, _reader(str, _read_text)),
    Scalar(int, "~int", _write_int, _reader(str, _read_int)),
    Scalar(float, "~float", repr, _reader(str, float)),
    Scalar(bytes, "~bytes", _to_base64, _reader(str, _from_base64)),
    Scalar(dt.datetime, "~datetime", _write_moment, _moment_reader(dt.datetime)),
    Scalar(dt.date, "~date", dt.date.isoformat, _reader(str, dt.date.fromisoformat)),
    Scalar(dt.time, "~time", _write_moment, _moment_reader(dt.time)),
    Scalar(dt.timedelta, "~timedelta", _microseconds, _read_timedelta),
    Scalar(decimal.Decimal, "~decimal", _write_decimal, _reader(str, _read_decimal)),
    Scalar(uuid.UUID, "~uuid", str, _reader(str, uuid.UUID)),
)
