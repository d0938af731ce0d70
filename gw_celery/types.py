"""Aliases and protocols that several floors share."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: A user's function: a task body, a hook, a calculator.
AnyFunction = Callable[..., Any]
#: The body of an asynchronous task.
AsyncFunction = Callable[..., Coroutine[Any, Any, Any]]
#: The parameter values of one call of a class task, by name.
ParameterValues = Mapping[str, Any]


class Answer(Protocol[T_co]):
    """A call under way: wait for it with ``get`` or ``await``, give up with ``cancel``."""

    @property
    def id(self) -> str: ...

    def get(self, timeout: float | None = None) -> T_co: ...

    def cancel(self) -> None: ...
