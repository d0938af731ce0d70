"""What tests of the pool's inputs share: a child that is written by hand, and its pool."""

from __future__ import annotations

import pytest

from tests.unit.pool.handmade import Child, Pool


@pytest.fixture
def child() -> Child:
    return Child()


@pytest.fixture
def pool(child: Child) -> Pool:
    return Pool(child)
