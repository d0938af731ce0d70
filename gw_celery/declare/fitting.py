"""Whether a plain JSON value is what an annotation says, elements of lists and dicts too."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal


class Misfit(Exception):
    """Raised for a value that is not of the annotated type."""


def fitted(value: Any, annotation: Any) -> Any:
    """Return ``value`` as the annotated type: an int becomes a float where one is declared.

    A bool is never taken for a number. What has no meaning for JSON fits every value.

    Raises:
        Misfit: for a value of another type.
    """
    if annotation is Any:
        return value
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _option(value, arguments)
    if origin is Literal:
        _require(any(value == argument and type(value) is type(argument) for argument in arguments))
        return value
    expected = dict if typing.is_typeddict(annotation) else origin or annotation
    if expected is None:
        expected = types.NoneType
    if expected is float and type(value) is int:
        return _float(value)
    if isinstance(expected, type):
        _require(_is_a(value, expected))
    return _elements(value, arguments)


def _option(value: Any, options: tuple[Any, ...]) -> Any:
    """Return ``value`` as the first option that leaves its type, else as the first that fits."""
    found = []
    for option in options:
        try:
            found.append(fitted(value, option))
        except Misfit:
            continue
    _require(bool(found))
    return next((fit for fit in found if type(fit) is type(value)), found[0])


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise Misfit from None


def _is_a(value: Any, expected: type) -> bool:
    if isinstance(value, bool):
        return expected in (bool, object)
    return isinstance(value, expected)


def _elements(value: Any, arguments: tuple[Any, ...]) -> Any:
    if isinstance(value, list) and len(arguments) == 1:
        return [fitted(entry, arguments[0]) for entry in value]
    if isinstance(value, dict) and len(arguments) == 2:
        keys, values = arguments
        return {fitted(key, keys): fitted(entry, values) for key, entry in value.items()}
    return value


def _require(is_fit: bool) -> None:
    if not is_fit:
        raise Misfit
