"""The rules of three other autoscalers, each with its defaults.

What is compared are the rules, on the simulator's replicas: one input at a time. Where another
system would count differently, its docstring says what was assumed.
"""

from __future__ import annotations

import collections
import math

from gw_celery.policy import scaling
from gw_celery.simulate import cluster


class Stock:
    """Celery's own: as many processes as there are reserved messages.

    ``celery.worker.autoscale.Autoscaler``: asked at each message, and every ``AUTOSCALE_KEEPALIVE``
    (30 s) besides; it grows at once, and shrinks when it last grew longer ago than that. Celery 5.7
    asks for as long without a message, too (``since_message``); at a few messages a second it then
    never shrinks. Reserved is what the prefetch window holds: four messages for each process of the
    maximum (``worker_prefetch_multiplier``).
    """

    on_arrival = True
    keepalive = 30.0
    prefetch = 4

    def __init__(self, least: int, most: int, *, since_message: bool = True) -> None:
        self._least, self._most = least, most
        self._since_message = since_message
        self._arrived = 0
        self._active_at: float | None = None
        self._next = self.keepalive

    def desired(self, now: float, observation: cluster.Observation) -> int:
        is_message, self._arrived = observation.arrived > self._arrived, observation.arrived
        if is_message and self._since_message:
            self._active_at = now
        if not is_message and now < self._next:
            return observation.actual
        if not is_message:
            self._next += self.keepalive
        reserved = min(observation.waiting + observation.running, self.prefetch * self._most)
        if (wanted := min(reserved, self._most)) > observation.actual:
            self._active_at = now
            return wanted
        is_quiet = self._active_at is not None and now - self._active_at > self.keepalive
        return max(reserved, self._least) if is_quiet else observation.actual


class Keda:
    """A KEDA ``ScaledObject`` on a Redis list, and the HPA that it makes.

    ``listLength`` 5 a replica (https://keda.sh/docs/latest/scalers/redis-lists/). The HPA looks
    every 15 s, wants ``ceil(length / 5)``, does nothing within a tolerance of 10 %, grows by 4 or
    100 % each 15 s at most, and shrinks to the largest of the last 300 s
    (https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/). From and to zero
    goes KEDA itself: it polls every 30 s, and cools down for 300 s. The list is what waits: what a
    worker has taken is in it no more.
    """

    on_arrival = False
    length = 5.0
    sync = 15.0
    poll = 30.0
    window = 300.0
    tolerance = 0.1

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._size = least
        self._advice = scaling.Largest()
        self._next_sync, self._next_poll = 0.0, 0.0
        self._active_at = 0.0

    def desired(self, now: float, observation: cluster.Observation) -> int:
        if now >= self._next_poll:
            self._next_poll += self.poll
            self._activate(now, observation.waiting)
        if now >= self._next_sync:
            self._next_sync += self.sync
            if self._size:
                self._size = self._synced(now, observation.waiting)
        return self._size

    def _activate(self, now: float, waiting: int) -> None:
        if waiting:
            self._active_at = now
            self._size = max(1, self._size)
        elif self._least == 0 and now - self._active_at >= self.window:
            self._size = 0

    def _synced(self, now: float, waiting: int) -> int:
        size = self._size
        ratio = waiting / (self.length * size)
        advised = size if abs(1.0 - ratio) <= self.tolerance else math.ceil(waiting / self.length)
        advised = max(1, self._least, min(self._most, advised))
        held = int(self._advice.add(now, advised, self.window))
        if advised > size:
            return min(advised, size + max(4, size))
        return min(size, held)


class Ray:
    """Ray Serve's default: two ongoing requests a replica, and patience.

    ``replica_queue_length_autoscaling_policy`` and ``_apply_delay_logic`` of
    ``ray/serve/autoscaling_policy.py``, with the defaults of ``AutoscalingConfig``
    (https://docs.ray.io/en/latest/serve/advanced-guides/advanced-autoscaling.html):
    ``target_ongoing_requests`` 2, averaged over ``look_back_period_s`` 30; a decision has to stand
    for ``upscale_delay_s`` 30 or ``downscale_delay_s`` 600. From zero the first request starts one
    replica at once; to zero goes only the last one.
    """

    on_arrival = False
    target = 2.0
    look_back = 30
    upscale_delay = 30.0
    downscale_delay = 600.0

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._size = least
        self._ongoing: collections.deque[int] = collections.deque(maxlen=self.look_back)
        self._streak = 0

    def desired(self, now: float, observation: cluster.Observation) -> int:
        del now
        self._ongoing.append(observation.waiting + observation.running)
        if self._size == 0:
            self._size = 1 if self._ongoing[-1] else 0
            return self._size
        mean = sum(self._ongoing) / len(self._ongoing)
        advised = max(self._least, min(self._most, math.ceil(mean / self.target)))
        if self._size > 1:
            advised = max(1, advised)
        way = (advised > self._size) - (advised < self._size)
        self._streak = way if self._streak * way <= 0 else self._streak + way
        if self._streak > self.upscale_delay or self._streak < -self.downscale_delay:
            self._size, self._streak = advised, 0
        return self._size


def all_of(least: int, most: int) -> dict[str, cluster.Scaler]:
    """Return each of them, fresh, by name."""
    return {"stock": Stock(least, most), "keda": Keda(least, most), "ray": Ray(least, most)}
