"""Decides whether a Redis cannot serve for now, so that its client waits instead of failing.

A lost connection, a time-out and the refusals below have one meaning for a worker: it keeps what it
has, takes nothing new, and tries again.
"""

from __future__ import annotations

import re

#: First words of error replies that end without any change in this process. ``BUSY`` is a script
#: that runs for too long; ``NOPERM`` is an access rule, which an operator sets.
CODES = (
    *("READONLY", "OOM", "MISCONF", "NOPERM", "LOADING", "BUSY", "CLUSTERDOWN", "TRYAGAIN"),
    *("MASTERDOWN", "NOREPLICAS"),
)
#: Redis 6 puts the code of an error inside a script after the place of the call; redis-py puts that
#: of an error in a pipeline after the command.
_IN_TEXT = re.compile(rf"^(?:{'|'.join(CODES)})\b|: -?(?:{'|'.join(CODES)})\b")

_WRONG_TYPE = re.compile(r"^WRONGTYPE\b|: -?WRONGTYPE\b")


def is_refusal(exc: BaseException) -> bool:
    """Return whether ``exc`` is the answer of a Redis that refuses a command for now."""
    from redis import exceptions as known

    # redis-py removes the code from the text where it has a class for it; redis-py 5 has fewer.
    classes = (
        *("BusyLoadingError", "ClusterDownError", "MasterDownError", "NoPermissionError"),
        *("OutOfMemoryError", "ReadOnlyError", "TryAgainError"),
    )
    if isinstance(exc, tuple(getattr(known, name) for name in classes if hasattr(known, name))):
        return True
    return isinstance(exc, known.ResponseError) and _IN_TEXT.search(str(exc)) is not None


def is_wrong_type(exc: BaseException) -> bool:
    """Return whether ``exc`` means that something else has written a key with another type."""
    from redis import exceptions as known

    return isinstance(exc, known.ResponseError) and _WRONG_TYPE.search(str(exc)) is not None


#: Exceptions of other servers, by the name that all database drivers, Django and kombu give them.
_OTHERS = frozenset({"OperationalError", "InterfaceError"})


def is_outage(exc: BaseException) -> bool:
    """Return whether ``exc`` means that a server is unreachable, silent, or refuses for now."""
    from redis import exceptions as known

    if isinstance(exc, known.AuthenticationError | known.AuthorizationError):
        return False
    if isinstance(exc, OSError | known.ConnectionError | known.TimeoutError) or is_refusal(exc):
        return True
    return any(kind.__name__ in _OTHERS for kind in type(exc).__mro__)
