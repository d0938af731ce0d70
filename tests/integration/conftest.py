"""Fixtures of the integration tests: a ledger that outlives the processes that write it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import served


@pytest.fixture
def ledger_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ledger"
    monkeypatch.setenv("LEDGER", str(path))
    return path


@pytest.fixture(autouse=True)
def fresh_connections(request: pytest.FixtureRequest) -> Iterator[None]:
    """Close what this process's Celery app holds to the servers of one test."""
    yield
    if "redis_url" in request.fixturenames:
        served.celery.close()
