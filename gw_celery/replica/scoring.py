"""Answers the parent's orders to measure the tasks of this replica."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from gw_celery import conf
from gw_celery.policy import scores
from gw_celery.protocol import frames, snapshot
from gw_celery.replica import benchmark

logger = logging.getLogger(__name__)

#: Seconds over those that the inputs of a benchmark have to end.
_MARGIN = 1.0


class Scoring:
    """The scores of a replica's tasks; on its loop.

    Args:
        app: the Celery app, with the bodies of its tasks open to limits.
        called: ``Inputs.called``.
        report: takes a report for the parent.
    """

    def __init__(
        self,
        app: Any,
        settings: conf.Settings,
        called: benchmark.Called,
        report: Callable[[tuple[Any, ...]], None],
    ) -> None:
        self._app = app
        self._settings = settings
        self._called = called
        self._report = report
        # asyncio keeps only weak references to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    def order(self, call: int, name: str, within: float, is_again: bool) -> None:
        """Report the score of the task ``name``, or why there is none.

        Args:
            within: seconds that it has.
            is_again: whether this replica has been READY before.
        """
        answer = self._answer(call, name, within, is_again)
        task = asyncio.create_task(answer, name=f"benchmark of {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End what is being measured: this replica leaves."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._settings.cancel_timeout + _MARGIN)

    async def _answer(self, call: int, name: str, within: float, is_again: bool) -> None:
        answer: dict[str, Any]
        try:
            answer = {"score": scores.to_json(await self._measured(name, within, is_again))}
        except scores.NoScore as exc:
            answer = {"failure": str(exc)}
        except Exception as exc:  # ours: the parent must not wait for ever because of it
            logger.exception("the benchmark of %s broke off", name)
            answer = {"failure": f"{type(exc).__name__}: {exc}"}
        self._report((frames.Report.MEASURED, call, json.dumps(answer)))

    async def _measured(self, name: str, within: float, is_again: bool) -> snapshot.TaskScore:
        task = self._app.tasks.get(name)
        if getattr(task, "gw_method", None) is None:
            raise scores.NoScore("no task of this name is served here")
        logger.info("the benchmark of %s begins", name)
        measurement = benchmark.Measurement(task, self._called, self._settings.cancel_timeout)
        bound = asyncio.timeout(within)
        try:
            async with bound:
                measured = await measurement.run()
        except TimeoutError as exc:
            if not bound.expired():
                raise
            if is_again and measurement.is_stuck:  # else the parent ends this process anyway
                self._report((frames.Report.STUCK, name))
            raise scores.NoScore(
                f"it was not over after {within:.0f} s (setting gw_benchmark_timeout)"
            ) from exc
        logger.info("the score of %s is %.4g/s", name, measured.value)
        return measured
