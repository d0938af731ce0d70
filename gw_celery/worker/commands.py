"""Remote-control commands in the worker's parent: ours, and guards of Celery's own.

Celery's commands answer "ok" and act later, so that a guard must refuse before they run.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.worker import control

from gw_celery.declare import gpu

if TYPE_CHECKING:
    from gw_celery.worker.plan import Plan


def install() -> None:
    """Register our commands; only for a worker with the GPU pool."""
    install_ticks()
    control.inspect_command()(gw_status)
    for command in (gw_drain, gw_restart):
        control.control_command(args=[("replica", int)], signature="[replica]")(command)


def install_ticks() -> None:
    """Register the broadcast commands in every worker: one without them would log errors."""
    for command in (gw_probe_tick, gw_benchmark_tick, gw_best_score):
        control.control_command()(command)


def describe() -> None:
    """Register the commands with ``celery inspect`` and ``control``, without their handlers.

    The same program starts workers without the GPU pool, which must not get the handlers.
    """
    carried_out = dict(control.Panel.data)
    install()
    for name in control.Panel.data.keys() - carried_out.keys():
        del control.Panel.data[name]


def gw_status(state: Any) -> dict[str, Any]:
    """Show the replicas of a worker: state, pid, slots, in flight, restarts, last error."""
    answer: dict[str, Any] = state.consumer.pool.snapshot().as_json()
    return answer


def gw_drain(state: Any, replica: int | None = None) -> Any:
    """Drain one replica, or all; they stay stopped until gw_restart."""
    return _applied("drain", state.consumer.pool.hold, state, replica)


def gw_restart(state: Any, replica: int | None = None) -> Any:
    """Replace the child of one replica, or of all in turn, by draining."""
    return _applied("restart", state.consumer.pool.restart, state, replica)


def gw_probe_tick(state: Any) -> Any:
    """Record a tick of beat; probes follow their own periods."""
    return _ticked(state, "probe_tick")


def gw_benchmark_tick(state: Any) -> Any:
    """Measure the scores of all replicas again, when they are idle."""
    return _ticked(state, "benchmark_tick")


def _ticked(state: Any, tick: str) -> Any:
    if not hasattr(state.consumer.pool, tick):
        return control.ok("nothing to do: no GPU pool")
    getattr(state.consumer.pool, tick)()
    return control.ok("tick")


def gw_best_score(state: Any, worker: str = "", scores: Any = None) -> None:
    """Do nothing: older workers beside this one broadcast their scores with this command."""


def _listed(numbers: list[int]) -> str:
    """Return the names of replicas; a bare number would read as their count."""
    if len(numbers) < 2:
        return f"replica {numbers[0]}" if numbers else "none"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"replicas {numbers[0]} to {numbers[-1]}"
    return f"replicas {', '.join(map(str, numbers))}"


def _applied(
    what: str, steer: Callable[[int | None], None], state: Any, replica: int | None
) -> Any:
    numbers = [seen.number for seen in state.consumer.pool.snapshot().replicas]
    if replica is not None and replica not in numbers:
        return control.nok(f"there is no replica {replica!r}: this worker has {_listed(numbers)}")
    steer(replica)
    return control.ok(f"{what}: {'all replicas' if replica is None else f'replica {replica}'}")


def guard_queues(plan: Plan) -> None:
    """Make ``add_consumer`` refuse a service queue that ``plan`` has not loaded."""
    declared = {queue for queues in plan.families.values() for queue in queues}
    loaded = {service.queue for service in plan.served}
    original = control.add_consumer

    @functools.wraps(original)
    def add_consumer(state: Any, queue: str, *args: Any, **options: Any) -> Any:
        if queue not in loaded and (queue in declared or gpu.is_family(queue)):
            return control.nok(
                f"{queue}: this worker has not loaded its service; it serves "
                f"{', '.join(sorted(loaded))}. Start a worker with -Q {queue}"
            )
        return original(state, queue, *args, **options)

    control.Panel.data["add_consumer"] = add_consumer


def guard_size() -> None:
    """Make ``pool_grow`` and ``autoscale`` refuse more replicas than the devices allow.

    With our autoscaler, ``pool_grow`` and ``pool_shrink`` widen its bounds, as in Celery 4.
    """
    _guard_resize(control.pool_grow, "force_scale_up", sign=1)
    _guard_resize(control.pool_shrink, "force_scale_down", sign=-1)
    original = control.autoscale

    @functools.wraps(original)
    def autoscale(state: Any, max: Any = None, min: Any = None) -> Any:  # noqa: A002
        wanted = builtins.max(max or 0, min or 0)
        if (why := state.consumer.pool.refusal(wanted)) is not None:
            return control.nok(why)
        return original(state, max=max, min=min)

    control.Panel.data["autoscale"] = autoscale


def _guard_resize(original: Callable[..., Any], how: str, *, sign: int) -> None:
    @functools.wraps(original)
    def resize(state: Any, n: int = 1, **options: Any) -> Any:
        pool = state.consumer.pool
        if (why := pool.refusal(pool.limit + sign * n)) is not None:
            return control.nok(why)
        force = getattr(state.consumer.controller.autoscaler, how, None)
        if force is None:  # no autoscaler, or Celery's own
            return original(state, n, **options)
        if n < 1:
            return control.nok(f"{n} slots: give 1 or more")
        force(n)
        return control.ok(f"now {pool.limit} slots")

    control.Panel.data[original.__name__] = resize
