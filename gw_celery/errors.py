"""Every exception that gw_celery raises.

Two branches tell whose fault it is: ``DeclarationError`` and ``ConfigurationError`` are the
developer's, found before anything runs; the others happen while calls are made and served. Each
message states the fact, the value and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class GWCeleryError(Exception):
    """Root of every exception that gw_celery raises."""


class DeclarationError(GWCeleryError, ValueError):
    """Raised at decoration when a declared argument breaks its rule."""

    def __init__(self, argument: str, value: object, rule: str) -> None:
        super().__init__(argument, value, rule)
        self.argument = argument
        self.value = value
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.argument}={self.value!r}: {self.rule}"


class ConfigurationError(GWCeleryError):
    """Raised when the settings are unknown, of a wrong type, or contradict each other."""


class TraceError(GWCeleryError, ValueError):
    """Raised when a trace to simulate cannot be read."""


class UsageError(GWCeleryError, TypeError):
    """Raised when a declared object is called in a way that it does not support."""


class UnknownAttribute(UsageError, AttributeError):
    """Raised for an attribute that a declared object does not have, or that cannot be set."""


class BlockingCallError(GWCeleryError, RuntimeError):
    """Raised instead of blocking a running event loop."""


class StartupError(GWCeleryError):
    """Raised when contexts or ``on_enter`` hooks fail, with every cause."""

    def __init__(self, causes: dict[str, BaseException]) -> None:
        super().__init__(causes)
        self.causes = causes

    def __str__(self) -> str:
        listed = "; ".join(
            f"{name}: {type(cause).__name__}: {cause}" for name, cause in self.causes.items()
        )
        return f"{len(self.causes)} of the classes to load failed: {listed}"


class NotServedError(GWCeleryError):
    """Raised when a task reaches a process that has not loaded its service."""


class BodyExited(GWCeleryError):
    """Raised in place of what no task may raise, such as a ``SystemExit`` or ``StopIteration``."""


class UnreadableMessage(GWCeleryError, ValueError):
    """Raised in place of the answer of a message that no task can be called with."""


class MessageTooLarge(UnreadableMessage):
    """Raised in place of the answer of a message whose body is larger than workers take."""

    def __init__(self, size: int | str, largest: int) -> None:
        super().__init__(size, largest)
        self.size = size
        self.largest = largest

    def __str__(self) -> str:
        return (
            f"the body has {self.size} bytes and a worker takes {self.largest}: send large data by "
            f"reference, or raise the setting gw_max_payload_bytes"
        )


class PoisonedInput(GWCeleryError):
    """Raised in place of the answer of an input whose replica died each time that it ran alone."""


class QueueTimeExceeded(GWCeleryError):
    """Raised when an input waits in its queue for longer than ``max_queue_time``.

    By the caller before it is sent, or in place of its answer by a worker, which never starts it.

    Attributes:
        task: name of the task.
        queue: name of the queue.
        limit: seconds that it may wait.
        estimate: seconds that it would wait; from a worker, seconds that it has waited.
        was_sent: whether it has been in the queue.
    """

    def __init__(
        self, task: str, queue: str, limit: float, estimate: float, was_sent: bool = False
    ) -> None:
        super().__init__(task, queue, limit, estimate, was_sent)
        self.task = task
        self.queue = queue
        self.limit = limit
        self.estimate = estimate
        self.was_sent = was_sent

    def __str__(self) -> str:
        waits = "waited" if self.was_sent else "would wait for about"
        consequence = "was not started" if self.was_sent else "was not sent"
        return (
            f"{self.task} {waits} {self.estimate:.1f} s in the queue {self.queue!r}, which is over "
            f"max_queue_time={self.limit:g}, and {consequence}: call it later, add replicas, or "
            f"raise max_queue_time (setting gw_max_queue_time)"
        )


class WorkerStopped(GWCeleryError):
    """Raised in place of the answer of an acknowledged input that a shutdown cut off."""


class ContextLookupError(GWCeleryError, KeyError):
    """Raised by ``get_context`` for a class that is not entered in this process."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument: a sentence should read as one.
        return str(self.args[0]) if self.args else ""


class CallTimeout(GWCeleryError, TimeoutError):
    """Raised when a call was not answered within its ``timeout``."""


class RemoteTaskError(GWCeleryError):
    """Raised for an error of a task whose class is not known here.

    Attributes:
        type_name: the dotted name of the class that was raised remotely.
        message: what it said.
        traceback: the remote traceback as text, or ``""``.
    """

    def __init__(self, type_name: str, message: str, traceback: str = "") -> None:
        super().__init__(type_name, message, traceback)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


class RemoteTraceback(GWCeleryError):
    """Carries the remote traceback as the ``__cause__`` of a re-raised error."""

    def __init__(self, traceback: str) -> None:
        super().__init__(traceback)
        self.traceback = traceback

    def __str__(self) -> str:
        return f"\n\n(remote traceback)\n{self.traceback}"


class SerializationError(GWCeleryError, ValueError):
    """Raised when a value cannot be written to, or read from, gw-json."""


class ServerNotFound(GWCeleryError):
    """Raised when no Redis or Valkey server program can be found for the embedded server."""


class ServerFailed(GWCeleryError):
    """Raised when the embedded server ends, or does not answer in time."""


def near_miss(
    written: str, known: Collection[str], form: str = "{!r}", cutoff: float = 0.6
) -> str | None:
    """Return the question whether ``written`` should be one of ``known``; ``None`` if it is far.

    Args:
        written: a name that is not known.
        known: the names that are.
        form: how one of them is to be written, as a format string.
        cutoff: how alike they must be, from 0 to 1 for the same.
    """
    near = difflib.get_close_matches(written, known, n=1, cutoff=cutoff)
    return f"did you mean {form.format(near[0])}?" if near else None
