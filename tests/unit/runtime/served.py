"""A test that runs on the loop of the process that serves, and a class that tells its loads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from celery import Celery

import gw_celery as gw
from gw_celery.testing import FakeClock, in_process

LONG = 60.0


def app_of_its_own(**settings: Any) -> gw.App:
    made = Celery("unit", broker="memory://", backend="cache+memory://", set_as_current=False)
    gw.preset(made)
    made.conf.update(settings)
    return gw.App("unit", celery=made)


def on_loop(
    app: gw.App, scenario: Callable[[], Awaitable[Any]], clock: FakeClock | None = None
) -> Any:
    """Serve ``app``, and return what ``scenario()`` does as the body of a task on the same loop."""

    @app.remote
    async def bounded() -> Any:
        async with asyncio.timeout(LONG):
            return await scenario()

    with in_process(app, clock=clock):
        return bounded.local()


class Owner:
    """A class task that is served, and calls of it."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def call(self, **given: Any) -> Any:
        return await self.handle(**given).predict()

    def holding(self, name: str) -> Holding:
        return Holding(self.handle(name=name))


class Holding:
    """A call of ``hold`` that uses its instance until it is let go."""

    def __init__(self, handle: Any) -> None:
        self._has_begun, self._go = asyncio.Event(), asyncio.Event()
        self.call = asyncio.ensure_future(handle.hold(self._has_begun, self._go))

    @property
    def has_begun(self) -> bool:
        return self._has_begun.is_set()

    async def begun(self) -> Holding:
        await self._has_begun.wait()
        return self

    async def end(self) -> Any:
        """Let it go; returns the model that it used."""
        self._go.set()
        return await self.call


def serving(
    cls: type, scenario: Callable[[Owner], Awaitable[Any]], most: int = 3, **given: float
) -> Any:
    """Serve ``cls`` with ``gw_max_instances=most``; returns what ``scenario`` does on its loop."""
    settings = {f"gw_{name}": value for name, value in {"exit_timeout": LONG, **given}.items()}
    app = app_of_its_own(gw_max_instances=most, **settings)
    facts = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    owner = Owner(app.cls(type(cls.__name__, (cls,), facts)))
    return on_loop(app, lambda: scenario(owner))


class Model:
    """Loads for each value of ``name`` and notes what is alive."""

    name: str = gw.parameter(default="small")
    threshold: float = gw.parameter(default=0.5)
    alive: list[str] = []
    loads: list[str] = []
    most: int = 0
    has_begun: asyncio.Event  # a load of another model than the default

    @gw.on_enter()
    async def load(self) -> None:
        cls = Model
        cls.loads.append(self.name)
        cls.alive.append(self.name)
        cls.most = max(cls.most, len(cls.alive))
        self.loaded = self.name
        if self.name != "small":
            cls.has_begun.set()
        await asyncio.sleep(0)

    @gw.on_exit()
    def unload(self) -> None:
        Model.alive.remove(self.loaded)

    @gw.method()
    def predict(self) -> tuple[str, str, float]:
        return self.loaded, self.name, self.threshold

    @gw.method()
    async def hold(self, has_begun: Any, go: Any) -> str:
        has_begun.set()
        await go.wait()
        return self.loaded

    @classmethod
    def forget(cls) -> None:
        cls.alive, cls.loads, cls.most = [], [], 0
        cls.has_begun = asyncio.Event()
