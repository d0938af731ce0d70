from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery
from celery.app import amqp

from gw_celery.runtime import greenlet_bridge
from tests.unit.runtime.tracers import DEADLINE, Around, run, stepped

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


@pytest.fixture
def off(around: Around) -> Iterator[greenlet_bridge.Offload]:
    made = greenlet_bridge.Offload("test", 2, around)
    yield made
    made._threads.shutdown()


def where() -> str:
    return threading.current_thread().name


def test_in_a_tracers_greenlet_a_call_runs_in_a_thread(
    off: greenlet_bridge.Offload, around: Around
) -> None:
    assert stepped(lambda: off(where)).startswith("gw-test")
    assert len(around.threads) == 1
    assert around.threads[0].startswith("gw-test")


def test_anywhere_else_it_runs_in_place_and_nothing_surrounds_it(
    off: greenlet_bridge.Offload, around: Around
) -> None:
    async def act() -> str:
        return off(where)

    assert off(where) == where()
    assert run(act) == where()
    assert around.threads == []


def test_a_call_within_a_call_stays_in_its_thread(
    off: greenlet_bridge.Offload, around: Around
) -> None:
    outer, inner = stepped(lambda: off(lambda: (where(), off(where))))
    assert outer == inner
    assert len(around.threads) == 1


def test_arguments_and_answer_pass(off: greenlet_bridge.Offload) -> None:
    def fn(*args: int, **kwargs: int) -> tuple[Any, Any]:
        return args, kwargs

    assert stepped(lambda: off(fn, 1, 2, a=3)) == ((1, 2), {"a": 3})
    assert off(fn, 1, 2, a=3) == ((1, 2), {"a": 3})


def test_an_error_comes_back_as_itself(off: greenlet_bridge.Offload) -> None:
    error = KeyError("x")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        stepped(lambda: off(fail))
    assert caught.value is error


def test_the_context_of_the_input_is_there_in_the_thread(off: greenlet_bridge.Offload) -> None:
    def tracer() -> str:
        colour.set("blue")
        return off(colour.get)

    assert stepped(tracer) == "blue"


def test_the_loop_and_other_inputs_go_on_while_every_thread_is_blocked(
    off: greenlet_bridge.Offload,
) -> None:
    async def act() -> list[str]:
        release = threading.Event()
        blocked = [
            asyncio.create_task(greenlet_bridge.step(lambda: off(release.wait, DEADLINE)))
            for _ in range(5)
        ]
        ended: list[str] = []

        async def other(name: str) -> None:
            for _ in range(10):
                await asyncio.sleep(0)
            ended.append(name)

        await asyncio.gather(
            other("a"), greenlet_bridge.step(lambda: greenlet_bridge.drive(other("b")))
        )
        assert not any(one.done() for one in blocked)
        release.set()
        assert await asyncio.gather(*blocked) == [True] * 5
        return ended

    assert run(act) == ["a", "b"]


def test_an_input_that_is_interrupted_does_not_wait_for_its_thread(
    off: greenlet_bridge.Offload,
) -> None:
    async def act() -> Any:
        began, release = threading.Event(), threading.Event()

        def block() -> None:
            began.set()
            release.wait(DEADLINE)

        tracing = asyncio.create_task(greenlet_bridge.step(lambda: off(block)))
        assert await asyncio.to_thread(began.wait, DEADLINE)
        tracing.cancel()
        try:
            return (await asyncio.gather(tracing, return_exceptions=True))[0]
        finally:
            release.set()

    assert isinstance(run(act), asyncio.CancelledError)


# -- publishing --


@pytest.fixture
def publisher(celery_app: Celery, around: Around) -> Celery:
    celery_app.amqp = greenlet_bridge.publishing(amqp.AMQP, around)(app=celery_app)
    return celery_app


def queued(app: Celery, queue: str) -> int:
    with app.connection_for_read() as connection:
        return connection.default_channel.queue_declare(queue, passive=True).message_count


def test_the_class_keeps_its_name(around: Around) -> None:
    assert greenlet_bridge.publishing(amqp.AMQP, around).__name__ == "AMQP"


def test_a_task_that_is_sent_from_a_tracer_is_published_off_the_loop(
    publisher: Celery, around: Around
) -> None:
    stepped(lambda: publisher.send_task("proj.embed", queue="offloaded"))
    assert queued(publisher, "offloaded") == 1
    assert {name.rpartition("_")[0] for name in around.threads} == {"gw-producers", "gw-publish"}


def test_a_task_that_is_sent_from_elsewhere_is_published_in_place(
    publisher: Celery, around: Around
) -> None:
    publisher.send_task("proj.embed", queue="in place")
    assert queued(publisher, "in place") == 1
    assert around.threads == []


def test_more_senders_than_threads_all_publish(publisher: Celery) -> None:
    async def act() -> None:
        send = lambda: publisher.send_task("proj.embed", queue="many")  # noqa: E731
        await asyncio.gather(*(greenlet_bridge.step(send) for _ in range(50)))

    run(act)
    assert queued(publisher, "many") == 50


def test_threads_that_publish_first_together_share_one_pool(
    celery_app: Celery, around: Around
) -> None:
    made: list[Any] = []
    second_came = threading.Event()

    class Pool:
        limit = 1

    class SlowPools(amqp.AMQP):
        @property
        def producer_pool(self) -> Any:
            if self._producer_pool is None:
                made.append(Pool())
                if len(made) > 1:
                    second_came.set()
                second_came.wait(0.2)  # the longest that a second thread is given to come in
                self._producer_pool = made[-1]
            return self._producer_pool

    pools = greenlet_bridge.publishing(SlowPools, around)(app=celery_app)
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(lambda _: pools.producer_pool._pool, range(2)))
    assert got == made * 2


def test_a_child_task_of_a_body_publishes_while_inputs_hold_every_producer(
    publisher: Celery,
) -> None:
    async def act() -> None:
        holding, release = asyncio.Event(), asyncio.Event()

        def hold() -> None:
            with publisher.amqp.producer_pool.acquire(block=True):
                taken.append(True)
                if len(taken) == publisher.amqp.producer_pool.limit:
                    holding.set()
                greenlet_bridge.drive(release.wait())

        async def child() -> None:
            publisher.send_task("proj.embed", queue="from a child")

        taken: list[bool] = []
        held = [
            asyncio.create_task(greenlet_bridge.step(hold))
            for _ in range(publisher.amqp.producer_pool.limit)
        ]
        await holding.wait()
        await asyncio.create_task(child())
        release.set()
        await asyncio.gather(*held)

    run(act)
    assert queued(publisher, "from a child") == 1
