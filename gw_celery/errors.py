"""Every exception that gw_celery raises, in any process.

The developer causes a ``DeclarationError`` or a ``ConfigurationError``, which appear before
anything runs. The others occur while calls are made and served. Each message states the fact, the
value and the remedy. Functions at the end bound what is stored, logged, sent and shown of an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from celery.exceptions import Reject

#: Maximum characters of the text of an error, wherever it is stored, logged or sent.
LONGEST_TEXT = 1000
#: Maximum characters of a traceback; each of its lines is a text.
LONGEST_TRACEBACK = 64 * 1024
_MOST_ARGUMENTS = 100
#: Maximum characters of each part of an ``OutcomeNotStored``.
_LONGEST_PART = 400


class GWCeleryError(Exception):
    """The base class of every exception that gw_celery raises."""


class DeclarationError(GWCeleryError, ValueError):
    """Raised at decoration if an argument breaks its rule.

    Attributes:
        argument: name of the argument.
        value: the value that was given.
        rule: the rule that the value breaks.
    """

    def __init__(self, argument: str, value: object, rule: str) -> None:
        super().__init__(argument, value, rule)
        self.argument = argument
        self.value = value
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.argument}={self.value!r}: {self.rule}"


class ConfigurationError(GWCeleryError):
    """Raised if a setting is unknown, has an invalid value, or contradicts another one."""


class TraceError(GWCeleryError, ValueError):
    """Raised if a trace for the simulator cannot be read."""


class UsageError(GWCeleryError, TypeError):
    """Raised if a declared object is used in a way that it does not support."""


class UnknownAttribute(UsageError, AttributeError):
    """Raised for an attribute that a declared object does not have, or that cannot be set."""


class BlockingCallError(GWCeleryError, RuntimeError):
    """Raised instead of blocking a running event loop, or a task."""


class StartupError(GWCeleryError):
    """Raised if contexts or ``on_enter`` hooks fail.

    Attributes:
        causes: the exception of each class that failed, by the name of the class.
    """

    def __init__(self, causes: dict[str, BaseException]) -> None:
        super().__init__(causes)
        self.causes = causes

    def __str__(self) -> str:
        listed = "; ".join(
            f"{name}: {type(cause).__name__}: {cause}" for name, cause in self.causes.items()
        )
        return f"{len(self.causes)} of the classes to load failed: {listed}"


class NotServedError(GWCeleryError):
    """Raised if a task reaches a process that has not loaded its service."""


class BodyExited(GWCeleryError):
    """Raised in place of what no task may raise, such as a ``SystemExit`` or ``StopIteration``."""


class UnreadableMessage(GWCeleryError, ValueError):
    """Stored as the answer to a message whose content cannot become a call of a task."""


class MessageTooLarge(UnreadableMessage):
    """Stored as the answer to a message whose body exceeds ``gw_max_payload_bytes``."""

    def __init__(self, size: int | str, largest: int) -> None:
        super().__init__(size, largest)
        self.size = size
        self.largest = largest

    def __str__(self) -> str:
        return (
            f"the body has {self.size} bytes and a worker takes {self.largest}: send large data by "
            f"reference, or raise the setting gw_max_payload_bytes"
        )


class OutcomeNotStored(GWCeleryError):
    """Stored in place of an outcome that cannot be stored.

    Attributes:
        type_name: name of the class of the exception that was to be stored.
        reason: why it was refused.
        text: the beginning of its message.
    """

    def __init__(self, type_name: str, reason: str, text: str) -> None:
        type_name, reason, text = (cut(part, _LONGEST_PART) for part in (type_name, reason, text))
        super().__init__(type_name, reason, text)
        self.type_name = type_name
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        return (
            f"the task ended with {self.type_name}, which could not be stored ({self.reason}); its "
            f"message begins with: {self.text}"
        )


class PoisonedInput(GWCeleryError):
    """Stored as the answer to an input whose child died each time the input ran alone."""


class QueueTimeExceeded(GWCeleryError):
    """Raised if an input waits in its queue for longer than ``max_queue_time``.

    The caller raises it before sending, or a worker stores it as the answer of an input that it
    does not start.

    Attributes:
        task: name of the task.
        queue: name of the queue.
        limit: seconds that the input may wait.
        estimate: seconds that it would wait; from a worker, the seconds that it has waited.
        was_sent: whether the input has been in the queue.
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
    """Stored as the answer to an early acknowledged input that a shutdown interrupted."""


