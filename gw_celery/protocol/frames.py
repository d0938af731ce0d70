"""What parent and child write to each other: length-prefixed frames of many records.

The parent writes pickles, for a child must trust its parent. A child writes JSON of a fixed shape,
checked record by record: code that took over a child gains nothing over the process that holds
the broker's credentials.
"""

from __future__ import annotations

import enum
import json
import math
import pickle
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Self

from gw_celery import errors

#: An ``Order``, or the first frame's setup, and what belongs to it.
OrderFields = tuple[Any, ...]
#: A ``Report`` and what belongs to it, checked against its shape when it is unpacked.
ReportFields = list[Any]

_LENGTH = struct.Struct("!I")
#: A child's frame holds texts that it has cut short; anything larger is garbage.
MAX_CHILD_FRAME_BYTES = 32 * 1024 * 1024
MAX_PARENT_FRAME_BYTES = 2**32 - 1


class Order(enum.IntEnum):
    """What a parent tells its child."""

    RUN = 1
    #: Raise a soft time limit in one input.
    SOFT = 2
    #: Stop one input; its answer is not wanted any more.
    STOP = 3
    #: Leave everything and exit; sent when nothing is in flight.
    LEAVE = 4
    #: As ``RUN``, for an input that shares no call with others.
    RUN_ALONE = 5
    #: Nothing new will come: what gathers for a batch waits no longer.
    DRAIN = 6
    #: Call one probe: (number of the call, service, method).
    PROBE = 7
    #: Measure one task: (number of the call, task name, seconds it has, whether the child has been
    #: READY before).
    BENCHMARK = 8


class Report(enum.StrEnum):
    """What a child tells its parent: its name, and the types of what belongs to it."""

    shape: tuple[type, ...]

    def __new__(cls, name: str, *shape: type) -> Self:
        report = str.__new__(cls, name)
        report._value_, report.shape = name, shape
        return report

    #: The app is imported.
    LOADED = "loaded"
    #: Contexts and hooks are entered.
    ENTERED = "entered"
    #: The reason: it cannot serve, and exits.
    FAILED = "failed", str
    #: Call, is it well, detail, seconds.
    PROBED = "probed", int, bool, str, float
    #: Call, score or failure as JSON.
    MEASURED = "measured", int, str
    #: Number, monotonic seconds: the input starts, or the batch that it waited for.
    ACCEPT = "accept", int, float
    #: Number, text of the result, seconds.
    DONE = "done", int, str, float
    #: Number, outcome, class name, text, message, traceback, requeue.
    ERROR = "error", int, str, str, str, str, str, bool
    #: Task name: a call of it goes on that no input waits for, and cannot be ended.
    STUCK = "stuck", str
    #: Number: it expired while it gathered with others; its end, without an answer, follows.
    EXPIRED = "expired", int
    #: Number: it is no longer here, and has no answer.
    GONE = "gone", int
    #: Lag in seconds, resident bytes.
    BEAT = "beat", float, int
    #: The reason: the result backend is away since now; "" when it answers again.
    OUTAGE = "outage", str


_SHAPES = {report.value: report.shape for report in Report}


class Outcome(enum.StrEnum):
    """How an input ended that has no result."""

    FAILURE = "failure"
    RETRY = "retry"
    IGNORE = "ignore"
    REJECT = "reject"
    #: It could not be run, and nothing is stored.
    INTERNAL = "internal"
    #: Its outcome could not be stored.
    UNSTORED = "unstored"
    #: The body asked to end the process.
    EXIT = "exit"


class Garbage(errors.GWCeleryError):
    """Raised for bytes that no child of this version writes."""


def version() -> str:
    """Return the version of gw_celery that this process has imported; the first frame has it."""
    # Nothing inside imports the package's root, which imports nearly all of it.
    return str(sys.modules["gw_celery"].__version__)


def pack_orders(orders: Sequence[OrderFields]) -> bytes:
    """Return one frame of ``orders``, each an ``Order`` and what belongs to it."""
    payload = pickle.dumps(orders, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


def unpack_orders(payload: bytes) -> list[OrderFields]:
    """Return the orders of one frame; for children only."""
    orders: list[OrderFields] = pickle.loads(payload)  # noqa: S301 - written by the parent
    return orders


def cut(text: str, longest: int) -> str:
    """Return ``text``, or its beginning: a report is small."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def pack_reports(reports: Iterable[Sequence[Any]]) -> bytes:
    """Return one frame of ``reports``, each a ``Report`` and what belongs to it."""
    payload = json.dumps(list(reports), separators=(",", ":")).encode()
    return _LENGTH.pack(len(payload)) + payload


def unpack_reports(payload: bytes) -> list[ReportFields]:
    """Return the checked reports of one frame.

    Raises:
        Garbage: for anything that ``pack_reports`` does not write.
    """
    try:
        reports = json.loads(payload)
    except (ValueError, RecursionError) as exc:
        raise Garbage(f"a frame of {len(payload)} bytes is not JSON: {exc}") from None
    if not isinstance(reports, list):
        raise Garbage(f"a frame holds a {type(reports).__name__} instead of a list")
    for report in reports:
        if not isinstance(report, list) or not report or not isinstance(report[0], str):
            raise Garbage(f"not a report: {report!r:.100}")
        shape = _SHAPES.get(report[0])
        if shape is None or len(shape) != len(report) - 1:
            raise Garbage(f"not a known report: {report!r:.100}")
        for value, expected in zip(report[1:], shape, strict=True):
            is_odd = expected is float and isinstance(value, float) and not math.isfinite(value)
            if type(value) is not expected or is_odd:
                raise Garbage(
                    f"a {report[0]} report holds {value!r:.100}, not a {expected.__name__}"
                )
    return reports


class Unpacker:
    """Cuts a stream of bytes into the payloads of its frames."""

    def __init__(self, largest: int) -> None:
        #: Why the stream cannot be cut any further, once that is so.
        self.garbage: Garbage | None = None
        self._largest = largest
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that ``data`` completes, up to a length over the largest one."""
        self._buffer += data
        payloads = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > self._largest:
                self.garbage = Garbage(
                    f"a frame announces {length} bytes; at most {self._largest} are sent"
                )
                break
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return payloads
