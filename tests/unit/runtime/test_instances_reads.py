"""Which parameters shape the loaded state: those that are read while it loads, wherever that is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

import gw_celery as gw
from tests.unit.runtime.served import Owner, serving


class Base:
    """Loads with whatever ``how`` its subclass has, and answers with what it loaded."""

    name: str = gw.parameter(default="small")
    threshold: float = gw.parameter(default=0.5)

    @gw.method()
    def predict(self) -> tuple[str, float]:
        return self.loaded, self.threshold

    @property
    def path(self) -> str:
        return f"/models/{self.name}"


class InHook(Base):
    @gw.on_enter()
    def load(self) -> None:
        self.loaded = self.name


class InAsyncHook(Base):
    @gw.on_enter()
    async def load(self) -> None:
        await asyncio.sleep(0)
        self.loaded = self.name


class InHookOfBase(InHook):
    @gw.on_enter()
    async def warm_up(self) -> None: ...


class InHelper(Base):
    @gw.on_enter()
    async def load(self) -> None:
        self.fetch()

    def fetch(self) -> None:
        self.loaded = self.name


class InProperty(Base):
    @gw.on_enter()
    def load(self) -> None:
        self.loaded = self.path.removeprefix("/models/")


class InToThread(Base):
    @gw.on_enter()
    async def load(self) -> None:
        await asyncio.to_thread(self.fetch)

    def fetch(self) -> None:
        self.loaded = self.name


class InThread(Base):
    @gw.on_enter()
    def load(self) -> None:
        thread = threading.Thread(target=self.fetch)
        thread.start()
        thread.join()

    def fetch(self) -> None:
        self.loaded = self.name


class InTask(Base):
    @gw.on_enter()
    async def load(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.fetch())

    async def fetch(self) -> None:
        self.loaded = self.name


class InAnotherObject(Base):
    @gw.on_enter()
    def load(self) -> None:
        self.loaded = Loader(self).name


class Loader:
    def __init__(self, of: Any) -> None:
        self.name = of.name


@pytest.mark.parametrize(
    "cls",
    [
        InHook,
        InAsyncHook,
        InHookOfBase,
        InHelper,
        InProperty,
        InToThread,
        InThread,
        InTask,
        InAnotherObject,
    ],
)
def test_a_read_while_it_loads_makes_a_load_parameter(cls: type) -> None:
    async def main(owner: Owner) -> None:
        assert await owner.call(threshold=0.9) == ("small", 0.9)
        assert await owner.call(name="large", threshold=0.1) == ("large", 0.1)
        assert await owner.call() == ("small", 0.5)

    serving(cls, main)


class Choosy:
    """Reads ``precision`` for a quantized model only."""

    mode: str = gw.parameter(default="full")
    precision: int = gw.parameter(default=8)
    loads: list[str] = []

    @gw.on_enter()
    async def load(self) -> None:
        self.loaded = self.mode if self.mode == "full" else f"{self.mode} {self.precision}"
        Choosy.loads.append(self.loaded)

    @gw.method()
    def predict(self) -> tuple[str, int]:
        return self.loaded, self.precision


def test_a_read_that_depends_on_another_value_shapes_those_instances_only() -> None:
    async def main(owner: Owner) -> None:
        assert await owner.call(precision=4) == ("full", 4)
        assert await owner.call(mode="quantized", precision=4) == ("quantized 4", 4)
        assert await owner.call(mode="quantized") == ("quantized 8", 8)
        assert await owner.call(mode="full", precision=2) == ("full", 2)
        assert await owner.call(mode="quantized", precision=4) == ("quantized 4", 4)

    Choosy.loads = []
    serving(Choosy, main)
    assert Choosy.loads == ["full", "quantized 4", "quantized 8"]


def test_an_int_where_a_float_is_declared_is_the_same_value() -> None:
    loads: list[float] = []

    class Scaled:
        scale: float = gw.parameter(default=1)

        @gw.on_enter()
        async def load(self) -> None:
            loads.append(self.scale)

        @gw.method()
        def predict(self) -> str:
            return repr(self.scale)

    async def main(owner: Owner) -> None:
        assert [await owner.call(**given) for given in ({}, {"scale": 1}, {"scale": 1.0})] == [
            "1.0"
        ] * 3
        assert [await owner.call(scale=scale) for scale in (2, 2.0)] == ["2.0"] * 2

    serving(Scaled, main)
    assert loads == [1.0, 2.0]


class Kept:
    """Hands its ``self`` to others while it loads."""

    name: str = gw.parameter(default="small")
    threshold: float = gw.parameter(default=0.5)
    left: list[tuple[str, float]] = []

    @gw.on_enter()
    async def load(self) -> None:
        self.loaded_name = self.name
        self.read_name: Callable[[], str] = lambda: self.name
        self.read_threshold: Callable[[], float] = lambda: self.threshold

    @gw.on_exit()
    def unload(self) -> None:
        Kept.left.append((self.name, self.threshold))

    @gw.method()
    def loaded_by(self) -> str:
        return self.read_name()

    @gw.method()
    def predict(self) -> tuple[str, float]:
        return self.read_name(), self.read_threshold()


def test_a_call_parameter_is_not_read_through_the_self_of_the_load() -> None:
    async def main(owner: Owner) -> None:
        with pytest.raises(gw.UsageError, match=r"'threshold' was read .* hand over `self.thresho"):
            await owner.call(threshold=0.9)
        assert await owner.handle().loaded_by() == "small"

    Kept.left = []
    serving(Kept, main)
    # An exit hook has no caller to be wrong about.
    assert Kept.left == [("small", 0.5)]


class Listed:
    labels: list[str] = gw.parameter(default=["a"])
    left: list[list[str]] = []

    @gw.on_enter()
    def load(self) -> None:
        self.count = len(self.labels)

    @gw.on_exit()
    def unload(self) -> None:
        Listed.left.append(self.labels)

    @gw.method()
    def predict(self) -> list[str]:
        self.labels.append("more")
        return self.labels


def test_what_a_body_does_to_a_list_is_its_own() -> None:
    async def main(owner: Owner) -> None:
        for _ in range(2):
            assert await owner.call() == ["a", "more"]
            assert await owner.call(labels=["b", "c"]) == ["b", "c", "more"]

    Listed.left = []
    serving(Listed, main)
    assert sorted(Listed.left) == [["a"], ["b", "c"]]
