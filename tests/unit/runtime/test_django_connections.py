from __future__ import annotations

import asyncio
import types
from typing import Any

import pytest

from gw_celery.runtime import django_connections


class Cleaner:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def close_database(self) -> None:
        self.log.append("database")

    def close_cache(self) -> None:
        self.log.append("cache")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def around(log: list[str]) -> Any:
    """What surrounds work for an app with Django's fixup, and with one of another kind."""
    fixups = [types.SimpleNamespace(worker_fixup=Cleaner(log)), object()]
    return django_connections.around(types.SimpleNamespace(_fixups=fixups))


CLEANED = ["database", "cache"]


def test_connections_are_cleaned_before_and_after_the_work(around: Any, log: list[str]) -> None:
    assert around(lambda *args, **kwargs: log.append("work") or (args, kwargs), 1, a=2) == (
        (1,),
        {"a": 2},
    )
    assert log == [*CLEANED, "work", *CLEANED]


def test_connections_are_cleaned_after_work_that_failed(around: Any, log: list[str]) -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        around(fail)
    assert log == CLEANED * 2


def test_without_django_the_work_is_called_as_it_is() -> None:
    around = django_connections.around(types.SimpleNamespace(_fixups=[]))
    assert around(lambda *args, **kwargs: (args, kwargs), 1, a=2) == ((1,), {"a": 2})


@pytest.fixture
def close_outdated(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> Any:
    """The connections of a Django project, whose clock stands at 100 s."""

    def by_name(name: str) -> Any:
        async def clean() -> None:
            log.append("old connections")

        return (lambda fn: clean) if "sync_to_async" in name else object()

    monkeypatch.setattr(django_connections, "symbol_by_name", by_name)
    monkeypatch.setattr(django_connections.time, "monotonic", lambda: 100.0)
    fixups = [types.SimpleNamespace(worker_fixup=Cleaner(log))]
    return django_connections.closing_outdated(types.SimpleNamespace(_fixups=fixups))


def test_connections_of_asynchronous_bodies_are_looked_at_once_a_second(
    close_outdated: Any, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(close_outdated())
    asyncio.run(close_outdated())
    assert log == ["old connections"]
    monkeypatch.setattr(django_connections.time, "monotonic", lambda: 101.0)
    asyncio.run(close_outdated())
    assert log == ["old connections"] * 2


def test_without_django_asynchronous_bodies_have_no_connections_to_look_at() -> None:
    assert django_connections.closing_outdated(types.SimpleNamespace(_fixups=[])) is None
