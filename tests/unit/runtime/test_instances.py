from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import gw_celery as gw
from tests.unit.runtime.served import Model, Owner, serving


def test_a_call_parameter_costs_nothing() -> None:
    async def main(owner: Owner) -> None:
        for tenths in range(1, 10):
            answer = await owner.call(threshold=tenths / 10)
            assert answer == ("small", "small", tenths / 10)

    serving(Model, main)
    assert Model.loads == ["small"]


def test_ten_models_load_ten_times_and_three_are_alive_at_most() -> None:
    async def main(owner: Owner) -> None:
        for number in range(10):
            assert (await owner.call(name=f"model {number}"))[0] == f"model {number}"
            assert "small" in Model.alive
        assert (await owner.call())[0] == "small"
        assert Model.alive == ["small", "model 8", "model 9"]

    serving(Model, main)
    assert Model.loads == ["small", *(f"model {number}" for number in range(10))]
    assert Model.most == 3
    assert Model.alive == []


def test_the_least_recently_used_one_is_evicted() -> None:
    async def main(owner: Owner) -> None:
        for name in ("a", "b", "a", "c"):
            await owner.call(name=name)

        assert sorted(Model.alive) == ["a", "c", "small"]

    serving(Model, main)


def test_concurrent_first_uses_build_it_once() -> None:
    async def main(owner: Owner) -> None:
        answers = await asyncio.gather(
            *(owner.call(name="large", threshold=tenths / 10) for tenths in range(1, 6))
        )
        assert {answer[0] for answer in answers} == {"large"}

    serving(Model, main)
    assert Model.loads == ["small", "large"]


def test_what_was_built_for_a_caller_is_not_evicted_before_it_is_taken() -> None:
    async def main(owner: Owner) -> None:
        answers = await asyncio.gather(*(owner.call(name=name) for name in "abc"))
        assert [answer[0] for answer in answers] == ["a", "b", "c"]

    serving(Model, main, most=2)
    assert Model.loads == ["small", "a", "b", "c"]


class Fragile:
    name: str = gw.parameter(default="small")
    builds: list[str] = []
    is_broken = True

    @gw.on_enter()
    async def load(self) -> None:
        Fragile.builds.append(self.name)
        await asyncio.sleep(0)
        if self.name == "large" and Fragile.is_broken:
            raise OSError("no weights")

    @gw.method()
    def predict(self) -> str:
        return self.name


def test_a_failed_build_fails_those_who_wait_and_is_not_kept() -> None:
    async def main(owner: Owner) -> None:
        answers = await asyncio.gather(
            *(owner.call(name="large") for _ in range(3)), return_exceptions=True
        )
        assert [str(answer) for answer in answers] == ["no weights"] * 3
        assert Fragile.builds == ["small", "large"]

        Fragile.is_broken = False
        assert await owner.call(name="large") == "large"

    Fragile.builds, Fragile.is_broken = [], True
    serving(Fragile, main)


def test_a_caller_that_gives_up_leaves_the_build_to_the_others() -> None:
    async def main(owner: Owner) -> None:
        first = asyncio.ensure_future(owner.call(name="large"))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(owner.call(name="large"))
        await Model.has_begun.wait()
        first.cancel()

        assert (await second)[0] == "large"
        assert Model.loads == ["small", "large"]

    serving(Model, main)
    assert Model.alive == []


def test_what_a_caller_that_gave_up_had_built_is_left_at_the_end() -> None:
    async def main(owner: Owner) -> None:
        only = asyncio.ensure_future(owner.call(name="large"))
        await Model.has_begun.wait()
        only.cancel()
        await asyncio.wait([only])

        assert (await owner.call(name="large"))[0] == "large"
        assert Model.loads == ["small", "large"]

    serving(Model, main)
    assert Model.alive == []


def test_without_a_default_nothing_is_loaded_before_a_call() -> None:
    loads: list[str] = []

    class Required:
        name: str = gw.parameter()

        @gw.on_enter()
        def load(self) -> None:
            loads.append(self.name)

        @gw.method()
        def predict(self) -> str:
            return self.name

    async def main(owner: Owner) -> None:
        assert loads == []
        assert await owner.call(name="large") == "large"
        assert loads == ["large"]

    serving(Required, main)


def test_a_scope_overrides_what_was_observed() -> None:
    loads: list[str] = []

    class Scoped:
        unread: str = gw.parameter(default="a", scope="load")
        read: str = gw.parameter(default="a", scope="call")

        @gw.on_enter()
        def load(self) -> None:
            loads.append(self.read)

        @gw.method()
        def predict(self) -> str:
            return self.unread + self.read

    async def main(owner: Owner) -> None:
        assert await owner.call(read="b") == "ab"
        assert loads == ["a"]
        assert await owner.call(unread="c", read="d") == "cd"
        assert loads == ["a", "d"]

    serving(Scoped, main)


def test_what_a_constructor_reads_shapes_the_loaded_state() -> None:
    class Made:
        name: str = gw.parameter(default="small")

        def __init__(self) -> None:
            self.thread = threading.current_thread()
            self.made_with = self.name

        @gw.method()
        def predict(self) -> tuple[str, threading.Thread]:
            return self.made_with, self.thread

    async def main(owner: Owner) -> None:
        name, thread = await owner.call(name="large")
        assert name == "large"
        assert thread is not threading.current_thread()  # that of the loop

    serving(Made, main)


def test_what_a_call_keeps_on_self_is_there_for_the_next() -> None:
    class Counting:
        step: int = gw.parameter(default=1)

        @gw.on_enter()
        def load(self) -> None:
            self.count = 0

        @gw.method()
        def predict(self) -> int:
            self.count += self.step
            return self.count

    async def main(owner: Owner) -> None:
        assert await owner.call() == 1
        assert await owner.call(step=10) == 11

    serving(Counting, main)


def test_true_and_one_are_different_values() -> None:
    loads: list[Any] = []

    class Loose:
        value: Any = gw.parameter(default=1)

        @gw.on_enter()
        def load(self) -> None:
            loads.append(self.value)

        @gw.method()
        def predict(self) -> str:
            return repr(self.value)

    async def main(owner: Owner) -> None:
        assert await owner.call(value=True) == "True"

    serving(Loose, main)
    assert repr(loads) == "[1, True]"


class Base:
    log: list[str] = []

    @gw.on_enter()
    def connect(self) -> None:
        self.log.append("connect")

    @gw.on_exit()
    async def disconnect(self) -> None:
        self.log.append("disconnect")

    @gw.method()
    def predict(self) -> str:
        return "base"


class Derived(Base):
    @gw.on_enter()
    async def load(self) -> None:
        self.log.append("load")

    @gw.on_exit()
    def fail(self) -> None:
        raise RuntimeError("cannot unload")

    @gw.on_exit()
    def unload(self) -> None:
        self.log.append("unload")

    @gw.method()
    def predict(self) -> str:
        return f"derived {super().predict()}"


def test_hooks_run_base_first_and_every_exit_hook_runs_in_reverse(caplog) -> None:
    Base.log.clear()

    async def main(owner: Owner) -> None:
        assert await owner.call() == "derived base"

    serving(Derived, main)
    assert Base.log == ["connect", "load", "unload", "disconnect"]
    assert "Derived.fail failed" in caplog.text


def test_sync_hooks_run_in_threads_of_their_own_and_async_ones_on_the_loop() -> None:
    names: list[str] = []

    class Hooked:
        @gw.on_enter()
        def load(self) -> None:
            names.append(threading.current_thread().name)

        @gw.on_enter()
        async def connect(self) -> None:
            names.append(threading.current_thread().name)

        @gw.method()
        def predict(self) -> None: ...

    async def main(owner: Owner) -> None:
        names.append(threading.current_thread().name)

    serving(Hooked, main)
    assert names[0].startswith("gw-hook-")
    assert names[1] == names[2]


class Slotted:
    """Keeps one attribute beside its dict."""

    __slots__ = ("__dict__", "weights")
    threshold: float = gw.parameter(default=0.5)

    @gw.on_enter()
    def load(self) -> None:
        self.weights = ["loaded"]
        self.calls = 0

    @gw.method()
    def forget(self) -> None:
        del self.weights

    @gw.method()
    def predict(self) -> tuple[list[str], float, int]:
        self.weights = [*self.weights, str(self.threshold)]
        self.calls += 1
        return self.weights, self.threshold, self.calls


def test_attributes_in_slots_are_shared_by_the_calls_as_those_in_the_dict_are() -> None:
    async def main(owner: Owner) -> None:
        await owner.call(threshold=0.1)

        assert await owner.call(threshold=0.2) == (["loaded", "0.1", "0.2"], 0.2, 2)
        await owner.handle().forget()
        with pytest.raises(AttributeError, match="weights"):
            await owner.call()

    serving(Slotted, main)
