"""What drives a pool: the worker's event loop, or a thread where the transport has none."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from celery.worker import state
from kombu.asynchronous import Hub, get_event_loop
from kombu.asynchronous.timer import Entry

from gw_celery.pool import request
from gw_celery.worker import consumer

if TYPE_CHECKING:
    from gw_celery.pool import taskpool

logger = logging.getLogger(__name__)

_TICK = 1.0


@contextlib.contextmanager
def _surviving() -> Iterator[None]:
    """One failure of ours must not leave the worker's loop, which would end the worker."""
    try:
        yield
    except Exception:
        logger.exception("the pool failed once and goes on")


class Driver:
    """Calls a pool and its supervisor whenever they have something to do.

    Args:
        pool: what is driven; everything of it is called in one thread.
    """

    def __init__(self, pool: taskpool.TaskPool) -> None:
        self._pool = pool
        self._driven = pool.supervisor
        self._hub: Hub | None = None
        self._tick_timer: Entry | None = None
        self._limit_timer: Entry | None = None
        self._limit_due = 0.0
        #: How many revocations this worker knew when it last looked.
        self._revoked = 0
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()

    def start(self) -> None:
        """Have a thread do it where there is no loop; else ``attach`` follows."""
        if get_event_loop() is None:
            self._thread = threading.Thread(target=self._run, name="gw-pool", daemon=True)
            self._thread.start()

    def attach(self, hub: Hub) -> None:
        """A consumer starts, and the hub has forgotten us."""
        self._hub = hub
        hub.add_reader(self._driven.fileno(), self._on_readable)
        # A revocation comes between two turns of the hub.
        hub.on_tick.add(self._withdraw)
        # Celery 5.7 has cancelled our timers when the connection was lost, 5.6 all timers.
        for timer in (self._tick_timer, self._limit_timer):
            if timer is not None:
                timer.cancel()
        self._tick_timer = hub.call_repeatedly(_TICK, self._on_tick)
        self._limit_timer = None
        self._arm()

    def poll(self) -> None:
        """Read what children have reported and judge limits, now, where no thread does."""
        if self._thread is None:
            self._driven.poll()

    def wait(self, is_done: Callable[[], bool], timeout: float) -> bool:
        """Drive until ``is_done()``: the hub does not run while a worker stops."""
        end = request.now() + timeout
        hub = get_event_loop()
        while not is_done() and request.now() < end:
            if self._thread is not None:
                self._is_over.wait(0.02)
                continue
            self._driven.poll(0.1)
            self._driven.tick()
            if hub is not None:
                consumer.run_meanwhile(hub)
            self._pool.observe()
        self._pool.observe()
        return is_done()

    def end(self) -> None:
        """Stop the thread, and tell the hub nothing more."""
        self._is_over.set()
        self._driven.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)

    def detach(self) -> None:
        if self._hub is not None:
            self._hub.remove_reader(self._driven.fileno())

    def _on_readable(self) -> None:
        with _surviving():
            self._driven.poll()
        self._arm()

    def _withdraw(self) -> None:
        """Take revoked inputs out of the batches that they wait for, before those begin."""
        if len(state.revoked) != self._revoked:
            self._revoked = len(state.revoked)
            self._driven.withdraw()

    def _on_tick(self) -> None:
        self._step()
        self._arm()

    def _arm(self) -> None:
        """Have the hub call us at the next limit, which may be before the next tick."""
        wait = self._driven.next_deadline()
        if self._hub is None or wait is None or wait >= _TICK:
            return
        due = request.now() + wait
        if self._limit_timer is not None:
            if due >= self._limit_due:
                return
            self._limit_timer.cancel()
        self._limit_due = due
        self._limit_timer = self._hub.call_later(wait, self._on_limit)

    def _on_limit(self) -> None:
        self._limit_timer = None
        self._on_readable()

    def _run(self) -> None:
        """The loop of transports that have none."""
        while not self.is_over:
            wait = self._driven.next_deadline()
            self._step(_TICK if wait is None else min(_TICK, wait))

    def _step(self, timeout: float = 0.0) -> None:
        with _surviving():
            self._driven.poll(timeout)
            self._driven.withdraw()
            self._driven.tick()
            self._pool.observe()
