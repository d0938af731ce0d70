"""Two workers of speed 1 and 4 share one queue: what each of them gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from benchmarks import shares
from tests import services
from tests.conftest import needed

pytestmark = [pytest.mark.integration, pytest.mark.one_celery]

#: Within 15 % of 1:4; over so many inputs that chance is a small part of that.
LEAST, MOST, INPUTS = 3.4, 4.6, 960


@pytest.fixture
def on_redis(redis_url: str, result_url: str, tmp_path: Path) -> Iterator[Celery]:
    with shares.pair(redis_url, result_url, tmp_path) as client:
        yield client


@pytest.fixture(params=["classic", "quorum"])
def on_rabbitmq(
    request: pytest.FixtureRequest, result_url: str, tmp_path: Path
) -> Iterator[Celery]:
    is_quorum = request.param == "quorum"
    # Queues of another type by the same names exist in the tests' virtual host.
    with (
        needed(services.rabbitmq_vhost()) as url,
        shares.pair(url, result_url, tmp_path, is_quorum=is_quorum) as client,
    ):
        shares.wait_ranked(client)
        yield client


def test_at_saturation_shares_follow_speed_by_pull(on_redis: Celery) -> None:
    assert LEAST < shares.saturated(on_redis, INPUTS).ratio < MOST


def test_rabbitmq_gives_the_quick_worker_nearly_all_at_half_load_and_its_share_at_saturation(
    on_rabbitmq: Celery,
) -> None:
    at_half = shares.half_load(on_rabbitmq, 160)
    assert at_half.quick > 0.8 * (at_half.quick + at_half.slow)
    assert LEAST < shares.saturated(on_rabbitmq, INPUTS).ratio < MOST
