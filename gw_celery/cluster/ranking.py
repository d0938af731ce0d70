"""How quick this worker is beside the others, on a broker that gives the quicker ones more.

The others' scores come as a control command, on the thread of the worker's loop; its own are told
by a thread, because a broker that is away blocks.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from kombu.messaging import Producer

from gw_celery.cluster import claims
from gw_celery.policy import speed_bands
from gw_celery.pool import request
from gw_celery.transport import broker

logger = logging.getLogger(__name__)

#: The control command by which workers tell each other scores.
COMMAND = "gw_best_score"
#: Things to say that may wait for the broker.
_LONGEST_QUEUE = 10
#: Seconds that the end of a worker waits for the thread.
_FAREWELL = 2.0


class Ranking:
    """The bands of one worker, one for each service that it serves.

    Args:
        app: the Celery app.
        hostname: the worker's node name.
        services: the keys of its services.
    """

    def __init__(self, app: Any, hostname: str, services: Iterable[str]) -> None:
        self._places = {service: speed_bands.Place() for service in services}
        self._claims = claims.Claims(hostname, self._places, random.random)
        self._crier = Crier(app, hostname)

    def tick(self, scores: Mapping[str, float | None]) -> bool:
        """Follow this worker's own scores; whether a band has changed. Once a second."""
        now = request.now()
        if news := self._claims.due(scores, now):
            self._crier.say(news)
        changed = [
            service
            for service, place in self._places.items()
            if place.follow(scores.get(service), self._claims.best(service), now)
        ]
        for service in changed:
            band = self._places[service].band.name.lower()
            logger.info("%s: this worker is %s beside the others", service, band)
        return bool(changed)

    def hear(self, worker: str, scores: Mapping[str, float]) -> None:
        """Take in what another worker has told."""
        self._claims.hear(worker, scores, request.now())

    def priority(self, service: str) -> int:
        """The priority with which its queue is consumed; 0, that of all others, without a band."""
        place = self._places.get(service)
        return 0 if place is None else int(place.band)

    def bands(self) -> dict[str, str]:
        """The band of each service, by its name."""
        return {service: place.band.name.lower() for service, place in self._places.items()}

    def close(self) -> None:
        self._crier.close()


class Crier:
    """Tells all workers of the broker this one's scores; the thread starts with the first."""

    def __init__(self, app: Any, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._news: queue.Queue[dict[str, float] | None] = queue.Queue(_LONGEST_QUEUE)
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()
        self._is_away = False

    def say(self, scores: dict[str, float]) -> None:
        """Have it told soon; what finds no room is told again at the next renewal."""
        with contextlib.suppress(queue.Full):
            self._news.put_nowait(scores)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gw-ranking", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread; what has not been told is of no use any more."""
        if self._thread is None:
            return
        self._is_over.set()
        with contextlib.suppress(queue.Full):  # then it sees the event after the next news
            self._news.put_nowait(None)
        self._thread.join(_FAREWELL)

    def _run(self) -> None:
        while (scores := self._news.get()) is not None and not self._is_over.is_set():
            try:
                self._tell(scores)
                self._is_away = False
            except Exception as exc:
                if not self._is_away:  # once for an outage
                    logger.warning("other workers are not told how quick this one is: %r", exc)
                self._is_away = True

    def _tell(self, scores: dict[str, float]) -> None:
        """Broadcast once: Celery's own ``broadcast`` would try for as long as the broker is away.

        A connection of its own, for there is seldom anything to tell.
        """
        message = {
            "method": COMMAND,
            "arguments": {"worker": self._hostname, "scores": scores},
            "destination": None,
        }
        with self._app.connection_for_write() as connection:
            connection.connect()  # else publishing would try to, for ever
            mailbox = self._app.control.mailbox(connection)
            Producer(connection, auto_declare=False).publish(
                message,
                exchange=mailbox.exchange.name,
                declare=[mailbox.exchange],
                serializer=mailbox.serializer or "json",
            )


def of(app: Any, hostname: str, services: Iterable[str]) -> Ranking | None:
    """Return the ranking of a worker.

    ``None`` where the broker has no priorities of consumers, or the worker cannot be told anything.
    """
    if not app.conf.worker_enable_remote_control:
        return None
    with app.connection_for_read() as connection:
        prefers = broker.has_priorities(connection)
    return Ranking(app, hostname, services) if prefers else None
