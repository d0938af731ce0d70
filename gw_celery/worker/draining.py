"""Keep a broker connection alive, and acknowledge, while a stopping worker waits for its pool.

The worker's event loop does not run then: without its timers AMQP would close the connection, and
without its queued acknowledgements a finished input would be delivered again.
"""

from __future__ import annotations

import logging
from typing import Any

from kombu.message import Message

logger = logging.getLogger(__name__)

_ACKNOWLEDGEMENTS = ("ack_log_error", "reject_log_error")


def run_meanwhile(hub: Any) -> None:
    """Fire due timers and queued acknowledgements of ``hub``, and nothing else of it.

    The source of the rule is Celery 5.7's own prefork pool: what else is queued, such as the
    transport's reader, would hand messages to a closed pool.
    """
    try:
        hub.fire_timers()
        _acknowledge(hub)
    except Exception:
        logger.warning("the event loop's timers failed while the pool drains", exc_info=True)


def _acknowledge(hub: Any) -> None:
    for callback in list(hub._ready):
        if _is_acknowledgement(callback):
            hub._ready.discard(callback)
            try:
                callback()
            except Exception:
                logger.warning("an acknowledgement failed", exc_info=True)


def _is_acknowledgement(callback: Any) -> bool:
    fun = getattr(callback, "fun", None)
    if getattr(fun, "is_acknowledgement", False):
        return True
    owner = getattr(fun, "__self__", None)
    return isinstance(owner, Message) and getattr(fun, "__name__", "") in _ACKNOWLEDGEMENTS
