"""End the broker connections of a process that ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from kombu import exceptions, pools

logger = logging.getLogger(__name__)


async def close_all(timeout: float) -> None:
    """Close what tasks and results were published over; wait ``timeout`` seconds at most.

    RabbitMQ may drop what came last over a connection that is cut: closing waits for its answer,
    which comes after everything was taken. A pool's own ``force_close_all`` only cuts.
    """
    try:
        async with asyncio.timeout(timeout):
            await asyncio.to_thread(_close_all)
    except TimeoutError:
        logger.warning("the broker did not answer the end of a connection in %.0f s", timeout)
    except Exception as exc:
        logger.warning("a connection to the broker could not be closed: %r", exc)


def _close_all() -> None:
    for pool in list(pools.connections.values()):
        taken: list[Any] = []
        with contextlib.suppress(exceptions.LimitExceeded):
            taken.extend(pool.acquire(block=False) for _ in range(pool.limit or 0))
        for one in taken:
            if one.connected:
                one.close()
            one.release()
