"""The instances of a class task without a process around them, and a class that tells its loads."""

from __future__ import annotations

import asyncio
from typing import Any

import gw_celery as gw
from gw_celery import conf
from gw_celery.declare import parameters, services
from gw_celery.runtime import instances, lifecycle

LONG = 60.0


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

    @classmethod
    def forget(cls) -> None:
        cls.alive, cls.loads, cls.most = [], [], 0
        cls.has_begun = asyncio.Event()


def service_of(cls: type) -> services.Service:
    return services.from_class(cls, services.Placement(), ())


class Owner:
    """The instances of one class, and the calls that a process would make of them."""

    def __init__(self, cls: type, most: int = 3, **given: float) -> None:
        self.service = service_of(cls)
        settings = conf.Settings(max_instances=most, **{"exit_timeout": LONG, **given})
        self.instances = instances.Instances(self.service, settings)
        self.default: lifecycle.Entered | None = None

    async def start(self) -> Owner:
        self.default = self.instances.enter_default()
        if self.default is not None:
            await lifecycle.settle_all([self.default], LONG)
            self.instances.adopt(self.default)
        return self

    async def stop(self) -> None:
        await self.instances.leave()

    def values(self, **given: Any) -> dict[str, Any]:
        known = self.service.parameters
        return parameters.complete(known, parameters.bind(self.service.name, known, given))

    async def taken(self, **given: Any) -> instances.Loaded:
        values = self.values(**given)
        return self.instances.take(values) or await self.instances.load(values)

    async def call(self, **given: Any) -> Any:
        loaded = await self.taken(**given)
        try:
            return loaded.view(self.values(**given)).predict()
        finally:
            self.instances.give_back(loaded)
