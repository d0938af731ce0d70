"""The arguments of a batched body, lists of what its callers gave, and the entries it answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from gw_celery import errors
from gw_celery.declare import services


def bind(method: services.Method, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return every parameter of the body with the value that one caller gave, or its default."""
    bound = method.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def listed(
    method: services.Method, inputs: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of one call for ``inputs``: each parameter is a list."""
    lists = {name: [one[name] for one in inputs] for name in method.signature.parameters}
    call = inspect.BoundArguments(method.signature, lists)
    return call.args, call.kwargs


def entries(method: services.Method, count: int, answer: Any) -> list[Any]:
    """Return the entries of a batched body's answer to ``count`` inputs.

    Raises:
        UsageError: when the answer is no list, tuple, array or tensor of ``count`` entries.
    """
    is_listed = not isinstance(answer, str | bytes | bytearray) and (
        isinstance(answer, Sequence) or hasattr(answer, "__array__")
    )
    size = _size(answer)
    if not is_listed or size != count:
        raise errors.UsageError(
            f"{method.task_name} got {count} input{'' if count == 1 else 's'} and answered with a "
            f"{type(answer).__name__} of {'no' if size is None else size} entries; a batched "
            f"function returns a list with one entry for each input"
        )
    return list(answer)


def _size(answer: Any) -> int | None:
    try:
        return len(answer)
    except TypeError:  # a number, a generator, an array without dimensions
        return None
