"""Log records of workers, in which foreign values can neither forge lines nor fill the disk.

Ids, names, headers and error texts come from whoever sends a message. The records of a worker's
libraries show them escaped and cut; those of the project's own loggers stay as they are.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from gw_celery import errors

_LIBRARIES = {"amqp", "billiard", "celery", "gw_celery", "kombu", "redis"}
#: What bodies print.
_REDIRECTED = "celery.redirected"
_INDENT = "    "


def install() -> None:
    """Bound the records of this process, for all handlers, also those of the project."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Factory):
        logging.setLogRecordFactory(_Factory(make))


class _Factory:
    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(name, *args, **kwargs)
        if name.partition(".")[0] in _LIBRARIES and name != _REDIRECTED:
            _bound(record)
        return record


class _Shown:
    """A value as a record shows it, formatted only when a handler asks."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return errors.printable(errors.text_of(self._value))

    def __repr__(self) -> str:
        return errors.printable(errors.repr_of(self._value))


def _bound(record: logging.LogRecord) -> None:
    if isinstance(record.args, Mapping):
        record.args = {name: _shown(value) for name, value in record.args.items()}
    elif record.args:
        record.args = tuple(map(_shown, record.args))
    else:
        record.msg = _indented(str(record.msg))
    if record.exc_info and record.exc_info[0] is not None:
        try:
            pieces = traceback.format_exception(*record.exc_info)
        except Exception:  # the formatter of the handler has its own way
            return
        record.exc_text = "".join(map(_indented, pieces)).rstrip("\n")


def _shown(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, str) and value.isprintable() and len(value) <= errors.LONGEST_TEXT:
        return value
    return _Shown(value)


def _indented(text: str) -> str:
    """Cut a text, and indent its further lines, so that none looks like a record."""
    body = text.strip("\n")
    head, _, tail = text.partition(body)
    lines = errors.cut(body).split("\n")
    shown = [errors.printable(line) for line in lines]
    further = [line if line[:1] in ("", " ") else _INDENT + line for line in shown[1:]]
    return head + "\n".join([*shown[:1], *further]) + tail
