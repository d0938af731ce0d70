"""Puts what the pool gives up on the dead-letter queue, in a thread: a broker that is away blocks.

The failure is stored and the message answered whatever becomes of the letter.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any

from gw_celery import conf
from gw_celery.pool import dead_letter_message, dead_queue, request

logger = logging.getLogger(__name__)

#: Letters that may wait for the broker.
_LONGEST_QUEUE = 100
#: Seconds that the end of a worker waits for them.
_FAREWELL = 2.0
#: Seconds between two tries.
_PAUSE = 1.0


class DeadLetters:
    """The letters of one worker; the thread starts with the first one.

    Args:
        app: the Celery app.
        name: the dead-letter queue.
        most: letters that it holds at most.
        patience: seconds that a letter is tried to be written while the broker is away.
        hostname: the worker's node name.
    """

    def __init__(self, app: Any, name: str, most: int, patience: float, hostname: str) -> None:
        self._app = app
        self._name = name
        self._most = most
        self._patience = patience
        self._hostname = hostname
        self._letters: queue.Queue[dead_letter_message.Letter | None] = queue.Queue(_LONGEST_QUEUE)
        #: What the thread is writing.
        self._at_hand: dead_letter_message.Letter | None = None
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()

    def bury(self, job: request.Job, reason: str, deaths: int) -> None:
        """Take the message of an input that is given up; it is written soon."""
        if job.message is None:
            return
        since = self._app.now().isoformat(timespec="seconds")
        try:
            letter = dead_letter_message.bury(
                job.message,
                dead_letter_message.Death(
                    reason=reason, since=since, worker=self._hostname, deaths=deaths
                ),
            )
            self._letters.put_nowait(letter)
        except queue.Full:
            logger.error(
                "task %s[%s] has no dead letter: %d others wait for the broker, which is away",
                job.name,
                job.task_id,
                _LONGEST_QUEUE,
            )
        except Exception:  # a message that cannot be read again must not cost the worker's loop
            logger.exception("task %s[%s] has no dead letter", job.name, job.task_id)
        else:
            self._start()

    def close(self) -> None:
        """End the thread; what cannot be written at once is named in the log."""
        if self._thread is None:
            return
        self._is_over.set()
        with contextlib.suppress(queue.Full):  # then it looks at the event after the next letter
            self._letters.put_nowait(None)
        self._thread.join(_FAREWELL)
        for letter in self._left():
            _log_lost(letter, "the worker ends and the broker is away")

    def _left(self) -> Iterator[dead_letter_message.Letter]:
        if self._at_hand is not None:
            yield self._at_hand
        with contextlib.suppress(queue.Empty):
            while True:
                if (letter := self._letters.get_nowait()) is not None:
                    yield letter

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gw-dead-letters", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (letter := self._letters.get()) is not None:
            self._at_hand = letter
            try:
                self._say(letter, is_added=self._add(letter))
            except Exception as exc:
                _log_lost(letter, repr(exc))
            self._at_hand = None
            if self._is_over.is_set() and self._letters.empty():
                return

    def _add(self, letter: dead_letter_message.Letter) -> bool:
        """Try until the broker has it, has no room for it, or has been away for too long."""
        end = request.now() + self._patience
        while True:
            try:
                # A connection of its own, for letters are rare.
                with dead_queue.connect(self._app) as connection:
                    room = dead_queue.of(self._app, connection, self._name, self._most)
                    return room.add(letter)
            except Exception as exc:
                logger.warning("the letter of task %s waits: %r", letter.task_id, exc)
                if request.now() >= end or self._is_over.wait(_PAUSE):
                    raise

    def _say(self, letter: dead_letter_message.Letter, *, is_added: bool) -> None:
        if is_added:
            logger.warning(
                "task %s[%s] lies in the queue %s: look at it with `celery gw dead`, send it again "
                "with `celery gw dead --requeue %s`",
                letter.task,
                letter.task_id,
                self._name,
                letter.task_id,
            )
        else:
            logger.error(
                "task %s[%s] has no dead letter: the queue %s is full with %d (setting "
                "gw_max_dead_letters); send some again with `celery gw dead --requeue ID`, or "
                "delete all with `celery amqp queue.purge %s`",
                letter.task,
                letter.task_id,
                self._name,
                self._most,
                self._name,
            )


def of(app: Any, settings: conf.Settings, hostname: str) -> DeadLetters | None:
    """Return the letters of a worker; None where the settings switch them off."""
    name = settings.dead_letter_queue
    if not name:
        return None
    return DeadLetters(app, name, settings.max_dead_letters, settings.store_timeout, hostname)


def _log_lost(letter: dead_letter_message.Letter, why: str) -> None:
    logger.error("task %s[%s] has no dead letter: %s", letter.task, letter.task_id, why)
