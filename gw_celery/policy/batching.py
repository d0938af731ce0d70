"""When a batch is due, and which: late binding.

A batch is formed only when the service is free to run it, and not before: while the model is busy,
inputs gather at no cost. It closes when it is full, or once its oldest input has waited for long
enough. A timer that flushes whatever is there, as celery-batches has it, makes small batches that
then queue behind a slow model.
"""

from __future__ import annotations

import dataclasses
import enum

from gw_celery.policy import batch_buffer


class Flush(enum.StrEnum):
    """Why a batch was closed."""

    #: It can take no more.
    FULL = "full"
    #: Its oldest input waited for ``wait_ms``, or must not wait.
    DUE = "due"
    #: The replica takes nothing new.
    DRAIN = "drain"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs for one call, the oldest first."""

    members: list[batch_buffer.Waiting]
    flush: Flush


def next_batch(
    buffers: batch_buffer.Buffers,
    bounds: batch_buffer.Bounds,
    now: float,
    *,
    is_draining: bool = False,
) -> Batch | None:
    """Take out the batch that a free service runs now: of those that are due the oldest."""
    best: tuple[batch_buffer.Buffer, Flush] | None = None
    for buffer in buffers:
        flush = _due(buffer, bounds, now, is_draining)
        if flush is not None and (best is None or buffer.oldest < best[0].oldest):
            best = buffer, flush
    if best is None:
        return None
    return Batch(buffers.take(best[0], bounds), best[1])


def due_in(buffers: batch_buffer.Buffers, bounds: batch_buffer.Bounds, now: float) -> float | None:
    """Seconds until a batch is due, if nothing comes or goes; ``None`` when nothing waits."""
    oldest = min((buffer.oldest for buffer in buffers), default=None)
    return None if oldest is None else max(0.0, oldest + bounds.wait - now)


def halves(bounds: batch_buffer.Bounds, size: int) -> batch_buffer.Bounds:
    """The bounds after a call of ``size`` inputs ran out of the device's memory."""
    return dataclasses.replace(bounds, size=min(bounds.size, max(1, size // 2)))


def _due(
    buffer: batch_buffer.Buffer, bounds: batch_buffer.Bounds, now: float, is_draining: bool
) -> Flush | None:
    if buffer.fills(bounds):
        return Flush.FULL
    if is_draining:
        return Flush.DRAIN
    # As `due_in` computes it: a timer must not find that it came a rounding error too early.
    if buffer.has_urgent or buffer.oldest + bounds.wait <= now:
        return Flush.DUE
    return None
