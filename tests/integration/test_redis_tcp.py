"""Calls over a Redis that somebody else runs, on its standard port."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ledger
import pytest

from tests import processes

pytestmark = pytest.mark.integration


@pytest.fixture
def urls(
    redis_tcp_urls: tuple[str, str], ledger_path: Path, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """A worker on that Redis; what a client of it finds in its environment."""
    broker, result = redis_tcp_urls
    env = {"LEDGER": str(ledger_path)}
    with processes.workers(tmp_path, broker, result) as start_worker:
        start_worker("served:celery", pool="prefork", concurrency=4, env=env)
        yield {"CELERY_BROKER_URL": broker, "CELERY_RESULT_BACKEND": result, **env}


def answer(what: str, urls: dict[str, str], tmp_path: Path) -> Any:
    command = [sys.executable, "-m", "ask", what]
    client = processes.Process(command, tmp_path / f"{what}.log", env=urls)
    assert client.wait_exit(60) == 0, client.log_text()
    return json.loads(client.log_text().splitlines()[-1])


def test_calls_are_answered_and_revoked(
    urls: dict[str, str], ledger_path: Path, tmp_path: Path
) -> None:
    answers = answer("everything", urls, tmp_path)
    assert answers["delay"] == 9
    assert answers["awaited"] == [x * x for x in range(20)]
    assert answers["spawned"] == [x * x for x in range(5)]
    assert answer("revoked", urls, tmp_path) == "REVOKED"
    assert ["late"] not in [line[2:] for line in ledger.words(ledger_path, "began")]
