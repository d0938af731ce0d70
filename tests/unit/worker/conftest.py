from __future__ import annotations

import pytest

from tests.unit.worker import starting


@pytest.fixture(autouse=True)
def _a_start_ends_with_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    starting.isolate(monkeypatch)
