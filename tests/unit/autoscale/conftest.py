"""What tests of the autoscaler share: one on a pool that is written by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.autoscale.handmade import Scaled


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scaled]:
    scaled = Scaled(monkeypatch)
    yield scaled
    scaled.app.close()
