from __future__ import annotations

import asyncio

import pytest

from gw_celery.runtime import instances
from tests.unit.runtime.owners import Model, Owner


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    Model.forget()


def test_a_use_is_counted_once_and_given_back_once() -> None:
    async def main() -> None:
        owner = await Owner(Model).start()
        one = instances.Use(owner.instances, owner.values())
        assert one.take()
        assert one.view().predict() == ("small", "small", 0.5)
        loaded = await owner.taken()
        assert loaded.in_use == 2

        one.end()
        one.end()
        assert loaded.in_use == 1
        await owner.stop()

    asyncio.run(main())


def test_what_loads_for_a_caller_that_has_given_up_is_idle() -> None:
    async def main() -> None:
        owner = await Owner(Model).start()
        late = instances.Use(owner.instances, owner.values(name="large"))
        assert not late.take()
        late.end()
        await late.load()

        loaded = await owner.taken(name="large")
        assert loaded.in_use == 1
        await owner.stop()

    asyncio.run(main())


def test_nothing_is_seen_of_an_instance_that_was_not_taken() -> None:
    async def main() -> None:
        owner = await Owner(Model).start()
        with pytest.raises(RuntimeError, match="nothing was taken"):
            instances.Use(owner.instances, owner.values()).view()
        await owner.stop()

    asyncio.run(main())
