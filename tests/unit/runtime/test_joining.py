"""What an input of a replica does as its batch begins: one moment that no process shows."""

from __future__ import annotations

import asyncio
from typing import Any

import gw_celery as gw
from gw_celery.runtime import batcher
from tests.unit.runtime.served import app_of_its_own, on_loop


class Joining:
    """An input that may have been withdrawn."""

    def __init__(self, said: list[str], *, is_wanted: bool = True) -> None:
        self.runs_alone = False
        self._said = said
        self._is_wanted = is_wanted

    async def record_early_ack(self) -> None:
        await asyncio.sleep(0)
        self._said.append("recorded")

    def begin(self) -> bool:
        self._said.append("begun")
        return self._is_wanted


def test_an_input_is_on_record_before_it_begins_and_may_be_withdrawn() -> None:
    app, said, seen = app_of_its_own(), [], []
    go, entered = asyncio.Event(), asyncio.Event()

    @app.remote
    @gw.concurrent(max_inputs=8)
    @gw.batched(max_batch_size=8)
    async def double(xs: list[int]) -> list[int]:
        seen.append(xs)
        entered.set()
        await go.wait()
        return [2 * x for x in xs]

    async def scenario() -> None:
        def submit(x: int, joining: Any) -> asyncio.Future[int]:
            batcher.joining.set(joining)
            return asyncio.ensure_future(double(x))

        first = submit(0, None)
        await entered.wait()
        staying = submit(1, Joining(said))
        leaving = submit(2, Joining([], is_wanted=False))
        for _ in range(10):
            await asyncio.sleep(0)
        assert said == []  # while it gathers
        go.set()
        assert await asyncio.gather(first, staying) == [0, 2]
        leaving.cancel()

    on_loop(app, scenario)
    assert seen == [[0], [1]]
    assert said == ["recorded", "begun"]
