"""Stores a short error for an outcome that cannot be stored, so that its input does not run again.

The result backend of a child inherits from ``Outcomes``. During an outage, nothing is replaced: the
outcome itself can be stored later.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import states

from gw_celery import errors
from gw_celery.replica import tracer
from gw_celery.transport import refusals

logger = logging.getLogger(__name__)


class Outcomes:
    """The part of a result backend that stores a short error for one that is refused."""

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, **more: Any
    ) -> Any:
        """Store an outcome; if an error cannot be stored, store a short one that says so."""
        store: Any = super().store_result  # type: ignore[misc]
        try:
            return store(task_id, result, state, traceback=traceback, **more)
        except Exception as refused:
            if not _is_final(state, refused):
                raise  # the tracer fails the task
            short = tracer.not_stored(task_id, result, errors.text_of(refused))
        return store(task_id, short, state, traceback=None, **more)

    def mark_as_done(self, task_id: str, *args: Any, **options: Any) -> Any:
        super().mark_as_done(task_id, *args, **options)  # type: ignore[misc]
        if (input := _input_of(task_id)) is not None:
            input.is_answered = True

    def mark_as_failure(self, task_id: str, *args: Any, **options: Any) -> Any:
        """Store a failure and tell it, unless its input has its outcome: a hook raised after it."""
        input = _input_of(task_id)
        if input is not None and input.is_answered:
            return
        super().mark_as_failure(task_id, *args, **options)  # type: ignore[misc]
        if input is not None:
            input.is_answered = True

    def on_chord_part_return(self, request: Any, state: str, result: Any, **more: Any) -> Any:
        """Pass an outcome to its chord; log a chord that takes neither it nor a short error."""
        tell: Any = super().on_chord_part_return  # type: ignore[misc]
        try:
            return tell(request, state, result, **more)
        except Exception as refused:
            if not _is_final(state, refused):
                raise
            short = tracer.not_stored(request.id, result, errors.text_of(refused))
        try:
            return tell(request, state, short, **more)
        except Exception as refused:
            if refusals.is_outage(refused):
                raise
            _log_untold("chord", request, refused)

    def _call_task_errbacks(self, request: Any, exc: Any, traceback: Any) -> None:
        """Call each errback once; the tracer comes here again after any later exception."""
        call: Any = super()._call_task_errbacks  # type: ignore[misc]
        waiting = list(request.errbacks)
        try:
            while waiting:
                request.errbacks = waiting[:1]
                try:
                    call(request, exc, traceback)
                except Exception as refused:
                    if refusals.is_outage(refused):
                        raise
                    _log_untold("errback", request, refused)
                del waiting[0]
        finally:
            request.errbacks = waiting


def _is_final(state: str, refused: Exception) -> bool:
    """Return whether a refused outcome is an error that will never be stored."""
    if refusals.is_outage(refused) or isinstance(refused, errors.DeclaredLost):
        return False
    return state in states.EXCEPTION_STATES


def _input_of(task_id: str) -> tracer.Input | None:
    """Return the input of this tracer, unless ``task_id`` is that of another one, as in a chain."""
    input = tracer.current.get()
    return input if input is not None and input.task_id == task_id else None


def _log_untold(what: str, request: Any, refused: Exception) -> None:
    logger.error(
        "task %s[%s] has a broken %s, which is not called: %s",
        *(request.task, request.id, what, errors.text_of(refused)),
    )
