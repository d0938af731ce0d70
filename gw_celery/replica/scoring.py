"""Answers the parent's orders to measure: with what this machine has kept, or by a benchmark."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from gw_celery import conf
from gw_celery.declare import registry
from gw_celery.policy import scores
from gw_celery.protocol import frames, snapshot
from gw_celery.replica import benchmark, fingerprint, store, tracer
from gw_celery.replica import input as replica_input
from gw_celery.runtime import loop

logger = logging.getLogger(__name__)

#: Seconds over those that the inputs of a benchmark have to end.
_MARGIN = 1.0


class Scoring:
    """The scores of a replica's tasks; on its loop.

    Args:
        app: the Celery app, with the bodies of its tasks open to limits.
        inputs: those of this replica.
        link: the way to the parent.
        registries: what this process has declared.
    """

    def __init__(
        self,
        app: Any,
        settings: conf.Settings,
        inputs: tracer.Inputs,
        link: replica_input.Link,
        registries: Iterable[registry.Registry],
    ) -> None:
        self._app = app
        self._settings = settings
        self._inputs = inputs
        self._link = link
        self._contexts = {
            key: tuple(one.contexts.values()) for one in registries for key in one.services
        }
        folder = settings.score_cache and conf.cache_folder(settings.score_cache)
        self._store = store.Store(folder) if folder else None
        # asyncio keeps only weak references to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self, call: int, name: str, devices: Sequence[str], within: float, may_be_old: bool
    ) -> None:
        """Report the score of the task ``name``, or why there is none.

        Args:
            devices: the products that this replica runs on.
            within: seconds that it has.
            may_be_old: whether what was kept will do.
        """
        answer = self._answer(call, name, devices, within, may_be_old)
        task = asyncio.create_task(answer, name=f"benchmark of {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End what is being measured: this replica leaves."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._settings.cancel_timeout + _MARGIN)

    async def _answer(self, call: int, name: str, *how: Any) -> None:
        try:
            answer = await self._scored(name, *how)
        except scores.NoScore as exc:
            answer = {"failure": str(exc)}
        except Exception as exc:  # ours: the parent must not wait for ever because of it
            logger.exception("the benchmark of %s broke off", name)
            answer = {"failure": f"{type(exc).__name__}: {exc}"}
        self._link.report(frames.Report.MEASURED, call, json.dumps(answer))

    async def _scored(
        self, name: str, devices: Sequence[str], within: float, may_be_old: bool
    ) -> dict[str, Any]:
        task = self._app.tasks.get(name)
        if getattr(task, "gw_method", None) is None:
            raise scores.NoScore("no task of this name is served here")
        # In threads: a home on a network may be slow.
        key = await loop.in_thread(self._fingerprint, task, devices)
        if key and may_be_old and (kept := await loop.in_thread(self._found, key)) is not None:
            return {"score": scores.to_json(kept.score), "age": kept.age}
        measured = await self._measured(task, within, is_again=not may_be_old)
        if key:
            await loop.in_thread(self._keep, key, measured)
        return {"score": scores.to_json(measured), "age": None}

    async def _measured(self, task: Any, within: float, *, is_again: bool) -> snapshot.TaskScore:
        logger.info("the benchmark of %s begins", task.name)
        measurement = benchmark.Measurement(task, self._inputs, self._settings.cancel_timeout)
        bound = asyncio.timeout(within)
        try:
            async with bound:
                measured = await measurement.run()
        except TimeoutError as exc:
            if not bound.expired():
                raise
            if is_again and measurement.is_stuck:  # else the parent ends this process anyway
                self._link.report(frames.Report.STUCK, task.name)
            raise scores.NoScore(
                f"it was not over after {within:.0f} s (setting gw_benchmark_timeout)"
            ) from exc
        logger.info("the score of %s is %.4g/s", task.name, measured.value)
        return measured

    def _fingerprint(self, task: Any, devices: Sequence[str]) -> str:
        """The name by which its score is kept; "" where none can be."""
        if self._store is None:
            return ""
        contexts = self._contexts.get(task.gw_service.key, ())
        try:
            return fingerprint.of(task.gw_service, task.gw_method, contexts, devices)
        except Exception:  # of the user's own objects; a benchmark works without
            logger.warning("the score of %s cannot be kept", task.name, exc_info=True)
            return ""

    def _found(self, key: str) -> store.Kept | None:
        return None if self._store is None else self._store.find(key)

    def _keep(self, key: str, measured: snapshot.TaskScore) -> None:
        if self._store is not None:
            self._store.keep(key, measured)
