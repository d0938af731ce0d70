"""Celery's consumer in the worker's parent, protected against messages that would end workers.

It also bounds decompression, and sends acknowledgements while a worker stops.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any

from celery.app.task import Context
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request
from kombu import compression
from kombu.common import ignore_errors
from kombu.message import Message

from gw_celery import conf, errors
from gw_celery.transport import find, refusals, transport
from gw_celery.worker import undecoded

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
#: Reply code with which RabbitMQ closes the channel of an unanswered message.
_PRECONDITION_FAILED = 406
#: Seconds before a message is given back that must not run.
_PAUSE = 1.0
_ACKNOWLEDGEMENTS = ("ack_log_error", "reject_log_error")


def _check(message: Any, largest: int) -> None:
    """Refuse a body that is too large to decode, or that Celery would have to decode here."""
    size = len(message.body or b"")
    if size > largest:
        raise errors.MessageTooLarge(size, largest)
    if not isinstance(message.headers, dict) or "task" not in message.headers:
        raise errors.UnreadableMessage(
            "its headers name no task: send it with task_protocol=2, Celery's default"
        )


class Consumer(CeleryConsumer):
    """Rejects messages that Celery cannot read, and passes control commands on to the gate.

    Only workers with the GPU pool use it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        loop: Callable[..., Any] = self.loop  # type: ignore[has-type]
        self.loop = functools.partial(self._run_loop, loop)

    def _run_loop(self, loop: Callable[..., Any], *args: Any) -> None:
        """Run Celery's loop; a channel closed by RabbitMQ's consumer_timeout ends no worker."""
        try:
            loop(*args)
        except self.channel_errors as exc:
            if getattr(exc, "code", None) != _PRECONDITION_FAILED or "timed out" not in str(exc):
                raise
            logger.error(
                "an input ran for over RabbitMQ's consumer_timeout, so that all inputs of this "
                "worker are delivered again and may run twice: set consumer_timeout over the "
                "longest time limit: %s",
                exc,
            )
            raise ConnectionResetError("RabbitMQ closed the channel") from exc

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        connected = self.ensure_connected(transport.use(connection, self.pool.cluster.holds))
        # Process the reports that arrived during the outage before the new connection is used.
        self.pool.poll()
        return connected

    def ensure_connected(self, conn: Any) -> Any:
        # This retries while the broker is unreachable, and blocks the loop meanwhile.
        self.pool.cluster.expect_no_turn()
        with self.pool.health.connecting():
            return super().ensure_connected(conn)

    def call_soon_ack(self, p: Any, *args: Any, **kwargs: Any) -> Any:
        """Acknowledge at once on a broker with holds: a lost connection drops what waits here.

        The transport writes the acknowledgement later, if need be over the next connection.
        """
        if self.pool.cluster.has_holds:
            return p(*args, **kwargs)
        return super().call_soon_ack(p, *args, **kwargs)

    def _update_prefetch_count(self, index: int = 0) -> None:
        """Do nothing: the gate sets the prefetch count from the READY slots."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **kwargs)
        largest = conf.read(self.app.conf).max_payload_bytes

        def guarded(delivered: Any) -> None:
            message = undecoded.Undecoded(delivered)
            try:
                _check(message, largest)
                handle(message)
            except (*self.connection_errors, MemoryError):
                raise
            except (errors.ResultsUnavailable, errors.DeclaredLost) as exc:
                self._give_back_later(message, exc)
            except Exception as exc:
                if refusals.is_outage(exc):  # of another result backend than Redis
                    self._give_back_later(message, exc)
                    return
                # Otherwise the exception would end this worker, and then the next one that gets the
                # message.
                self._reject(message, exc)

        return guarded

    def _give_back_later(self, message: Any, exc: Exception) -> None:
        """Give back a message that was revoked or has expired, which cannot be stored for now.

        It waits here first: it would come again and again until the queues are closed.
        """
        logger.info("the message of task %s is given back: %s", message.headers["id"], exc)
        arguments = logger, self.connection_errors
        self.timer.call_after(_PAUSE, message.reject_log_error, arguments, {"requeue": True})
        self.pool.slots_changed()

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

    def stop(self) -> None:
        """Stop consuming, and give back what has not reached the pool, for other workers."""
        if self.task_consumer is not None:
            # First, because a message that is given back could come here again.
            ignore_errors(self, self.task_consumer.cancel)
            ignore_errors(self, self._give_back_pending)
        for held in self._held_back():
            held.reject(requeue=True)
        super().stop()

    def _give_back_pending(self) -> None:
        """Read the answer that Redis owes: kombu returns its messages, as no queue is consumed."""
        channel = self.task_consumer.channel
        if getattr(channel, "_in_poll", None):
            with contextlib.suppress(Empty):
                channel._brpop_read()

    def _held_back(self) -> Iterator[Request]:
        """Yield the inputs that wait here for their ETA, or for a rate limit."""
        for scheduled in self.timer.schedule.queue:
            waiting = next(iter(scheduled.entry.args), None)
            if isinstance(waiting, Request):
                self.timer.cancel(scheduled.entry)
                yield waiting
        for bucket in filter(None, self.task_buckets.values()):
            yield from (waiting for waiting, _ in bucket.contents)

    def cancel_active_requests(self) -> None:
        """Update the active requests at a cold shutdown, before Celery cancels them.

        It releases waiting inputs first: otherwise they would start in free slots, then be stopped.
        """
        self.pool.supervisor.forget_waiting()
        self.pool.poll()
        super().cancel_active_requests()

    def call_soon(self, callback: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        """Schedule a callback; its exception would end the worker's loop, and is logged instead."""
        if _is_message_s(callback):  # Celery 5.6 has this one method for acknowledgements, too
            if self.pool.cluster.has_holds:
                return callback(*args, **kwargs)
            return super().call_soon(callback, *args, **kwargs)
        return super().call_soon(self._call_deferred, callback, *args, **kwargs)

    def _call_deferred(self, callback: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        try:
            callback(*args, **kwargs)
        except Exception as exc:
            is_lost = isinstance(exc, self.connection_errors)
            name = getattr(callback, "__name__", repr(callback))
            if args or not is_lost:  # the gate has no arguments, and is applied to each connection
                logger.exception("the command %s with %r failed; the worker goes on", name, args)
            if is_lost:
                raise  # Celery connects again
            if isinstance(exc, self.channel_errors) and find.is_rabbitmq(self.conninfo):
                # The broker closed the channel, and with it all consumers.
                raise ConnectionResetError(f"{name} made RabbitMQ close the channel") from exc

    def add_task_queue(self, queue: str, *args: Any, **options: Any) -> None:
        is_new = queue not in self.app.amqp.queues
        try:
            super().add_task_queue(queue, *args, **options)
            self.pool.gate.add(queue)
        except Exception:
            # Otherwise each new connection would fail with it, and a corrected command, too.
            self.pool.gate.remove(queue)
            self.app.amqp.queues.deselect(queue)
            with contextlib.suppress(Exception):  # the channel may be closed
                self.task_consumer.cancel_by_queue(queue)
            if is_new:
                self.app.amqp.queues.pop(queue, None)
            raise

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
    return _is_message_s(fun)


def _is_message_s(fun: Any) -> bool:
    """Return whether ``fun`` acknowledges or rejects a message."""
    owner = getattr(fun, "__self__", None)
    return isinstance(owner, Message) and getattr(fun, "__name__", "") in _ACKNOWLEDGEMENTS
