"""The frames between parent and child: a length, then many records. Both processes use this module.

A child must trust its parent, which writes pickles. A child writes JSON of fixed shapes, and the
parent checks every record. Code that has taken over a child therefore gains nothing in the parent,
which holds the broker's credentials.
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

#: An ``Order`` (or the setup, in the first frame), then its content.
OrderFields = tuple[Any, ...]
#: A ``Report``, then its content, whose types were checked.
ReportFields = list[Any]

_LENGTH = struct.Struct("!I")
#: Maximum size of a child's frame: its texts are shortened, so that a larger frame is garbage.
MAX_CHILD_FRAME_BYTES = 32 * 1024 * 1024
MAX_PARENT_FRAME_BYTES = 2**32 - 1


class Order(enum.IntEnum):
    RUN = 1
    #: Raise a soft time limit in one input.
    SOFT = 2
    #: Stop one input; its answer is not wanted any more.
    STOP = 3
    #: Exit contexts and hooks, and end; sent when nothing is in flight.
    LEAVE = 4
    #: As ``RUN``, for an input that must not share a batch.
    RUN_ALONE = 5
    #: No new inputs will come: form batches from those that are here.
    DRAIN = 6
    #: Call one probe: (number of the call, service, method).
    PROBE = 7
    #: Benchmark one task: (number of the order, task name, seconds allowed, whether the child has
    #: been READY before).
    BENCHMARK = 8
    #: Drop one input if it has not begun; it is then reported as GONE.
    DROP = 9


class Report(enum.StrEnum):
    """The reports of a child to its parent: a name, and the types of the content."""

    shape: tuple[type, ...]

    def __new__(cls, name: str, *shape: type) -> Self:
        report = str.__new__(cls, name)
        report._value_, report.shape = name, shape
        return report

    #: The app is imported.
    LOADED = "loaded"
    #: Contexts and hooks are entered.
    ENTERED = "entered"
    #: The reason why the child cannot serve; it exits.
    FAILED = "failed", str
    #: Number of the call, whether it passed, detail, seconds.
    PROBED = "probed", int, bool, str, float
    #: Number of the order, score or failure as JSON.
    MEASURED = "measured", int, str
    #: Number of an input that starts (alone or in its batch), monotonic seconds.
    ACCEPT = "accept", int, float
    #: Number, text of the result, seconds.
    DONE = "done", int, str, float
    #: Number, outcome, class name, text, message, traceback, requeue.
    ERROR = "error", int, str, str, str, str, str, bool
    #: Name of a task with a call that continues although no input waits for it.
    STUCK = "stuck", str
    #: Number of an input that expired while it gathered; a report of its end follows.
    EXPIRED = "expired", int
    #: Number of an input, and what Celery needs of its body in the parent, as gw-json: callbacks,
    #: errbacks, chain and chord; also the arguments for ``retry_on_worker_lost``.
    LINKS = "links", int, str
    #: Number of an input that ended without an answer.
    GONE = "gone", int
    #: Lag in seconds, resident bytes.
    BEAT = "beat", float, int
    #: The reason why this process cannot run inputs any more.
    UNFIT = "unfit", str
    #: The reason why results cannot be stored; "" at the end of the outage.
    OUTAGE = "outage", str


_SHAPES = {report.value: report.shape for report in Report}


class Outcome(enum.StrEnum):
    FAILURE = "failure"
    RETRY = "retry"
    IGNORE = "ignore"
    REJECT = "reject"
    #: It could not be run, and nothing is stored.
    INTERNAL = "internal"
    #: The same, because its body is not a call.
    UNREADABLE = "unreadable"
    #: Its outcome could not be stored.
    UNSTORED = "unstored"
    #: Its outcome was refused, because this worker was declared lost.
    FENCED = "fenced"


class Garbage(errors.GWCeleryError):
    """Raised for bytes that no child of this version writes."""


def version() -> str:
    """Return the version of gw_celery in this process, for the first frame."""
    # Our modules do not import the package's root, which imports nearly all of them.
    return str(sys.modules["gw_celery"].__version__)


def pack_orders(orders: Sequence[OrderFields]) -> bytes:
    payload = pickle.dumps(orders, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


def unpack_orders(payload: bytes) -> list[OrderFields]:
    """Return the orders of one frame; for children only, because it unpickles."""
    orders: list[OrderFields] = pickle.loads(payload)  # noqa: S301 - written by the parent
    return orders


def pack_reports(reports: Iterable[Sequence[Any]]) -> bytes:
    payload = json.dumps(list(reports), separators=(",", ":")).encode()
    return _LENGTH.pack(len(payload)) + payload


def unpack_reports(payload: bytes) -> list[ReportFields]:
    """Return the reports of one frame, after checking their shapes.

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
    """Splits a stream of bytes into the payloads of its frames."""

    def __init__(self, largest: int) -> None:
        #: Why the stream cannot be split any further, if so.
        self.garbage: Garbage | None = None
        self._largest = largest
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that ``data`` completes, up to the first frame that is too large."""
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