class DeclaredLost(GWCeleryError, Reject):
    """Raised if an outcome is refused because its worker was declared lost.

    Another worker runs the input. As a ``Reject``, it leaves Celery's tracer without errbacks.
    """

    def __init__(self, task_id: object, hold: str | None) -> None:
        super().__init__(
            f"this worker was declared lost while it had the message of input {task_id} (hold "
            f"{hold}), and another worker runs it"
        )


class ResultsUnavailable(GWCeleryError):
    """Raised in a worker while its result backend is away, or refuses to store."""


class ContextLookupError(GWCeleryError, KeyError):
    """Raised by ``get_context`` if the class is not entered in this process."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message.
        return str(self.args[0]) if self.args else ""


class CallTimeout(GWCeleryError, TimeoutError):
    """Raised if a call is not sent or answered within its ``timeout``."""


class RemoteTaskError(GWCeleryError):
    """Raised for an error of a task whose class is not known in this process.

    Attributes:
        type_name: dotted name of the class of the remote exception.
        message: its message.
        traceback: the remote traceback as text; may be empty.
    """

    def __init__(self, type_name: str, message: str, traceback: str = "") -> None:
        super().__init__(type_name, message, traceback)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


class RemoteTraceback(GWCeleryError):
    """The ``__cause__`` of a re-raised error; it carries the remote traceback as text."""

    def __init__(self, traceback: str) -> None:
        super().__init__(traceback)
        self.traceback = traceback

    def __str__(self) -> str:
        return f"\n\n(remote traceback)\n{self.traceback}"


class SerializationError(GWCeleryError, ValueError):
    """Raised if gw-json cannot write or read a value."""


class ServerNotFound(GWCeleryError):
    """Raised if no Redis or Valkey program is found for the embedded server."""


class ServerFailed(GWCeleryError):
    """Raised if the embedded server ends, or does not answer in time."""


def near_miss(
    written: str, known: Collection[str], form: str = "{!r}", cutoff: float = 0.6
) -> str | None:
    """Return the question "did you mean ...?"; ``None`` if no known name resembles ``written``.

    Args:
        written: an unknown name.
        known: the known names.
        form: format string for the suggested name.
        cutoff: required similarity, from 0 to 1 (equal).
    """
    near = difflib.get_close_matches(written, known, n=1, cutoff=cutoff)
    return f"did you mean {form.format(near[0])}?" if near else None


def cut(text: str, longest: int = LONGEST_TEXT) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def text_of(value: object) -> str:
    """Return the text of a value, often an error, cut; also if its ``__str__`` raises."""
    return cut(_described(str, value))


def repr_of(value: object) -> str:
    return cut(_described(repr, value))


def _described(describe: Callable[[object], str], value: object) -> str:
    try:
        return describe(value)
    except BaseException:  # such as the panic of a library in Rust
        return object.__repr__(value)


def titled(exc: BaseException) -> str:
    """Return the class name and the text of an error, cut."""
    return cut(f"{type(exc).__name__}: {text_of(exc)}".rstrip(": "))


def cut_arguments(arguments: Sequence[Any]) -> list[Any]:
    """Return the arguments of an exception, each cut; an object that is too long becomes text."""
    kept = arguments[:_MOST_ARGUMENTS]
    texts = [value if isinstance(value, str) else _described(repr, value) for value in kept]
    pairs = zip(kept, texts, strict=True)
    return [value if len(text) <= LONGEST_TEXT else cut(text) for value, text in pairs]


def cut_traceback(text: str) -> str:
    """Cut a traceback, and each line of it."""
    lines = "\n".join(map(cut, text[: 2 * LONGEST_TRACEBACK].splitlines()))
    return cut(lines, LONGEST_TRACEBACK)


def printable(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return one line for a terminal or a log: cut, with control characters escaped.

    Otherwise a text of somebody else could forge lines, or control the terminal.
    """
    shown = cut(text, longest)
    if shown.isprintable():
        return shown
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )
