"""What happens when more instances are wanted than may be alive."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import traceback
import weakref
from typing import Any

import pytest

import gw_celery as gw
from tests.unit.runtime.served import Model, Owner, serving


async def everything_else() -> None:
    """Let each task that can go on do so, until all wait for something that this test has to do."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_where_all_are_busy_another_waits_for_one_to_become_idle() -> None:
    async def main(owner: Owner) -> None:
        a, b = [await owner.holding(name).begun() for name in "ab"]
        c = owner.holding("c")
        await everything_else()
        assert not c.has_begun
        assert sorted(Model.alive) == ["a", "b", "small"]

        await b.end()
        await c.begun()
        assert sorted(Model.alive) == ["a", "c", "small"]
        assert await c.end() == "c"
        await a.end()

    serving(Model, main)
    assert Model.most == 3


def test_calls_that_overlap_for_ever_let_another_in() -> None:
    async def main(owner: Owner) -> None:
        a, b = [await owner.holding(name).begun() for name in "ab"]
        c = owner.holding("c")
        await everything_else()
        again = owner.holding("a")  # behind c, for its turn came first
        await everything_else()
        assert not again.has_begun
        assert (await owner.call())[0] == "small"
        assert (await owner.call(name="b"))[0] == "b"

        await a.end()
        await (await c.begun()).end()
        assert await (await again.begun()).end() == "a"
        await b.end()

    serving(Model, main)
    assert Model.loads == ["small", "a", "b", "c", "a"]
    assert Model.most == 3


def test_a_build_that_no_call_waits_for_drains_nothing() -> None:
    async def main(owner: Owner) -> None:
        held = [await owner.holding(name).begun() for name in "ab"]
        c = owner.holding("c")
        await everything_else()
        again = owner.holding("a")
        await everything_else()
        assert not again.has_begun
        c.call.cancel()
        await everything_else()

        assert await (await again.begun()).end() == "a"
        assert (await owner.call(name="a"))[0] == "a"
        for call in held:
            await call.end()

    serving(Model, main)
    assert Model.loads == ["small", "a", "b"]


@pytest.mark.parametrize("turns", range(8))
def test_who_comes_while_the_others_give_up_has_a_load_of_their_own(turns: int) -> None:
    async def main(owner: Owner) -> None:
        a, b = [await owner.holding(name).begun() for name in "ab"]
        c = owner.holding("c")
        await everything_else()
        c.call.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        again = owner.holding("c")
        await everything_else()

        await a.end()
        assert await (await again.begun()).end() == "c"
        await b.end()

    serving(Model, main)
    assert Model.loads == ["small", "a", "b", "c"]


def test_calls_of_many_models_in_any_order_load_each_once_and_three_are_alive() -> None:
    names = [f"model {number}" for number in range(10)] * 10
    random.Random(7).shuffle(names)

    async def main(owner: Owner) -> None:
        answers = await asyncio.gather(*(owner.call(name=name) for name in names))
        assert [answer[0] for answer in answers] == names

    serving(Model, main)
    assert sorted(Model.loads) == sorted({"small", *names})
    assert Model.most == 3
    assert Model.alive == []


class Tidy:
    """Takes its time to leave, or fails to."""

    name: str = gw.parameter(default="small")
    log: list[str] = []
    how = "slowly"

    @gw.on_enter()
    async def load(self) -> None:
        Tidy.log.append(f"enter {self.name}")

    @gw.on_exit()
    async def unload(self) -> None:
        await asyncio.sleep(0)
        if Tidy.how == "failing":
            raise RuntimeError("cannot unload")
        if Tidy.how == "never" and self.name == "a":
            await asyncio.Event().wait()
        Tidy.log.append(f"exit {self.name}")

    @gw.method()
    def predict(self) -> str:
        return self.name


def swapped(how: str, **settings: float) -> list[str]:
    """What is noted when ``a`` has to go for ``b``, up to the answer of ``b``."""
    Tidy.log, Tidy.how = [], how

    async def main(owner: Owner) -> list[str]:
        assert await owner.call(name="a") == "a"
        assert await owner.call(name="b") == "b"
        return list(Tidy.log)

    return serving(Tidy, main, 2, **settings)


def test_an_evicted_instance_has_left_before_the_next_one_enters() -> None:
    assert swapped("slowly") == ["enter small", "enter a", "exit a", "enter b"]


def test_the_log_tells_what_is_loaded_and_what_goes(caplog) -> None:
    caplog.set_level("INFO", "gw_celery.runtime.instances")
    swapped("slowly")
    said = [record.getMessage().split(" ", 2)[2] for record in caplog.records]
    key = f"{Tidy.__module__}.Tidy"
    assert said == [
        f'has loaded {key} with {{"name":"small"}}',
        f'has loaded {key} with {{"name":"a"}}',
        f'leaves {key} with {{"name":"a"}}',
        f'has loaded {key} with {{"name":"b"}}',
    ]


def test_an_exit_hook_that_fails_harms_no_other(caplog) -> None:
    assert swapped("failing") == ["enter small", "enter a", "enter b"]
    assert "Tidy.unload failed" in caplog.text


