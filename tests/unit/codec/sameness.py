"""A comparison that ``==`` is too lax for: types at every level, signs of zero, folds, zones."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import math
from collections.abc import Sequence

from tests.unit.codec import models


def same(left: object, right: object) -> bool:
    """Tell whether two values are of the same types throughout, and equal in all that they hold."""
    return type(left) is type(right) and _same_content(left, right)


def _same_content(left, right):
    match left:
        case models.Celsius():
            return left == right
        case float():
            return (math.isnan(left) and math.isnan(right)) or left.hex() == right.hex()
        case decimal.Decimal():
            return left.as_tuple() == right.as_tuple()
        case dt.datetime() | dt.time():
            return _same_moment(left, right)
        case list() | tuple():
            return _same_items(left, right)
        case dict():
            return _same_items(list(left.items()), list(right.items()))
        case set() | frozenset():
            return len(left) == len(right) and all(any(same(a, b) for b in right) for a in left)
        case models.Doc():
            return same(dataclasses.astuple(left), dataclasses.astuple(right))
        case models.Point():
            return same([left.x, left.y, left.norm], [right.x, right.y, right.norm])
        case models.Bag():
            return same(vars(left), vars(right))
    return left == right


def _same_items(left: Sequence[object], right: Sequence[object]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def _same_moment(left, right):
    naive = left.replace(tzinfo=None) == right.replace(tzinfo=None) and left.fold == right.fold
    return (
        naive
        and type(left.tzinfo) is type(right.tzinfo)
        and repr(left.tzinfo) == repr(right.tzinfo)
    )
