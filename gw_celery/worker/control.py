"""Refuse, at run time, to consume a queue whose service this worker has not loaded."""

from __future__ import annotations

from typing import Any

from celery.worker import control

from gw_celery.declare import gpu, registry
from gw_celery.worker import serving


def guard(plan: serving.Plan) -> None:
    """Let ``add_consumer`` refuse what ``plan`` does not serve, with the reason.

    Celery's command answers "ok" before the consumer tries, so the refusal must come first.
    """
    known = {queue for queues in registry.families(plan.registries).values() for queue in queues}
    loaded = {service.queue for service in plan.served}
    original = control.add_consumer

    def add_consumer(state: Any, queue: str, *args: Any, **options: Any) -> dict[str, str]:
        if queue not in loaded and (queue in known or gpu.is_family(queue)):
            refusal: dict[str, str] = control.nok(
                f"{queue}: this worker has not loaded its service; it serves "
                f"{', '.join(sorted(loaded))}. Start a worker with -Q {queue}"
            )
            return refusal
        answer: dict[str, str] = original(state, queue, *args, **options)
        return answer

    add_consumer.__doc__ = original.__doc__
    control.control_command(
        args=[
            ("queue", str),
            ("exchange", str),
            ("exchange_type", str),
            ("routing_key", str),
        ],
        signature="<queue> [exchange [type [routing_key]]]",
    )(add_consumer)
