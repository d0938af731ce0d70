"""The loaded instances of one class task, by the parameter values that they were loaded with.

Which parameters shape the loaded state is observed: those that ``on_enter`` read. An instance
serves a call when each value that it read while loading is the call's value, too; all other
parameters are given to the call by a view, a second object over the same state.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from gw_celery.declare import parameters, services
from gw_celery.runtime import lifecycle, loop, views
from gw_celery.types import ParameterValues

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False, kw_only=True)
class Loaded:
    """One instance with the parameter values that its state depends on."""

    instance: Any
    life: lifecycle.Entered | None
    reads: frozenset[str]
    #: The canonical text of what was read: as values, 1 and True are equal.
    text: str
    is_pinned: bool
    in_use: int = 0

    def suits(self, values: ParameterValues) -> bool:
        return _text(values, self.reads) == self.text


class Instances:
    """Builds, shares and drops the instances of one service in one process."""

    def __init__(self, service: services.Service, most: int, exit_timeout: float) -> None:
        self._service = service
        self._most = most
        self._exit_timeout = exit_timeout
        self._view_class = views.view_class(service.target)
        self._loaded: list[Loaded] = []  # least recently used first
        self._lock = threading.Lock()
        self._building = asyncio.Lock()
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._awaited: list[ParameterValues] = []

    def default_unit(self) -> lifecycle.Unit | None:
        """The instance of the default parameters; none when a parameter has no default."""
        if any(one.is_required for one in self._service.parameters.values()):
            return None
        return self._unit(parameters.complete(self._service.parameters, {}), is_pinned=True)

    def adopt(self, life: lifecycle.Entered) -> None:
        """Take over an instance that has entered."""
        loaded: Loaded = life.value.result()
        loaded.life = life
        with self._lock:
            self._loaded.append(loaded)

    def take(self, values: ParameterValues) -> Loaded | None:
        """Return a suitable instance and count its use, without waiting; from any thread."""
        with self._lock:
            for position, loaded in enumerate(self._loaded):
                if loaded.suits(values):
                    self._loaded.append(self._loaded.pop(position))
                    loaded.in_use += 1
                    return loaded
        return None

    def give_back(self, loaded: Loaded) -> None:
        with self._lock:
            loaded.in_use -= 1

    @contextlib.contextmanager
    def using(self, loaded: Loaded) -> Iterator[None]:
        """Count one more use of an instance that is in use already."""
        with self._lock:
            loaded.in_use += 1
        try:
            yield
        finally:
            self.give_back(loaded)

    async def load(self, values: ParameterValues) -> Loaded:
        """Return a suitable instance, entering a new one when there is none; on the loop.

        Concurrent first uses build it once. A build that fails raises in all that wait for it,
        and is not kept; one whose callers give up goes on, for the next.
        """
        self._awaited.append(values)
        try:
            while (found := self.take(values)) is None:
                await asyncio.shield(self._build(values))
            return found
        finally:
            self._awaited.remove(values)

    def view(self, loaded: Loaded, values: ParameterValues) -> Any:
        """Return the object that a call with ``values`` sees: shared state, own parameters."""
        return views.view(loaded.instance, values)

    async def leave(self) -> None:
        """Leave every instance that ``load`` built; the start-up's own are not among them."""
        with self._lock:
            built = [one for one in self._loaded if not one.is_pinned]
            self._loaded.clear()
        await asyncio.gather(*(one.life.leave() for one in built if one.life is not None))

    def _build(self, values: ParameterValues) -> asyncio.Task[None]:
        """Return the task that builds an instance for ``values``: one for all that wait for it."""
        key = parameters.canonical(values)
        if key not in self._builds:
            build = self._builds[key] = asyncio.create_task(self._build_missing(values))
            build.add_done_callback(lambda _: self._builds.pop(key))
        return self._builds[key]

    async def _build_missing(self, values: ParameterValues) -> None:
        async with self._building:
            if any(one.suits(values) for one in self._loaded):
                return  # of other values, but of the same that shape the state
            await self._make_room()
            life = lifecycle.Entered(self._unit(values, is_pinned=False), self._exit_timeout)
            failure = await life.settle()
            if failure is not None:
                raise failure
            self.adopt(life)

    async def _make_room(self) -> None:
        """Leave the least recently used idle instances, so that one more fits in memory."""
        with self._lock:
            idle = [one for one in self._loaded if self._is_idle(one)]
            dropped = idle[: max(0, len(self._loaded) + 1 - self._most)]
            for one in dropped:
                self._loaded.remove(one)
        await asyncio.gather(*(one.life.leave() for one in dropped if one.life is not None))

    def _is_idle(self, one: Loaded) -> bool:
        is_awaited = any(one.suits(values) for values in self._awaited)
        return not (one.is_pinned or one.in_use or is_awaited)

    def _unit(self, values: ParameterValues, *, is_pinned: bool) -> lifecycle.Unit:
        instance: list[Any] = []

        async def enter() -> Loaded:
            made, reads = await self._made(values)
            instance.append(made)
            return Loaded(
                instance=made,
                life=None,
                reads=reads,
                text=_text(values, reads),
                is_pinned=is_pinned,
            )

        async def leave() -> None:
            await _run_exit_hooks(instance[0], self._service.exit_hooks)

        return lifecycle.Unit(name=self._service.key, enter=enter, leave=leave)

    async def _made(self, values: ParameterValues) -> tuple[Any, frozenset[str]]:
        reads: set[str] = set()
        instance = views.instance(self._view_class, values)
        object.__setattr__(instance, parameters.READS, reads)
        await loop.in_thread(instance.__init__)  # a constructor that loads must not stop the loop
        await _run_hooks(instance, self._service.enter_hooks)
        object.__setattr__(instance, parameters.READS, None)
        declared = self._service.parameters
        return instance, frozenset(
            name
            for name, one in declared.items()
            if one.scope == "load" or (name in reads and one.scope != "call")
        )


def _text(values: ParameterValues, names: frozenset[str]) -> str:
    return parameters.canonical({name: values[name] for name in names})


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
