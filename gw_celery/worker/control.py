"""Refuse, at run time, a queue whose service is not loaded, and replicas that do not fit.

Celery's own commands answer "ok" and try later, so the refusal must come before them.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from celery.worker import control

from gw_celery.declare import gpu, registry
from gw_celery.worker import serving


def guard(plan: serving.Plan) -> None:
    """Let ``add_consumer`` refuse what ``plan`` does not serve, with the reason."""
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


def guard_size() -> None:
    """Let ``pool_grow`` and ``autoscale`` refuse more replicas than there are devices for.

    Under our autoscaler ``pool_grow`` and ``pool_shrink`` work, too, as they did in Celery 4.
    """
    grow, shrink, scale = control.pool_grow, control.pool_shrink, control.autoscale

    def pool_grow(state: Any, n: int = 1, **options: Any) -> dict[str, str]:
        def carry_out() -> dict[str, str]:
            return _forced(state, "force_scale_up", n) or grow(state, n, **options)

        return _unless_refused(state, state.consumer.pool.limit + n, carry_out)

    def pool_shrink(state: Any, n: int = 1, **options: Any) -> dict[str, str]:
        answer: dict[str, str] = _forced(state, "force_scale_down", n) or shrink(
            state, n, **options
        )
        return answer

    def autoscale(state: Any, max: Any = None, min: Any = None) -> dict[str, str]:  # noqa: A002
        wanted = builtins.max(max or 0, min or 0)
        return _unless_refused(state, wanted, lambda: scale(state, max=max, min=min))

    pool_grow.__doc__, autoscale.__doc__ = grow.__doc__, scale.__doc__
    pool_shrink.__doc__ = shrink.__doc__
    for command in (pool_grow, pool_shrink):
        control.control_command(args=[("n", int)], signature="[N=1]")(command)
    control.control_command(args=[("max", int), ("min", int)], signature="[max [min]]")(autoscale)


def _forced(state: Any, how: str, slots: int) -> dict[str, str] | None:
    """Resize at once where the autoscaler allows it; ``None`` where it does not, or there is none.

    Celery's own refuses.
    """
    force = getattr(state.consumer.controller.autoscaler, how, None)
    if force is None:
        return None
    if slots < 1:
        refusal: dict[str, str] = control.nok(f"{slots} slots: give 1 or more")
        return refusal
    force(slots)
    answer: dict[str, str] = control.ok(f"now {state.consumer.pool.limit} slots")
    return answer


def _unless_refused(
    state: Any, slots: int, carry_out: Callable[[], dict[str, str]]
) -> dict[str, str]:
    refusal = state.consumer.pool.refusal(slots)
    answer: dict[str, str] = control.nok(refusal) if refusal else carry_out()
    return answer
