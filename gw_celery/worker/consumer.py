"""Celery's consumer in the worker's parent, protected against messages that would end workers.

It also bounds decompression, and sends acknowledgements while a worker stops.
"""

from __future__ import annotations

import bz2
import functools
import logging
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from celery.app.task import Context
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request
from kombu import compression
from kombu.message import Message

from gw_celery import conf, errors
from gw_celery.transport import transport

logger = logging.getLogger(__name__)

#: Memory in bytes that an LZMA header may request; the strongest preset needs half of it.
_LZMA_MEMORY = 128 * 1024 * 1024
_BOUNDED: dict[str, Callable[[], Any]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": functools.partial(lzma.LZMADecompressor, memlimit=_LZMA_MEMORY),
}
#: kombu's optional methods, for which no bound can be set.
_REFUSED = ("application/x-brotli", "application/zstd")
_ACKNOWLEDGEMENTS = ("ack_log_error", "reject_log_error")


def _check(message: Any, largest: int) -> None:
    """Refuse a body that is too large to decode, or is not a call.

    In a child, such a body would look like the loss of a worker.
    """
    size = len(message.body or b"")
    if size > largest:
        raise errors.MessageTooLarge(size, largest)
    try:
        args, kwargs, embed = message.payload
    except Exception:
        # Celery's own handler reports such a body, and knows the versions of its protocol.
        return
    if isinstance(message.payload, list | tuple) and not (
        isinstance(args, list | tuple)
        and isinstance(kwargs, dict)
        and isinstance(embed, dict | None)
    ):
        raise errors.UnreadableMessage(
            f"the body is {message.payload!r:.200}: a call is [arguments, keyword arguments, "
            "options], a list and two mappings; correct what sends it"
        )


class Consumer(CeleryConsumer):
    """Rejects messages that Celery cannot read, and passes control commands on to the gate.

    Only workers with the GPU pool use it.
    """

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        connected = self.ensure_connected(transport.use(connection))
        # Process the reports that arrived during the outage before the new connection is used.
        self.pool.poll()
        return connected

    def ensure_connected(self, conn: Any) -> Any:
        # This retries while the broker is unreachable, and blocks the loop meanwhile.
        with self.pool.health.connecting():
            return super().ensure_connected(conn)

    def _update_prefetch_count(self, index: int = 0) -> None:
        """Do nothing: the gate sets the prefetch count from the READY slots."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **kwargs)
        largest = conf.read(self.app.conf).max_payload_bytes

        def guarded(message: Any) -> None:
            try:
                _check(message, largest)
                handle(message)
            except (*self.connection_errors, MemoryError):
                raise
            except Exception as exc:
                # Otherwise the exception would end this worker, and then the next one that gets the
                # message.
                self._reject(message, exc)

        return guarded

    def _reject(self, message: Any, exc: Exception) -> None:
        headers = message.headers if isinstance(message.headers, dict) else {}
        logger.critical(
            "the unreadable message of task %s[%s] is rejected: %r; its first bytes: %r",
            *(headers.get("task"), headers.get("id"), exc, (message.body or b"")[:200]),
            exc_info=exc,
        )
        if not message.acknowledged:
            message.reject_log_error(logger, self.connection_errors)
        self._fail(message, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        if isinstance(exc, errors.UnreadableMessage):  # refused during decompression
            self._reject(message, exc)
            return
        super().on_decode_error(message, exc)
        self._fail(message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        super().on_invalid_task(body, message, exc)
        self._fail(message, exc)

    def _fail(self, message: Any, exc: Exception) -> None:
        """Store the failure of a message that has an id, because a caller may wait for it."""
        headers = message.headers
        if not isinstance(headers, dict) or not isinstance(headers.get("id"), str):
            return
        request = Context(
            {"id": headers["id"], "task": headers.get("task"), "errbacks": None, "chord": None}
        )
        request.reply_to = message.properties.get("reply_to")
        request.correlation_id = message.properties.get("correlation_id")
        try:
            self.app.backend.mark_as_failure(headers["id"], exc, request=request)
        except Exception:
            logger.exception(
                "the failure of task %s[%s] could not be stored: %s",
                *(request.task, request.id, exc),
            )

    def cancel_active_requests(self) -> None:
        """Update the active requests at a cold shutdown, before Celery cancels them.

        It releases waiting inputs first: otherwise they would start in free slots, then be stopped.
        """
        self.pool.flush()
        self.pool.poll()
        super().cancel_active_requests()

    def add_task_queue(self, queue: str, *args: Any, **options: Any) -> None:
        super().add_task_queue(queue, *args, **options)
        self.pool.gate.add(queue)

    def cancel_task_queue(self, queue: str) -> None:
        super().cancel_task_queue(queue)
        self.pool.gate.remove(queue)


class ServingRequest(Request):
    """Celery's request of a task of ours, on all pools."""

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return what ``inspect`` shows, and so Flower: arguments only with ``show_values``."""
        shown: dict[str, Any] = super().info(safe or not conf.read(self.app.conf).show_values)
        return shown


def bound_compression(largest: int) -> None:
    """Make this process refuse bodies that decompress to more than ``largest`` bytes.

    kombu decompresses a message before we can check it, with the decoders of a registry. A
    project's methods for other content types stay unchanged.
    """
    for content_type in compression.encoders():
        encoder, _ = compression.get_encoder(content_type)
        if content_type in _BOUNDED:
            decoder = functools.partial(_decompress, _BOUNDED[content_type], largest)
            compression.register(encoder, decoder, content_type)
        elif content_type in _REFUSED:
            decoder = functools.partial(_refuse, content_type)
            compression.register(encoder, decoder, content_type)


def _decompress(make: Callable[[], Any], largest: int, body: bytes) -> bytes:
    decompressor = make()
    data: bytes = decompressor.decompress(body, largest + 1)
    if len(data) > largest:
        raise errors.MessageTooLarge(f"over {largest}", largest)
    if not decompressor.eof:
        raise errors.UnreadableMessage(
            f"a compressed body of {len(body)} bytes is cut off: send it again"
        )
    return data


def _refuse(content_type: str, body: bytes) -> bytes:
    raise errors.UnreadableMessage(
        f"the body is compressed as {content_type}, whose size cannot be bounded: send it with "
        f"compression='gzip', 'bzip2' or 'lzma'"
    )


def run_meanwhile(hub: Any) -> None:
    """Run the due timers and the queued acknowledgements of ``hub``, and nothing else.

    The event loop stands still while a stopping worker waits for its pool. Without timers, AMQP
    would close the connection. Without acknowledgements, finished inputs would be delivered again.
    Other callbacks, such as the transport's reader, would pass messages to a closed pool.

    Source of the rule: the prefork pool of Celery 5.7.
    """
    try:
        hub.fire_timers()
        for callback in list(hub._ready):
            if _is_acknowledgement(callback):
                hub._ready.discard(callback)
                try:
                    callback()
                except Exception:
                    logger.warning(
                        "an acknowledgement failed: its input may be delivered again", exc_info=True
                    )
    except Exception:
        logger.warning("the event loop's timers failed while the worker stops", exc_info=True)


def _is_acknowledgement(callback: Any) -> bool:
    fun = getattr(callback, "fun", None)
    if getattr(fun, "is_acknowledgement", False):
        return True
    owner = getattr(fun, "__self__", None)
    return isinstance(owner, Message) and getattr(fun, "__name__", "") in _ACKNOWLEDGEMENTS
