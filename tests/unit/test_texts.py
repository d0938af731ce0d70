"""Texts of errors and messages are cut, and cannot forge lines of a log or control a terminal."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gw_celery import errors
from gw_celery.runtime import log_records

LONG = "x" * 3_000_000
FORGED = "\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] forged"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class Panic(BaseException):
    """As libraries in Rust raise it."""


def raising(exc: BaseException) -> object:
    """A value that has no text."""

    def refuse(self: object) -> str:
        raise exc

    return type("Odd", (), {"__str__": refuse, "__repr__": refuse})()


@pytest.mark.parametrize("describe", [errors.text_of, errors.repr_of])
@pytest.mark.parametrize("exc", [ValueError(), SystemExit(3), KeyboardInterrupt(), Panic()])
def test_a_value_whose_text_raises_has_another_one(
    describe: Callable[[object], str], exc: BaseException
) -> None:
    assert "Odd object at" in describe(raising(exc))


@pytest.mark.parametrize("describe", [errors.text_of, errors.repr_of, errors.titled])
@pytest.mark.parametrize("value", [ValueError(LONG), KeyError([LONG]), UnicodeError(LONG.encode())])
def test_a_text_is_cut(describe: Callable[[Any], str], value: BaseException) -> None:
    assert len(describe(value)) == errors.LONGEST_TEXT
    assert "xxx" in describe(value)


def test_a_huge_number_has_a_text() -> None:
    """Python refuses to write it."""
    assert len(errors.text_of(10**5000)) < 100


@pytest.mark.parametrize("arguments", [[LONG], [[LONG], {"a": LONG}], ["y" * 900] * 10_000])
def test_the_arguments_of_an_error_are_cut(arguments: list[Any]) -> None:
    kept = errors.cut_arguments(arguments)
    assert len(kept) == min(len(arguments), 100)
    assert max(len(str(value)) for value in kept) <= errors.LONGEST_TEXT


def test_short_arguments_keep_their_types() -> None:
    assert errors.cut_arguments([1, None, ["a"], "b"]) == [1, None, ["a"], "b"]


@pytest.mark.parametrize("traceback", [LONG, "line\n" * 1_000_000])
def test_a_traceback_is_cut(traceback: str) -> None:
    cut = errors.cut_traceback(traceback)
    assert len(cut) <= errors.LONGEST_TRACEBACK
    assert max(map(len, cut.splitlines())) <= errors.LONGEST_TEXT


@pytest.mark.parametrize("odd", [FORGED, "\x1b[2J", "a\x00b", "\u2028", "\x9b31m", "\ud800"])
def test_a_shown_text_is_one_printable_line(odd: str) -> None:
    assert errors.printable(odd).isprintable()
    assert errors.printable("é 日本") == "é 日本"


@pytest.fixture
def log() -> Iterator[Callable[[], str]]:
    """Return what handlers write of a logger's records, with the records bounded."""
    stream, made = io.StringIO(), logging.getLogRecordFactory()
    handler = logging.StreamHandler(stream)
    log_records.install()
    log_records.install()  # once more changes nothing
    root = logging.getLogger()
    root.addHandler(handler)
    yield stream.getvalue
    root.removeHandler(handler)
    logging.setLogRecordFactory(made)


@pytest.mark.parametrize("odd", [FORGED, "\x1b[2J", "a\x00b", "\u2028", LONG])
@pytest.mark.parametrize("logger", ["celery.worker.strategy", "kombu", "gw_celery.replica.tracer"])
@pytest.mark.parametrize(
    "write",
    [
        lambda logger, odd: logger.error("task %s is odd", odd),
        lambda logger, odd: logger.error("task %(id)s is odd", {"id": odd}),
        lambda logger, odd: logger.error("task %r is odd", ValueError(odd)),
        lambda logger, odd: logger.error("".join(("task ", odd, " is odd"))),
        lambda logger, odd: logger.error("odd", exc_info=ValueError(odd)),
    ],
    ids=["argument", "mapping", "object", "message", "traceback"],
)
def test_no_record_of_a_library_is_forged_or_long(
    log: Callable[[], str], write: Callable[[logging.Logger, str], None], logger: str, odd: str
) -> None:
    write(logging.getLogger(logger), odd)
    assert "odd" in log() or odd is LONG
    assert not CONTROL.search(log())
    assert not re.search(r"^\[2026", log(), re.MULTILINE)
    assert 0 < len(log()) < 2 * errors.LONGEST_TEXT


@pytest.mark.parametrize("logger", ["project.models", "celery.redirected"])
def test_records_of_the_project_stay_as_they_are(log: Callable[[], str], logger: str) -> None:
    logging.getLogger(logger).error("a\tb\n%s", "c\x1b" + "d" * 2000)
    assert log() == "a\tb\nc\x1b" + "d" * 2000 + "\n"
