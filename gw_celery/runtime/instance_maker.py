"""Make one instance of a class task: its state, what that was made from, and how it is left."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable
from typing import Any

from gw_celery.declare import parameters, services
from gw_celery.runtime import instance_views, lifecycle, loop
from gw_celery.types import ParameterValues

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """An instance whose ``on_enter`` hooks have run."""

    instance: Any
    #: The parameters that its state depends on.
    reads: frozenset[str]


def unit(service: services.Service, view_class: type, values: ParameterValues) -> lifecycle.Unit:
    """Return what enters and leaves an instance with ``values``; entering it gives a ``Made``."""
    entered: list[Any] = []

    async def enter() -> Made:
        made = await _made(service, view_class, values)
        entered.append(made.instance)
        return made

    async def leave() -> None:
        (instance,) = entered
        object.__setattr__(instance, parameters.READS, None)
        await _run_exit_hooks(instance, service.exit_hooks)

    return lifecycle.Unit(name=service.key, enter=enter, leave=leave)


async def _made(service: services.Service, view_class: type, values: ParameterValues) -> Made:
    reads: set[str] = set()
    # A copy: what a body does to a list that its caller gave is not done to the exit hooks' one.
    instance = instance_views.instance(view_class, copy.deepcopy(dict(values)))
    object.__setattr__(instance, parameters.READS, reads)
    await loop.in_thread(instance.__init__)  # a constructor that loads must not stop the loop
    await _run_hooks(instance, service.enter_hooks)
    shaping = frozenset(
        name
        for name, one in service.parameters.items()
        if one.scope == "load" or (name in reads and one.scope != "call")
    )
    object.__setattr__(instance, parameters.READS, shaping)
    return Made(instance=instance, reads=shaping)


async def _run_hooks(instance: Any, names: tuple[str, ...]) -> None:
    for name in names:
        hook: Callable[[], Any] = getattr(instance, name)
        await (hook() if inspect.iscoroutinefunction(hook) else loop.in_thread(hook))


async def _run_exit_hooks(instance: Any, names: tuple[str, ...]) -> None:
    """Run every hook, also when one before it failed; each failure is logged."""
    for name in names:
        try:
            await _run_hooks(instance, (name,))
        except Exception:
            logger.exception("%s.%s failed", type(instance).__qualname__, name)
