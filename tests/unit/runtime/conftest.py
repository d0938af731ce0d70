"""What tests of a replica share."""

from __future__ import annotations

import pytest

from tests.unit.runtime.served import Model
from tests.unit.runtime.tracers import Around


@pytest.fixture
def around() -> Around:
    return Around()


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    Model.forget()
