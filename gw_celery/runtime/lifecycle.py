"""Enters contexts and ``on_enter`` hooks in parallel, and exits them, in processes that serve.

Each unit lives in one asyncio task from entering to exit, because libraries built on anyio require
that a cancel scope is exited in the task that entered it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from gw_celery import errors

logger = logging.getLogger(__name__)

EX_FAILURE = 1


class Entered:
    """A unit that is entering, entered or exited; ``value`` is the result of entering."""

    def __init__(
        self, name: str, manager: AbstractAsyncContextManager[Any], exit_timeout: float
    ) -> None:
        self.name = name
        self._manager = manager
        self.value: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._leave = asyncio.Event()
        self._exit_timeout = exit_timeout
        #: Enters and exits the unit.
        self.task = asyncio.create_task(self._live(), name=f"gw-{name}")

    @property
    def failure(self) -> BaseException | None:
        return self.value.exception() if self.value.done() else None

    def abandon(self) -> None:
        """Cancel the entering; an entered unit stays entered."""
        if not self.value.done():
            self.task.cancel()

    async def leave(self) -> None:
        """Exit an entered unit; errors and time-outs are logged, never raised."""
        self._leave.set()
        _, late = await asyncio.wait([self.task], timeout=self._exit_timeout)
        if late:
            # Not awaited, because a unit that ignores the cancellation must not delay the others.
            self.task.cancel()
            logger.error(
                "pid %d: %s did not leave within %.0f s and was left behind (setting "
                "gw_exit_timeout)",
                *(os.getpid(), self.name, self._exit_timeout),
            )

    async def _live(self) -> None:
        try:
            self.value.set_result(await self._manager.__aenter__())
        except BaseException as exc:
            is_cancelled = isinstance(exc, asyncio.CancelledError)
            cause = asyncio.CancelledError("cancelled while entering") if is_cancelled else exc
            self.value.set_exception(cause)
            self.value.exception()  # retrieve it: `failure` reports it
            return
        await self._leave.wait()
        try:
            await self._manager.__aexit__(None, None, None)
        except Exception:
            logger.exception("pid %d: %s failed to leave", os.getpid(), self.name)


async def settle_all(lives: Sequence[Entered], timeout: float) -> None:
    """Wait until all of ``lives`` have entered.

    If one fails, or the wait is cancelled, the others are cancelled and entered units are exited.

    Args:
        lives: the units.
        timeout: seconds that they may take.

    Raises:
        StartupError: with the cause of each unit that failed or was late.
    """
    if not lives:
        return
    values = [life.value for life in lives]
    try:
        await asyncio.wait(values, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError:
        await leave_all(lives)
        raise
    causes = {life.name: cause for life in lives if (cause := life.failure) is not None}
    late = [life.name for life in lives if not life.value.done()]
    if not causes and late:
        why = f"did not enter within {timeout:.0f} s (setting gw_start_timeout)"
        causes = {name: TimeoutError(why) for name in late}
    if causes:
        await leave_all(lives)
        raise errors.StartupError(causes)


async def leave_all(lives: Sequence[Entered]) -> None:
    """Exit all of ``lives`` in parallel; those still entering are cancelled first."""
    for life in lives:
        life.abandon()
    await asyncio.gather(*(life.leave() for life in lives))


@contextlib.contextmanager
def fatal_errors(report: Callable[[str], None] = lambda reason: None) -> Iterator[None]:
    """Log any exception and raise ``SystemExit``, where Celery would log it and continue.

    ``report`` is called with the reason as text.
    """
    try:
        yield
    except Exception as exc:
        if logging.getLogger().hasHandlers():
            log_causes(exc)
        else:  # Celery has not set up logging yet
            sys.stderr.write(f"gw_celery: {type(exc).__name__}: {exc}\n")
        report(str(exc))
        code = os.EX_CONFIG if isinstance(exc, errors.ConfigurationError) else EX_FAILURE
        raise SystemExit(code) from exc


def log_causes(exc: BaseException) -> None:
    """Log that this process cannot serve, with the traceback of each class that failed."""
    logger.critical("pid %d cannot serve: %s", os.getpid(), exc)
    if isinstance(exc, errors.StartupError):
        for name, cause in exc.causes.items():
            logger.error("pid %d: %s failed to load", os.getpid(), name, exc_info=cause)