def test_an_exit_hook_that_does_not_end_is_left_behind_at_its_limit(caplog) -> None:
    assert swapped("never", exit_timeout=0.02) == ["enter small", "enter a", "enter b"]
    assert "was left behind (setting gw_exit_timeout)" in caplog.text


def test_where_only_the_default_fits_another_is_refused_with_the_setting_to_raise() -> None:
    async def main(owner: Owner) -> None:
        with pytest.raises(gw.UsageError, match=r"gw_max_instances=1 .* set it to 2 or more"):
            await owner.call(name="large")
        assert (await owner.call())[0] == "small"

    serving(Model, main, most=1)
    assert Model.most == 1


def test_without_a_default_none_is_pinned() -> None:
    class Required(Tidy):
        name: str = gw.parameter()

    async def main(owner: Owner) -> None:
        assert [await owner.call(name=name) for name in "aba"] == ["a", "b", "a"]

    Tidy.log, Tidy.how = [], "slowly"
    serving(Required, main, most=1)
    entered_and_left = [f"{what} {name}" for name in "aba" for what in ("enter", "exit")]
    assert Tidy.log == entered_and_left


class Stuck:
    name: str = gw.parameter(default="small")
    began: list[str] = []
    left: list[str] = []

    @gw.on_enter()
    async def load(self) -> None:
        Stuck.began.append(self.name)
        if self.name == "exits":
            raise SystemExit(3)
        if self.name == "hangs":
            try:
                await asyncio.Event().wait()
            finally:
                Stuck.left.append("hangs was cancelled")

    @gw.on_exit()
    def unload(self) -> None:
        Stuck.left.append(self.name)

    @gw.method()
    def predict(self) -> str:
        return self.name


@pytest.fixture(autouse=True)
def _unstuck() -> None:
    Stuck.began, Stuck.left = [], []


def test_a_load_that_hangs_ends_at_its_limit_and_holds_up_no_other_for_ever() -> None:
    async def main(owner: Owner) -> None:
        answers = await asyncio.gather(
            owner.call(name="hangs"), owner.call(name="large"), return_exceptions=True
        )
        assert isinstance(answers[0], TimeoutError)
        assert "setting gw_start_timeout" in str(answers[0])
        assert answers[1] == "large"

    serving(Stuck, main, start_timeout=0.05)


def test_an_exit_in_a_load_fails_its_callers_and_ends_no_process() -> None:
    async def main(owner: Owner) -> None:
        with pytest.raises(gw.BodyExited, match=r"SystemExit\(3\)"):
            await owner.call(name="exits")
        assert await owner.call(name="large") == "large"

    serving(Stuck, main)


def test_a_load_under_way_is_cancelled_when_everything_is_left() -> None:
    async def main(owner: Owner) -> list[asyncio.Future[Any]]:
        calls = [asyncio.ensure_future(owner.call(name=name)) for name in ("hangs", "large")]
        await everything_else()
        assert "hangs" in Stuck.began
        return calls

    loading, queued = serving(Stuck, main)
    assert loading.cancelled()
    assert queued.cancelled()
    assert Stuck.left == ["hangs was cancelled", "small"]


def test_the_callers_of_a_failed_load_each_see_the_same_short_traceback() -> None:
    class Broken:
        name: str = gw.parameter()

        @gw.on_enter()
        async def load(self) -> None:
            await asyncio.sleep(0)
            raise OSError("no weights")

        @gw.method()
        def predict(self) -> None: ...

    async def frames(owner: Owner) -> int:
        try:
            await owner.call(name="large")
        except OSError as exc:
            return len(traceback.extract_tb(exc.__traceback__))
        return 0

    async def main(owner: Owner) -> list[int]:
        return await asyncio.gather(*(frames(owner) for _ in range(20)))

    seen = serving(Broken, main)
    assert len(set(seen)) == 1
    assert seen[0] > 0


def test_a_load_belongs_to_no_call_in_particular() -> None:
    caller = contextvars.ContextVar("caller", default="none")
    seen: list[str] = []

    class Aware:
        name: str = gw.parameter(default="small")

        @gw.on_enter()
        async def load(self) -> None:
            seen.append(f"{self.name} {caller.get()}")

        @gw.method()
        def predict(self) -> None: ...

    async def main(owner: Owner) -> None:
        caller.set("me")
        await owner.call(name="large")

    serving(Aware, main)
    assert seen == ["small none", "large none"]


def test_what_was_evicted_is_gone_without_a_garbage_collection() -> None:
    weights: list[weakref.ref[Any]] = []

    class Weights:
        """Gigabytes of them."""

    class Heavy:
        name: str = gw.parameter(default="small")

        @gw.on_enter()
        async def load(self) -> None:
            self.weights = Weights()
            weights.append(weakref.ref(self.weights))
            self.loaded = self.name

        @gw.method()
        def predict(self) -> str:
            return self.loaded

    async def main(owner: Owner) -> None:
        gc.disable()
        try:
            for name in "abc":
                await owner.call(name=name)
            # Its task ends a few turns of the loop later.
            end = asyncio.get_running_loop().time() + 10.0
            while (alive := [ref() is not None for ref in weights]) != [True, False, False, True]:
                assert asyncio.get_running_loop().time() < end, alive
                await asyncio.sleep(0.01)
        finally:
            gc.enable()

    serving(Heavy, main, most=2)
