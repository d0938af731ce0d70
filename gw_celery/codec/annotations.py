"""Registers the classes that a function names in its annotations."""

from __future__ import annotations

import contextlib
import enum
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from gw_celery import errors
from gw_celery.codec import types

#: Classes of these packages hold more than their attributes say: connections, device memory, rules.
_FOREIGN = frozenset({"celery", "django", "gw_celery", "kombu", "numpy", "pydantic", "torch"})


def register_annotations(
    function: Callable[..., object], into: types.TypeRegistry = types.registry
) -> None:
    """Register the dataclasses, Enums and plain classes that ``function`` is annotated with.

    Looks inside generics (``list[Doc]``, ``Doc | None``, ``Annotated[Doc, ...]``) and into the
    annotated fields of the classes that it finds. An annotation that cannot be resolved, a class
    of the standard library or of a framework, and a class that needs ``encode`` and ``decode`` are
    left out silently: a call that sends one says so.
    """
    plain = inspect.unwrap(function)
    scope = getattr(plain, "__globals__", {})
    seen: set[type] = set()
    for cls in _classes(getattr(plain, "__annotations__", {}), scope):
        _register(cls, into, seen)


def _register(cls: type, into: types.TypeRegistry, seen: set[type]) -> None:
    if cls in seen or not _is_for_data(cls):
        return
    seen.add(cls)
    # A class that is known already keeps the name that it was given.
    if into.written_as(cls) is None:
        with contextlib.suppress(errors.DeclarationError):
            into.register(cls)
    for base in cls.__mro__:
        scope = getattr(sys.modules.get(base.__module__), "__dict__", {})
        for inner in _classes(vars(base).get("__annotations__", {}), scope):
            _register(inner, into, seen)


def _is_for_data(cls: type) -> bool:
    if issubclass(cls, enum.Enum):
        return True
    if cls.__module__.partition(".")[0] in sys.stdlib_module_names:
        return False
    return _FOREIGN.isdisjoint(base.__module__.partition(".")[0] for base in cls.__mro__)


def _classes(annotations: Mapping[str, object], scope: dict[str, Any]) -> Iterator[type]:
    for name, annotation in annotations.items():
        # One at a time: a name that only a type checker sees must not hide the others.
        holder: Any = SimpleNamespace(__annotations__={name: annotation})
        try:
            hint = typing.get_type_hints(holder, globalns=scope)[name]
        except Exception:  # an annotation is any expression, and may raise anything
            continue
        yield from _inside(hint)


def _inside(hint: object) -> Iterator[type]:
    origin = typing.get_origin(hint)
    if isinstance(origin or hint, type):
        yield typing.cast("type", origin or hint)
    for argument in typing.get_args(hint):
        yield from _inside(argument)
