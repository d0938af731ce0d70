from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis.exceptions

from gw_celery.replica import result_backends
from gw_celery.runtime import greenlet_bridge
from gw_celery.transport import find, result_writer
from tests.unit.runtime.tracers import Free, Reports, run

LOST = redis.exceptions.ConnectionError("gone")


class Server:
    """A client whose pipelines wait to be let through, and can be lost or refused."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.groups: list[list[tuple[Any, ...]]] = []
        self.values: dict[str, Any] = {}
        self.refused: dict[str, Exception] = {}
        self.losses: list[Exception] = []
        self.pings = 0
        self.is_asked = asyncio.Event()
        self.gate = asyncio.Event()
        if is_open:
            self.gate.set()

    def pipeline(self, *, transaction: bool) -> Pipeline:
        assert not transaction
        return Pipeline(self)

    async def ping(self) -> None:
        self.pings += 1
        if self.losses:
            raise self.losses.pop(0)


class Pipeline:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.commands: list[tuple[Any, ...]] = []

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def get(self, key: str) -> None:
        self.commands.append(("get", key))

    def set(self, key: str, value: Any, ex: Any) -> None:
        self.commands.append(("set", key, value, ex))

    def publish(self, key: str, value: Any) -> None:
        self.commands.append(("publish", key, value))

    def hset(self, key: str, field: str, value: Any) -> None:
        self.commands.append(("hset", key, field, value))

    def hdel(self, key: str, field: str) -> None:
        self.commands.append(("hdel", key, field))

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        assert not raise_on_error
        self.server.groups.append(self.commands)
        self.server.is_asked.set()
        await self.server.gate.wait()
        if self.server.losses:
            raise self.server.losses.pop(0)
        return [self.answer(*one) for one in self.commands]

    def answer(self, name: str, key: str, *rest: Any) -> Any:
        if key in self.server.refused:
            return self.server.refused[key]
        if name == "set":
            self.server.values[key] = rest[0]
            return True
        return self.server.values.get(key) if name == "get" else 1


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_writer, "_PAUSE", 0.0)


async def settled(*runs: Any) -> list[Any]:
    return await asyncio.gather(*runs, return_exceptions=True)


def names(groups: list[list[tuple[Any, ...]]]) -> list[list[str]]:
    return [[one[1] for one in group if one[0] != "publish"] for group in groups]


def test_a_result_is_stored_and_those_who_wait_for_it_are_told() -> None:
    async def act() -> Server:
        server = Server()
        assert await result_writer.Writer(server, 5).run("set", "key", b"value", 60) is True
        return server

    assert run(act).groups == [[("set", "key", b"value", 60), ("publish", "key", b"value")]]


def test_records_travel_with_results() -> None:
    async def act() -> Server:
        server = Server()
        writer = result_writer.Writer(server, 5)
        commands = [("hset", "h", "1", b"r"), ("set", "key", b"value", 60), ("hdel", "h", "1")]
        assert await settled(*(writer.run(*one) for one in commands)) == [1, True, 1]
        return server

    (group,) = run(act).groups
    assert [one[0] for one in group] == ["hset", "set", "publish", "hdel"]


@pytest.mark.parametrize("lifetime", [0, None])
def test_a_result_without_a_lifetime_is_kept_for_ever(lifetime: int | None) -> None:
    async def act() -> Server:
        server = Server()
        await result_writer.Writer(server, 5).run("set", "key", b"value", lifetime)
        return server

    assert run(act).groups[0][0] == ("set", "key", b"value", None)


def test_what_is_ready_while_a_group_is_on_its_way_goes_together_and_in_order() -> None:
    async def act() -> Server:
        server = Server(is_open=False)
        writer = result_writer.Writer(server, 5)
        runs = [asyncio.create_task(writer.run("set", "first", 0, 1))]
        await server.is_asked.wait()
        runs += [asyncio.create_task(writer.run("set", f"key {n}", n, 1)) for n in range(20)]
        runs.append(asyncio.create_task(writer.run("get", "key 7")))
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(server.groups) == 1
        server.gate.set()
        assert await settled(*runs) == [True] * 21 + [7]
        return server

    groups = run(act).groups
    assert names(groups) == [["first"], [*(f"key {n}" for n in range(20)), "key 7"]]


def test_one_alone_does_not_wait_for_company() -> None:
    async def act() -> Server:
        server = Server()
        writer = result_writer.Writer(server, 5)
        for n in range(3):
            await writer.run("set", f"key {n}", n, 1)
        return server

    assert names(run(act).groups) == [["key 0"], ["key 1"], ["key 2"]]


def test_each_gets_the_answer_to_its_own_command() -> None:
    async def act() -> list[Any]:
        server = Server()
        server.values = {"a": b"A", "b": b"B"}
        writer = result_writer.Writer(server, 5)
        return await settled(
            writer.run("get", "a"),
            writer.run("set", "c", b"C", 1),
            writer.run("get", "b"),
            writer.run("get", "nothing"),
            writer.run("get", "c"),
        )

    assert run(act) == [b"A", True, b"B", None, b"C"]


def test_a_refused_command_fails_the_one_that_waits_for_it() -> None:
    refusal = redis.exceptions.ResponseError("WRONGTYPE")

    async def act() -> list[Any]:
        server = Server()
        server.refused = {"bad": refusal}
        writer = result_writer.Writer(server, 5)
        return await settled(
            writer.run("set", "good", 1, 1),
            writer.run("set", "bad", 1, 1),
            writer.run("get", "good"),
        )

    assert run(act) == [True, refusal, 1]


@pytest.mark.parametrize(
    "lost", [LOST, redis.exceptions.TimeoutError("silent"), ConnectionResetError(), OSError()]
)
def test_a_group_is_sent_again_while_the_server_is_away(lost: Exception) -> None:
    async def act() -> tuple[Server, list[Any]]:
        server = Server()
        server.losses = [lost] * 3
        writer = result_writer.Writer(server, 5)
        return server, await settled(writer.run("set", "a", 1, 1), writer.run("get", "a"))

    server, answers = run(act)
    assert answers == [True, 1]
    assert names(server.groups) == [["a", "a"]] * 4


def test_a_server_that_stays_away_fails_everyone_after_the_limit() -> None:
    async def act() -> tuple[Server, list[Any]]:
        server = Server()
        server.losses = [LOST] * 100
        writer = result_writer.Writer(server, 0)
        return server, await settled(writer.run("set", "a", 1, 1), writer.run("get", "b"))

    server, answers = run(act)
    assert answers == [LOST, LOST]
    assert len(server.groups) == 1


def test_the_limit_is_of_time_and_not_of_attempts() -> None:
    async def act() -> tuple[Server, list[Any], float]:
        server = Server()
        server.losses = [LOST] * 1_000_000
        began = asyncio.get_running_loop().time()
        answers = await settled(result_writer.Writer(server, 0.05).run("get", "a"))
        return server, answers, asyncio.get_running_loop().time() - began

    server, answers, took = run(act)
    assert answers == [LOST]
    assert len(server.groups) > 1
    assert took >= 0.05


def test_an_error_that_is_no_loss_is_not_tried_again() -> None:
    wrong = redis.exceptions.DataError("wrong")

    async def act() -> tuple[Server, list[Any]]:
        server = Server()
        server.losses = [wrong]
        return server, await settled(result_writer.Writer(server, 5).run("get", "a"))

    server, answers = run(act)
    assert answers == [wrong]
    assert len(server.groups) == 1


def test_results_are_written_again_when_the_server_is_back() -> None:
    async def act() -> list[Any]:
        server = Server()
        server.losses = [LOST]
        writer = result_writer.Writer(server, 0)
        failed = await settled(writer.run("set", "a", 1, 1))
        return failed + await settled(writer.run("set", "a", 2, 1), writer.run("get", "a"))

    assert run(act) == [LOST, True, 2]


# -- outages --


class Outages(list[str]):
    """What a writer told, and an event for the end of an outage."""

    def __init__(self) -> None:
        self.is_over = asyncio.Event()

    def __call__(self, reason: str) -> None:
        self.append(reason)
        if not reason:
            self.is_over.set()


async def outages_of(losses: list[Exception], store_timeout: float) -> tuple[Outages, Server]:
    """One result is stored, with these losses on the way, until the server is back."""
    server, told = Server(), Outages()
    server.losses = losses
    writer = result_writer.Writer(server, store_timeout, on_outage=told)
    await settled(writer.run("set", "a", 1, 1))
    if told:
        await asyncio.wait_for(told.is_over.wait(), 5)
    return told, server


def test_an_outage_is_told_when_it_begins_and_when_a_write_gets_through() -> None:
    told, server = run(lambda: outages_of([LOST, OSError("other"), LOST], 5))
    assert told == ["ConnectionError: gone", ""]
    assert server.groups[-1][0][0] == "set"


def test_without_an_outage_nothing_is_told_or_asked() -> None:
    told, server = run(lambda: outages_of([], 5))
    assert told == []
    assert (len(server.groups), server.pings) == (1, 0)


def test_an_outage_in_which_all_was_given_up_ends_when_the_server_answers() -> None:
    told, server = run(lambda: outages_of([LOST] * 4, 0))
    assert told == ["ConnectionError: gone", ""]
    assert (len(server.groups), server.pings) == (1, 4)


def test_a_server_that_refuses_the_question_is_back() -> None:
    refusal = redis.exceptions.ResponseError("NOPERM")
    told, _ = run(lambda: outages_of([LOST, refusal], 0))
    assert told == ["ConnectionError: gone", ""]


def test_what_comes_in_an_outage_is_written_and_ends_it() -> None:
    async def act() -> tuple[list[Any], Outages]:
        server, told = Server(), Outages()
        server.losses = [LOST] * 1_000_000
        writer = result_writer.Writer(server, 0, on_outage=told)
        lost = [*await settled(writer.run("set", "a", 1, 1), writer.run("set", "b", 1, 1))]
        lost += await settled(writer.run("set", "c", 1, 1))
        server.losses.clear()
        return [*lost, await writer.run("set", "d", 1, 1)], told

    answers, told = run(act)
    assert answers == [LOST, LOST, LOST, True]
    assert told == ["ConnectionError: gone", ""]


def test_a_caller_that_waits_no_more_disturbs_no_other() -> None:
    async def act() -> list[Any]:
        server = Server(is_open=False)
        writer = result_writer.Writer(server, 5)
        gone = asyncio.create_task(writer.run("set", "gone", 1, 1))
        stays = asyncio.create_task(writer.run("set", "stays", 2, 1))
        await server.is_asked.wait()
        late = asyncio.create_task(writer.run("get", "stays"))
        await asyncio.sleep(0)
        gone.cancel()
        await settled(gone)
        server.gate.set()
        return await settled(stays, late)

    assert run(act) == [True, 2]


def test_what_is_read_waits_a_moment_for_company_and_then_goes_together() -> None:
    async def act(others_in_flight: bool) -> list[list[str]]:
        server = Server()
        writer = result_writer.Writer(server, 5, lambda: others_in_flight)
        first = asyncio.create_task(writer.run("get", "a"))
        await asyncio.sleep(0)  # its group would be on its way now
        await asyncio.sleep(0)
        await settled(first, writer.run("get", "b"))
        return names(server.groups)

    assert run(lambda: act(True)) == [["a", "b"]]
    assert run(lambda: act(False)) == [["a"], ["b"]]


def test_each_backend_has_one_client_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def client_of(backend: Any, **_: Any) -> Server:
        made.append(backend)
        return Server()

    def reads(backend: Any) -> Any:
        return greenlet_bridge.step(lambda: backend.get("key"), Free())

    async def act() -> None:
        for _ in range(2):
            await settled(reads(one), reads(other))

    monkeypatch.setattr(find, "async_client", client_of)
    backend = result_backends.grouped(object, 5, Reports())
    one, other = backend(), backend()
    run(act)
    assert made == [one, other]
