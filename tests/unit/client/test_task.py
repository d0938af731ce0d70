"""Tasks as their callers and bodies see them, in eager mode: no broker, the real tracer."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import Any

import celery
import kombu.exceptions
import pytest
from celery import Celery, chain, chord, current_task, group
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from pydantic import BaseModel

import gw_celery as gw
from gw_celery import testing

LONG = 60.0


@pytest.fixture
def square(app: gw.App) -> Any:
    @app.remote
    async def square(x):
        await asyncio.sleep(0)
        return x * x

    return square


def test_every_way_of_calling_gives_the_answer(square, serve) -> None:
    async def calls() -> list[int]:
        return [
            await square(5),
            await square.aremote(5),
            await square.spawn(5),
            await square.options(timeout=LONG)(5),
        ]

    serve()
    assert square.delay(5).get() == 25
    assert square.apply_async((5,)).get() == 25
    assert square.apply((5,)).get() == 25
    assert square.s(5).delay().get() == 25
    assert square.remote(5) == 25
    assert square.spawn(5).get() == 25
    assert square.local(5) == 25
    assert square.options(timeout=LONG).remote(x=5) == 25
    assert asyncio.run(calls()) == [25] * 4


def test_every_way_of_calling_a_method_gives_the_answer(app, serve) -> None:
    @app.cls
    class Scaler:
        factor: float = gw.parameter(default=2)

        @gw.method()
        def scale(self, x):
            return x * self.factor

        @gw.method()
        async def later(self, x):
            return x * self.factor

    async def calls() -> list[float]:
        return [
            await Scaler(factor=3).scale(5),
            await Scaler(factor=3).later(5),
            await Scaler(factor=3).later.aremote(5),
            await Scaler(factor=3).later.spawn(5),
        ]

    serve()
    for method in (Scaler(factor=3).scale, Scaler(factor=3).later):
        assert method.delay(5).get() == 15.0
        assert method.apply_async((5,)).get() == 15.0
        assert method.s(5).delay().get() == 15.0
        assert method.remote(x=5) == 15.0
        assert method.spawn(5).get() == 15.0
        assert method.local(5) == 15.0
        assert method.options(timeout=LONG).remote(5) == 15.0
    assert Scaler().scale.remote(5) == 10.0
    assert asyncio.run(calls()) == [15.0] * 4


def test_without_being_entered_a_local_call_enters_what_it_needs(app) -> None:
    log: list[str] = []

    @app.context()
    class Weights:
        def __enter__(self):
            log.append("enter")
            return 7

        def __exit__(self, *exc):
            log.append("leave")

    @app.remote
    async def scaled(x):
        return x * app.get_context(Weights)

    assert scaled.local(3) == 21
    assert scaled.local(4) == 28
    assert log == ["enter"]


@pytest.mark.parametrize("call", ["delay", "remote", "spawn", "local"])
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2), {}), ((), {"y": 1})])
def test_wrong_arguments_raise_at_the_call(square, serve, call, args, kwargs) -> None:
    if call == "local":
        serve()
    with pytest.raises(TypeError):
        getattr(square, call)(*args, **kwargs)


def test_wrong_arguments_of_a_method_raise_at_the_call(app) -> None:
    @app.cls
    class Model:
        @gw.method()
        def predict(self, x, *, limit=3): ...

    for args, kwargs in (((), {}), ((1, 2), {}), ((1,), {"self": 3})):
        with pytest.raises(TypeError):
            Model().predict.delay(*args, **kwargs)
    with pytest.raises(TypeError):
        asyncio.run(awaited(Model().predict))


async def awaited(fn: Any, *args: Any) -> Any:
    return await fn(*args)


def test_arguments_and_answers_go_through_the_serializer(app, serve) -> None:
    @app.remote
    async def echo(value):
        return value

    serve()
    mine = {"pair": (1, 2), 3: {4}, "raw": b"x"}
    answer = echo.delay(mine).get()
    assert answer == mine
    assert answer is not mine
    with pytest.raises(kombu.exceptions.EncodeError, match=r"builtins\.object"):
        echo.delay(object())


def test_running_the_body_directly_says_what_to_write(square) -> None:
    with pytest.raises(gw.UsageError, match=r"write \.local\(...\) to run it here"):
        square.run(5)


@pytest.mark.parametrize("name", ["map", "starmap", "chunks"])
def test_canvas_that_would_bypass_the_loaded_state_is_refused(square, name: str) -> None:
    args = ([1, 2], 1) if name == "chunks" else ([1, 2],)

    with pytest.raises(gw.UsageError) as caught:
        getattr(square, name)(*args)
    assert ".chunks() would call the body one by one" in str(caught.value)
    assert "group(" in str(caught.value)


def test_blocking_on_a_running_loop_is_refused(square, serve) -> None:
    async def main() -> None:
        with pytest.raises(gw.BlockingCallError, match=r"square\.remote\(\) would block"):
            square.remote(5)
        sent = square.spawn(5)
        with pytest.raises(gw.BlockingCallError, match=r"\.get\(\) would block"):
            sent.get()

    serve()
    asyncio.run(main())


def test_blocking_inside_a_body_is_refused(app, square, serve) -> None:
    @app.remote
    async def asks():
        return square.remote(5)

    @app.cls
    class Model:
        @gw.method()
        def asks(self):
            return square.remote(5)

    serve()
    for call in (asks, Model().asks):
        with pytest.raises(gw.BlockingCallError):
            call.remote()


def test_a_body_awaits_another_service_here(app, square, serve) -> None:
    @app.remote
    async def asks(x):
        return await square(x), current_task.name

    serve()
    assert asks.remote(5) == (25, f"{__name__}.asks")


def test_a_body_awaits_wrong_arguments_and_gets_the_error(app, square, serve) -> None:
    @app.remote
    async def asks():
        return await square(1, 2)

    serve()
    with pytest.raises(TypeError):
        asks.remote()


def test_a_body_awaits_itself(app, serve) -> None:
    @app.remote
    async def factorial(n):
        return 1 if n <= 1 else n * await factorial(n - 1)

    serve()
    assert factorial.remote(5) == 120


def test_a_body_awaits_itself_many_times_at_once(app, serve) -> None:
    @app.remote
    async def tree(depth):
        if not depth:
            return [current_task.request.id]
        found = await asyncio.gather(*(tree(depth - 1) for _ in range(3)))
        return [one for part in found for one in part]

    serve()
    ids = tree.remote(2)
    assert len(ids) == len(set(ids)) == 9


def test_a_body_sends_and_spawns_others(app, square, serve) -> None:
    @app.remote
    async def sends():
        return square.delay(2).id != "", await square.spawn(3), await square.aremote(4)

    serve()
    assert sends.remote() == (True, 9, 16)


def test_a_sync_body_sends_others(app, square, serve) -> None:
    @app.cls
    class Model:
        @gw.method()
        def sends(self):
            return square.local(3), square.delay(2).result

    serve()
    assert Model().sends.remote() == (9, 4)


def test_the_request_is_right_wherever_the_body_looks(app, serve) -> None:
    @app.remote(bind=True)
    async def look(self):
        async def child():
            await asyncio.sleep(0)
            return current_task.request.id, self.request.id

        def in_thread():
            return current_task.request.id, self.request.id

        seen = [
            (current_task.request.id, self.request.id),
            *await asyncio.gather(child(), child()),
            await asyncio.to_thread(in_thread),
        ]
        await asyncio.sleep(0)
        return [*seen, (current_task.request.id, self.request.id)], current_task.name

    serve()
    seen, name = look.apply_async(task_id="the-id").get()
    assert seen == [("the-id", "the-id")] * 5
    assert name == look.name
    assert not current_task


def test_bodies_at_once_see_their_own_requests(app, serve) -> None:
    together = threading.Barrier(2)

    @app.remote
    async def look():
        await asyncio.to_thread(together.wait, LONG)
        return current_task.request.id

    async def main() -> list[str]:
        return await asyncio.gather(*(look.options(task_id=one).aremote() for one in "ab"))

    serve()
    assert asyncio.run(main()) == ["a", "b"]
    assert not celery._state.task_join_will_block()


def test_a_bound_body_that_is_awaited_in_another_gets_its_task(app, serve) -> None:
    @app.remote(bind=True)
    async def inner(self, x):
        return self.name, x

    @app.remote
    async def outer():
        return await inner(3)

    serve()
    assert outer.remote() == (inner.name, 3)


class Flaky(Exception):
    """What the bodies below fail with until they do not."""


def test_a_body_retries_itself(app, serve) -> None:
    seen: list[int] = []

    @app.remote(bind=True, max_retries=5)
    async def flaky(self, x):
        seen.append(self.request.retries)
        if self.request.retries < 2:
            raise self.retry(exc=Flaky(), countdown=0)
        return x

    serve()
    assert flaky.delay(7).get() == 7
    assert seen == [0, 1, 2]


def test_a_body_is_retried_for_the_errors_that_it_names(app, serve) -> None:
    seen: list[int] = []

    @app.remote(autoretry_for=(Flaky,), retry_backoff=False, default_retry_delay=0)
    async def flaky(x):
        seen.append(current_task.request.retries)
        if len(seen) < 3:
            raise Flaky
        return x

    serve()
    assert flaky.delay(7).get() == 7
    assert seen == [0, 1, 2]


def test_a_method_is_retried_with_its_parameters(app, serve) -> None:
    seen: list[float] = []

    @app.cls
    class Model:
        threshold: float = gw.parameter(default=0.5)

        @gw.method(autoretry_for=(Flaky,), default_retry_delay=0)
        async def predict(self):
            seen.append(self.threshold)
            if len(seen) < 2:
                raise Flaky
            return self.threshold

    serve()
    assert Model(threshold=0.7).predict.delay().get() == 0.7
    assert seen == [0.7, 0.7]


def test_retries_run_out_with_the_error(app, serve) -> None:
    @app.remote(autoretry_for=(Flaky,), max_retries=1, default_retry_delay=0)
    async def flaky():
        raise Flaky("still")

    serve()
    with pytest.raises(Flaky, match="still"):
        flaky.delay().get()


def test_an_error_of_a_body_reaches_the_caller(app, serve) -> None:
    @app.remote
    async def fail():
        raise Flaky("why")

    serve()
    for call in (fail.remote, fail.local, lambda: asyncio.run(awaited(fail))):
        with pytest.raises(Flaky, match="why"):
            call()


def test_the_traceback_of_a_body_begins_with_the_body(app, serve) -> None:
    @app.remote
    async def fail():
        raise Flaky("why")

    serve()
    text = fail.delay().traceback
    assert "in fail" in text
    assert "bridge.py" not in text


@pytest.mark.parametrize(("exc", "state"), [(Ignore(), "IGNORED"), (Reject("no"), "REJECTED")])
def test_a_body_can_ignore_and_reject_its_message(app, serve, exc, state) -> None:
    @app.remote
    async def refuse():
        raise exc

    serve()
    assert refuse.delay().state == state


def test_a_body_replaces_itself(app, square, serve) -> None:
    @app.remote(bind=True)
    async def replaced(self, x):
        return self.replace(square.s(x))

    serve()
    # Not .delay(): eager mode of Celery itself cannot replace there.
    assert replaced.apply((5,)).get() == 25


def test_a_soft_limit_in_a_body_is_its_error(app, serve) -> None:
    @app.remote(soft_time_limit=0.01, timeout=LONG)
    async def slow():
        try:
            await asyncio.Event().wait()
        except SoftTimeLimitExceeded:
            return "stopped"

    serve()
    assert slow.remote() == "stopped"


def test_an_exit_in_a_body_is_a_failure_and_the_loop_lives_on(app, square, serve) -> None:
    @app.remote
    async def leave():
        raise SystemExit(3)

    serve()
    with pytest.raises(gw.BodyExited, match="SystemExit"):
        leave.delay().get()
    assert square.remote(5) == 25


def test_canvas_runs_through_the_loaded_state(app, square, serve) -> None:
    @app.cls
    class Model:
        factor: int = gw.parameter(default=2)

        @gw.method()
        def scale(self, x):
            return x * self.factor

    @app.remote
    async def total(xs):
        return sum(xs)

    serve()
    tripled = Model(factor=3).scale
    assert chain(square.s(2), tripled.s(), square.s()).delay().get() == 144
    assert group(square.s(2), tripled.s(2)).delay().get() == [4, 6]
    assert chord([square.s(2), tripled.s(2)], total.s()).delay().get() == 10
    assert (square.s(2) | square.si(3)).delay().get() == 9


class Query(BaseModel):
    text: str
    limit: int = 3


def test_pydantic_models_are_validated_and_dumped(app, serve) -> None:
    @app.remote(pydantic=True)
    async def search(query: Query) -> Query:
        assert isinstance(query, Query)
        return Query(text=query.text.upper(), limit=query.limit)

    @app.cls
    class Index:
        @gw.method(pydantic=True)
        def search(self, query: Query) -> Query:
            assert isinstance(query, Query)
            return query

    serve()
    assert search.delay({"text": "a"}).get() == {"text": "A", "limit": 3}
    assert search.remote(Query(text="a", limit=1)) == {"text": "A", "limit": 1}
    assert Index().search.remote({"text": "a"}) == {"text": "a", "limit": 3}
    with pytest.raises(ValueError, match="text"):
        search.remote({"limit": 1})


def test_pydantic_models_are_validated_and_dumped_in_a_call_that_stays_here(app, serve) -> None:
    @app.remote(pydantic=True)
    async def search(query: Query) -> Query:
        assert isinstance(query, Query)
        return Query(text=query.text.upper(), limit=query.limit)

    @app.remote(bind=True, pydantic=True)
    async def named(self, query: Query) -> str:
        return f"{self.name} {query.text}"

    @app.cls
    class Index:
        @gw.method(pydantic=True, pydantic_dump_kwargs={"exclude": {"limit"}})
        def search(self, query: Query | None = None) -> Query | None:
            return query

    @app.remote
    async def asks():
        with pytest.raises(ValueError, match="text"):
            await search({"limit": 1})
        return [
            await search({"text": "a"}),
            *await asyncio.gather(search(query={"text": "b"}), search(Query(text="c"))),
            await named({"text": "d"}),
            await Index().search({"text": "e"}),
            await Index().search(),
        ]

    serve()
    assert asks.remote() == [
        {"text": "A", "limit": 3},
        {"text": "B", "limit": 3},
        {"text": "C", "limit": 3},
        f"{named.name} d",
        {"text": "e"},
        None,
    ]


@dataclasses.dataclass
class Document:
    title: str


def test_classes_of_the_annotations_travel(app, serve) -> None:
    @app.remote
    async def louder(document: Document) -> list[Document]:
        return [Document(document.title.upper())]

    serve()
    assert louder.remote(Document("a")) == [Document("A")]


def test_parameters_that_no_handle_checked_are_checked_by_the_worker(app, serve) -> None:
    @app.cls
    class Model:
        name: str = gw.parameter()

        @gw.method()
        def predict(self):
            return self.name

    serve()
    task = app.celery.tasks[f"{__name__}.Model.predict"]
    for headers in (None, {"gw_params": '{"name":3}'}, {"gw_params": '{"name":"a","nme":1}'}):
        with pytest.raises(gw.DeclarationError):
            task.apply_async(headers=headers).get()
    assert task.apply_async(headers={"gw_params": '{"name":"a"}'}).get() == "a"


def sent_to(task: Any, **options: Any) -> str:
    """The queue of one message that ``task`` sends through the in-memory broker."""
    task.apply_async((5,), **options)
    with task.app.connection_for_read() as connection:
        channel = connection.default_channel
        queues = [name for name in channel.queues if channel._size(name)]
        for name in queues:
            channel._purge(name)
    (name,) = queues
    return name


@pytest.mark.parametrize("turn", ["one test", "the next"])
def test_messages_that_a_test_leaves_are_not_seen_by_the_next(app, turn) -> None:
    @app.remote
    async def embed(x): ...

    embed.apply_async((turn,))
    with app.celery.connection_for_read() as connection:
        channel = connection.default_channel
        waiting = {name: size for name in channel.queues if (size := channel._size(name))}
    assert waiting == {"gpu.embed": 1}


def test_a_task_goes_to_the_queue_of_its_service(app) -> None:
    @app.remote(gpu=gw.Gpu("A100"))
    async def embed(x): ...

    assert sent_to(embed) == "gpu.A100.embed"


def test_a_queue_of_the_call_or_of_task_routes_wins(app) -> None:
    @app.remote
    async def embed(x): ...

    assert sent_to(embed, queue="vip") == "vip"
    app.celery.conf.task_routes = {embed.name: {"queue": "routed"}}
    app.celery.amqp.flush_routes()
    del app.celery.amqp.router
    assert sent_to(embed) == "routed"


def test_a_task_in_a_process_that_has_not_loaded_it_says_where_to_send_it(app) -> None:
    @app.remote(gpu=gw.Gpu("A100"))
    async def embed(): ...

    delivered = {"id": "1", "hostname": "gpu1", "delivery_info": {"routing_key": "celery"}}
    build_tracer(embed.name, embed, app=app.celery)("1", (), {}, delivered)

    with pytest.raises(gw.NotServedError) as caught:
        embed.AsyncResult("1").get()
    said = str(caught.value)
    assert "embed[1] reached gpu1 by the queue 'celery'" in said
    assert "send it to 'gpu.A100.embed' and start a worker with -Q gpu.A100" in said


def test_an_app_without_a_celery_app_binds_to_the_current_one() -> None:
    app = gw.App("lazy")

    @app.remote
    async def bound_lazily(x):
        return x + 1

    current = Celery("now", broker="memory://", set_as_current=False)
    before = celery._state._tls.current_app
    current.set_current()
    try:
        assert bound_lazily.app is current
        assert app.celery is not None
        with testing.in_process(app):
            assert bound_lazily.remote(1) == 2
    finally:
        celery._state._tls.current_app = before


def test_a_lazily_bound_task_is_called_from_a_body() -> None:
    app = gw.App("lazy too")

    @app.remote
    async def inner_lazily(x):
        return x + 1

    @app.remote
    async def outer_lazily(x):
        return await inner_lazily(x), inner_lazily.delay(x).result

    current = Celery("now too", broker="memory://", set_as_current=False)
    before = celery._state._tls.current_app
    current.set_current()
    try:
        with testing.in_process(app):
            assert outer_lazily.remote(1) == (2, 2)
    finally:
        celery._state._tls.current_app = before


def test_a_base_class_of_the_users_keeps_its_methods() -> None:
    made = Celery("based", broker="memory://", set_as_current=False, task_cls=f"{__name__}:Audited")

    @gw.App("based", celery=made).remote
    async def body(): ...

    assert isinstance(body, Audited)
    assert body.audit() == f"audited {body.name}"


class Audited(celery.Task):
    def audit(self) -> str:
        return f"audited {self.name}"


def test_retry_of_a_task_is_not_mistaken_for_an_answer(app, serve) -> None:
    @app.remote(bind=True)
    async def retried(self):
        raise self.retry(countdown=0, max_retries=0)

    serve()
    with pytest.raises((Retry, celery.exceptions.MaxRetriesExceededError)):
        retried.delay().get()
