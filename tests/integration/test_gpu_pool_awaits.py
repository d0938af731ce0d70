"""A body on the GPU pool that waits for other tasks is told of their answers."""

from __future__ import annotations

import awaiting
import pytest

from tests import pooling
from tests.processes import StartWorker

pytestmark = pytest.mark.integration


@pytest.mark.usefixtures("redis_url")
def test_a_body_hears_of_an_answer_when_it_is_stored(start_worker: StartWorker) -> None:
    worker = start_worker("awaiting:celery")
    pooling.wait_loaded(worker)
    assert awaiting.ask.delay(5).get(timeout=20) == [5, 6, 7]
