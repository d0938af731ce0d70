"""The loaded instances of a class task in one process, by the parameters that shaped them.

The parameters that ``on_enter`` reads shape the loaded state. A call can use an instance if both
have the same values of these parameters. The call gets its other parameters through a view, which
is a second object over the same state, with its own parameter values.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import functools
import inspect
import logging
import os
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from gw_celery import conf, errors
from gw_celery.declare import parameters, services
from gw_celery.runtime import lifecycle, loop
from gw_celery.types import ParameterValues

logger = logging.getLogger(__name__)

#: Attribute of a view: the instance whose state it shares; ``None`` on the instance itself.
_SHARED = "_gw_shared"


@dataclasses.dataclass(eq=False, kw_only=True)
class Loaded:
    """An instance, and the parameter values that its state depends on."""

    life: lifecycle.Entered
    #: All parameter values at loading.
    values: ParameterValues
    is_pinned: bool = False
    in_use: int = 0
    #: Whether it takes no further calls, and is exited when its current calls have ended.
    is_drained: bool = False

    def __post_init__(self) -> None:
        self._instance = self.life.value.result()
        self._reads: frozenset[str] = getattr(self._instance, parameters.READS)
        #: Canonical text of the values that were read, because 1 and True are equal in Python.
        self.text = self._text(self.values)

    def suits(self, values: ParameterValues) -> bool:
        return self._text(values) == self.text

    def _text(self, values: ParameterValues) -> str:
        return parameters.canonical({name: values[name] for name in self._reads})

    def batch_key(self, values: ParameterValues) -> tuple[Loaded, str]:
        """Return the key that inputs must share to run in one call.

        It consists of the instance and all parameters, because a body may read any of them.
        """
        return self, parameters.canonical(values)

    def view(self, values: ParameterValues) -> Any:
        """Return the object for a call: it shares the state, and has its own ``values``."""
        view: Any = object.__new__(type(self._instance))
        view.__dict__ = self._instance.__dict__
        object.__setattr__(view, _SHARED, self._instance)
        object.__setattr__(view, parameters.VALUES, values)
        object.__setattr__(view, parameters.READS, None)
        return view


class Instances:
    """Builds, shares and drops the instances of one service in one process."""

    def __init__(self, service: services.Service, settings: conf.Settings) -> None:
        self._service = service
        self._settings = settings
        self._defaults = parameters.complete(service.parameters, {})
        self._view_class = _view_class(service.target)
        self._loaded: list[Loaded] = []  # least recently used first
        self._lock = threading.Lock()
        self._building = asyncio.Lock()
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._awaited: dict[object, ParameterValues] = {}
        # A neutral context: an instance outlives the calls for which it was built.
        self._context = contextvars.copy_context()
        # Called when an instance may have become idle, while a build waits for that.
        self._on_idle: Callable[[], object] = lambda: None

    def enter_default(self) -> lifecycle.Entered | None:
        """Begin to enter the instance with default parameters; ``None`` if a parameter is required.

        When the instance has entered, the caller passes the result to ``adopt``.
        """
        if any(parameter.is_required for parameter in self._service.parameters.values()):
            return None
        return self._life(self._defaults)

    def adopt(self, life: lifecycle.Entered) -> None:
        self._add(Loaded(life=life, values=self._defaults, is_pinned=True))

    def take(self, values: ParameterValues) -> Loaded | None:
        """Return a suitable instance and count its use, without waiting; safe from any thread."""
        with self._lock:
            for loaded in self._loaded:
                if not loaded.is_drained and loaded.suits(values):
                    self._loaded.remove(loaded)
                    self._loaded.append(loaded)
                    loaded.in_use += 1
                    return loaded
        return None

    def take_any(self) -> Loaded | None:
        """Return the default instance (else the last one used), and count its use."""
        with self._lock:
            usable = [loaded for loaded in self._loaded if not loaded.is_drained]
            if not usable:
                return None
            chosen = next((loaded for loaded in usable if loaded.is_pinned), usable[-1])
            chosen.in_use += 1
            return chosen

    def give_back(self, loaded: Loaded) -> None:
        """End one use of an instance; safe from any thread."""
        with self._lock:
            loaded.in_use -= 1
            self._on_idle()

    @contextlib.contextmanager
    def using(self, loaded: Loaded) -> Iterator[None]:
        """Count an additional use of an instance that is in use."""
        with self._lock:
            loaded.in_use += 1
        try:
            yield
        finally:
            self.give_back(loaded)

    async def load(self, values: ParameterValues) -> Loaded:
        """Return a suitable instance and count its use; build one if there is none.

        Call this on the loop. Concurrent calls with equal values share one build. If it fails, they
        all raise, and the next call builds again. A begun build continues if its callers give up.

        Raises:
            UsageError: if ``gw_max_instances`` leaves no room beside the default instance.
        """
        key, token = parameters.canonical(values), object()
        self._awaited[token] = values  # keeps the built instance until this call takes it
        try:
            while (loaded := self.take(values)) is None:
                if key not in self._builds:
                    build = asyncio.get_running_loop().create_task(
                        self._build(key, values), context=self._context.copy()
                    )
                    # Retrieve the exception, because callers that gave up never do.
                    build.add_done_callback(lambda task: task.cancelled() or task.exception())
                    self._builds[key] = build
                await asyncio.shield(self._builds[key])
            return loaded
        finally:
            del self._awaited[token]
            with self._lock:
                self._on_idle()

    async def leave(self) -> None:
        builds = list(self._builds.values())
        for build in builds:
            build.cancel()
        await asyncio.gather(*builds, return_exceptions=True)
        with self._lock:
            lives = [loaded.life for loaded in self._loaded]
            self._loaded.clear()
        await lifecycle.leave_all(lives)

    # -- building --

    async def _build(self, key: str, values: ParameterValues) -> None:
        try:
            async with self._building:
                if any(loaded.suits(values) for loaded in self._loaded):
                    return  # another build has made a suitable instance
                if not await self._has_room_for(values):
                    return
                life = self._life(values)
                try:
                    await lifecycle.settle_all([life], self._settings.start_timeout)
                except errors.StartupError as failed:
                    cause = failed.causes[life.name]
                    if isinstance(cause, Exception):
                        raise cause from None
                    raise errors.BodyExited(  # a hook must not end the process
                        f"an on_enter hook of {life.name} raised {cause!r}: raise an Exception"
                    ) from cause
                self._add(Loaded(life=life, values=values))
        finally:
            del self._builds[key]

    def _life(self, values: ParameterValues) -> lifecycle.Entered:
        manager = _entered(self._service, self._view_class, values)
        return lifecycle.Entered(self._service.key, manager, self._settings.exit_timeout)

    def _add(self, loaded: Loaded) -> None:
        with self._lock:
            self._loaded.append(loaded)
        logger.info("pid %d has loaded %s with %.200s", os.getpid(), self._service.key, loaded.text)

    # -- making room --

    async def _has_room_for(self, values: ParameterValues) -> bool:
        """Exit idle instances until there is room; return False if no call waits any more."""
        freed = asyncio.Event()
        running = asyncio.get_running_loop()
        self._on_idle = functools.partial(running.call_soon_threadsafe, freed.set)
        try:
            while len(self._loaded) >= self._settings.max_instances:
                freed.clear()
                if values not in self._awaited.values():
                    return False
                if (idle := self._idle()) is None:
                    await freed.wait()
                    continue
                key, text = self._service.key, idle.text
                logger.info("pid %d leaves %s with %.200s", os.getpid(), key, text)
                await idle.life.leave()
                with self._lock:
                    self._loaded.remove(idle)
            return True
        finally:
            with self._lock:
                self._on_idle = lambda: None
                for loaded in self._loaded:
                    loaded.is_drained = False

    def _idle(self) -> Loaded | None:
        """Return the least recently used idle instance, marked as drained.

        If all are busy, mark the least recently used one, because overlapping calls could otherwise
        keep it busy, and exclude calls with other values, for ever.
        """
        with self._lock:
            unpinned = [loaded for loaded in self._loaded if not loaded.is_pinned]
            if not unpinned:
                raise errors.UsageError(
                    f"gw_max_instances={self._settings.max_instances} leaves {self._service.name} "
                    f"no room beside the instance of its default parameters, which is always kept: "
                    f"set it to {self._settings.max_instances + 1} or more"
                )
            # Skip an instance that was just built for a call, until the call takes it.
            spare = [
                loaded
                for loaded in unpinned
                if loaded.is_drained or not any(map(loaded.suits, self._awaited.values()))
            ]
            idle = next((loaded for loaded in spare if not loaded.in_use), None)
            if idle is not None:
                idle.is_drained = True
            elif spare and not any(loaded.is_drained for loaded in spare):
                spare[0].is_drained = True
            return idle


@contextlib.asynccontextmanager
async def _entered(
    service: services.Service, view_class: type, values: ParameterValues
) -> AsyncIterator[Any]:
    """Enter an instance, record the parameters that shape its state, and exit it."""
    reads: set[str] = set()
    instance: Any = object.__new__(view_class)
    # None instead of the instance: a cycle would delay the release of memory until a collection.
    object.__setattr__(instance, _SHARED, None)
    # A copy, because a body may change a list that the caller gave, and exit hooks read it.
    object.__setattr__(instance, parameters.VALUES, copy.deepcopy(dict(values)))
    object.__setattr__(instance, parameters.READS, reads)
    await loop.in_thread(instance.__init__)  # a constructor that loads must not block the loop
    for name in service.enter_hooks:
        await _run_hook(instance, name)
    shaping = frozenset(
        name
        for name, parameter in service.parameters.items()
        if parameter.scope == "load" or (name in reads and parameter.scope != "call")
    )
    object.__setattr__(instance, parameters.READS, shaping)
    yield instance
    object.__setattr__(instance, parameters.READS, None)
    for name in service.exit_hooks:
        try:
            await _run_hook(instance, name)
        except Exception:  # the remaining hooks must still run
            logger.exception(
                "pid %d: the exit hook %s.%s failed", os.getpid(), type(instance).__qualname__, name
            )


async def _run_hook(instance: Any, name: str) -> None:
    hook: Callable[[], Any] = getattr(instance, name)
    await (hook() if inspect.iscoroutinefunction(hook) else loop.in_thread(hook))


def _view_class(cls: type) -> type:
    """Return a subclass of ``cls`` with slots for parameter values beside the shared state."""
    names = {name for base in cls.__mro__ for name in vars(base)}
    static = {name: inspect.getattr_static(cls, name) for name in names}
    body = {
        **{
            name: _shared(slot)
            for name, slot in static.items()
            if isinstance(slot, types.MemberDescriptorType)
        },
        "__slots__": (parameters.VALUES, parameters.READS, _SHARED),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        # The class's own __new__ returns handles for callers.
        "__new__": lambda view_class, *args, **kwargs: object.__new__(view_class),
    }
    return type(cls.__name__, (cls,), body)


def _shared(slot: types.MemberDescriptorType) -> property:
    """Return a property for an attribute in the user's ``__slots__``, outside the shared dict."""
    return property(
        lambda view: slot.__get__(_state(view)),
        lambda view, value: slot.__set__(_state(view), value),
        lambda view: slot.__delete__(_state(view)),
    )


def _state(view: Any) -> Any:
    shared = getattr(view, _SHARED)
    return view if shared is None else shared
