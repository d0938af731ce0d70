"""Remote-control commands of workers with the GPU pool: see their replicas, drain, restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from celery.worker import control

from gw_celery.protocol import snapshot


def status(pool: Any, autoscaler: Any) -> snapshot.Worker:
    """Return the snapshot of ``pool`` with what its autoscaler decided; Celery's own tells none."""
    worker: snapshot.Worker = pool.snapshot()
    if hasattr(autoscaler, "seen"):
        worker = dataclasses.replace(worker, scaling=autoscaler.seen())
    return worker


def install() -> None:
    """Register the commands, in a worker with the GPU pool only."""
    install_ticks()
    control.inspect_command()(gw_status)
    for command in (gw_drain, gw_restart):
        control.control_command(args=[("replica", int)], signature="[replica]")(command)


def install_ticks() -> None:
    """Register those that are broadcast, in every worker: one that lacks them logs errors."""
    for command in (gw_probe_tick, gw_benchmark_tick, gw_best_score):
        control.control_command()(command)


def describe() -> None:
    """Let ``celery inspect`` and ``celery control`` know the commands, which they would refuse.

    A worker without the GPU pool is started by the same program, and does not get them.
    """
    carried_out = dict(control.Panel.data)
    install()
    for name in control.Panel.data.keys() - carried_out.keys():
        del control.Panel.data[name]


def gw_status(state: Any) -> dict[str, Any]:
    """Show the replicas of a worker: state, pid, slots, in flight, restarts, last error."""
    consumer = state.consumer
    return status(consumer.pool, consumer.controller.autoscaler).as_json()


def gw_drain(state: Any, replica: int | None = None) -> dict[str, str]:
    """Let one replica, or all, finish and stay stopped until gw_restart."""
    pool = state.consumer.pool
    return _applied("drain", pool.hold, pool, replica)


def gw_restart(state: Any, replica: int | None = None) -> dict[str, str]:
    """Replace the child of one replica, or of all one by one, by draining."""
    pool = state.consumer.pool
    return _applied("restart", pool.restart, pool, replica)


def gw_probe_tick(state: Any) -> dict[str, str]:
    """Run the probes that are due, as beat has them run."""
    return _ticked(getattr(state.consumer.pool, "probe_tick", None))


def gw_benchmark_tick(state: Any) -> dict[str, str]:
    """Measure the replicas again that are due, as beat has them measured."""
    return _ticked(getattr(state.consumer.pool, "benchmark_tick", None))


def _ticked(tick: Callable[[], None] | None) -> dict[str, str]:
    if tick is not None:
        tick()
    answer: dict[str, str] = control.ok("tick" if tick else "nothing to do: no GPU pool")
    return answer


def gw_best_score(state: Any, worker: str = "", scores: Any = None) -> None:
    """Do nothing: workers of an older version beside this one tell their scores so."""


def _listed(numbers: list[int]) -> str:
    """Name the replicas; a number alone would read as how many there are."""
    if len(numbers) < 2:
        return f"replica {numbers[0]}" if numbers else "none"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"replicas {numbers[0]} to {numbers[-1]}"
    return f"replicas {', '.join(map(str, numbers))}"


def _applied(
    what: str, steer: Callable[[int | None], None], pool: Any, replica: int | None
) -> dict[str, str]:
    known = [replica.number for replica in pool.snapshot().replicas]
    if replica is not None and replica not in known:
        refusal: dict[str, str] = control.nok(
            f"there is no replica {replica!r}: this worker has {_listed(known)}"
        )
        return refusal
    steer(replica)
    accepted: dict[str, str] = control.ok(
        f"{what}: {'all replicas' if replica is None else f'replica {replica}'}"
    )
    return accepted
