"""Enter contexts and ``on_enter`` hooks in parallel, and leave them again.

Each unit lives in a task of its own from entering to leaving, because libraries built on anyio
require that a cancel scope is left in the task that entered it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from gw_celery import errors

logger = logging.getLogger(__name__)


class Entered:
    """A unit that is being entered, is entered, or was left; ``value`` is what it entered as."""

    def __init__(
        self, name: str, manager: AbstractAsyncContextManager[Any], exit_timeout: float
    ) -> None:
        self.name = name
        self._manager = manager
        self.value: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._leave = asyncio.Event()
        self._exit_timeout = exit_timeout
        self._life = asyncio.create_task(self._live(), name=f"gw-{name}")

    @property
    def failure(self) -> BaseException | None:
        """What ended the entering, if it is over and failed."""
        if not self.value.done():
            return None
        if self.value.cancelled():
            return asyncio.CancelledError("cancelled while entering")
        return self.value.exception()

    def is_life(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is the one that enters and leaves the unit."""
        return task is self._life

    def abandon(self) -> None:
        """Cancel the entering; what is entered already stays so."""
        if not self.value.done():
            self._life.cancel()

    async def leave(self) -> None:
        """Leave the unit when it is entered; errors and time-outs are logged, never raised."""
        self._leave.set()
        _, late = await asyncio.wait([self._life], timeout=self._exit_timeout)
        if late:
            # Not awaited: what swallows the cancellation must not hold up the others.
            self._life.cancel()
            logger.error(
                "%s did not leave within %.0f s and was left behind (setting gw_exit_timeout)",
                self.name,
                self._exit_timeout,
            )

    async def _live(self) -> None:
        try:
            entered = await self._manager.__aenter__()
        except asyncio.CancelledError:
            self.value.cancel()
            return
        except BaseException as exc:
            self.value.set_exception(exc)
            self.value.exception()  # retrieved: `failure` reports it
            return
        self.value.set_result(entered)
        await self._leave.wait()
        try:
            await self._manager.__aexit__(None, None, None)
        except Exception:
            logger.exception("%s failed to leave", self.name)


async def settle_all(lives: Sequence[Entered], timeout: float) -> None:
    """Wait until all of ``lives`` have entered.

    When one fails the rest are cancelled, every one that entered is left again, and all causes
    are reported together. So it is when the wait is cancelled.

    Raises:
        StartupError: with the cause of each unit that failed, or did not enter in ``timeout``.
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
    """Leave all of ``lives`` in parallel; those still entering are cancelled first."""
    for life in lives:
        life.abandon()
    await asyncio.gather(*(life.leave() for life in lives))
