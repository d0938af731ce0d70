"""Prometheus metrics of a worker with the GPU pool, rendered in the worker's parent.

They complement the exporters for Celery. A scrape renders the last snapshot of the worker and asks
neither the pool, the broker nor the children. Unknown figures are left out, because 0 would be
wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from gw_celery import errors
from gw_celery.pool.replica import State
from gw_celery.protocol import snapshot

try:
    from prometheus_client import core, exposition, registry
except ImportError as exc:
    raise errors.ConfigurationError(
        "metrics were asked for and prometheus_client is not installed: "
        "pip install 'gw-celery[metrics]'"
    ) from exc

#: The label of plain tasks, which cannot clash: the key of a service contains a dot.
PLAIN = "plain"

_SERVICE = ("service", "queue")
#: Service key -> values of the labels.
_Labels = Mapping[str, tuple[str, str]]
#: Gauges of each service. Workload is in the unit of its ``workload_calculator``.
_GAUGES = {
    "gw_queue_length": (
        "Messages in the service's queue; every worker reports the same queue: take the max."
    ),
    "gw_backlog_workload": (
        "Workload that waits, in the queue and in workers: this worker's part of it."
    ),
    "gw_wanted_replicas": (
        "Replicas that the demand asks for: this worker's part, even beyond what it could have."
    ),
    "gw_score": "Workload per second of one replica.",
    "gw_score_drift_ratio": (
        "By what share the served score is over the one of the benchmark, or under."
    ),
    "gw_capacity": "Workload per second of all replicas that are READY for the service.",
    "gw_ready_slots": "Inputs that READY replicas can run.",
}
#: Gauges of the autoscaler: name, description, attribute of its snapshot.
_SCALING = (
    ("gw_desired_replicas", "Replicas that the autoscaler wants of this worker.", "desired"),
    ("gw_capacity_replicas", "Replicas that this worker may have at most.", "most"),
)
#: Metrics of each service: type, name, key in its counters, description. Gauges show the current
#: value; counters count since the start of the worker.
_TALLIES = (
    (core.GaugeMetricFamily, "gw_waiting", "waiting", "in this worker, without a slot"),
    (core.GaugeMetricFamily, "gw_in_flight", "running", "in its replicas"),
    (core.CounterMetricFamily, "gw_arrived", "arrived", "that this worker has taken"),
    (core.CounterMetricFamily, "gw_served", "served", "that its replicas have answered"),
)


class Page(registry.Collector):
    """The metrics of one worker as a web page, on a separate Prometheus registry.

    Args:
        read: returns the worker's last snapshot; fast, and safe in any thread.
        queues: the queue of each service, by service key.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, read: Callable[[], snapshot.Worker], queues: Mapping[str, str]) -> None:
        self._read = read
        self._queues = queues
        # Without automatic description, which would read the snapshot before the worker runs.
        self._registry = registry.CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def __call__(self) -> bytes:
        """Return the page in Prometheus' text format."""
        return exposition.generate_latest(self._registry)

    def collect(self) -> Iterator[core.Metric]:
        """Yield the metrics of the last snapshot; the Prometheus registry calls this."""
        worker = self._read()
        yield from _of_worker(worker)
        yield from _of_replicas(worker.replicas)
        demands = {} if worker.scaling is None else worker.scaling.services
        keys = sorted({*worker.ready_slots, *worker.tallies, *worker.scores, *demands})
        labels = {key: (key or PLAIN, self._queues.get(key, "")) for key in keys}
        yield from _of_services(worker, labels)
        yield from _of_tallies(worker.tallies, labels)
        for name, text, figure in _SCALING if worker.scaling else ():
            yield core.GaugeMetricFamily(name, text, value=getattr(worker.scaling, figure))


def _of_worker(worker: snapshot.Worker) -> Iterator[core.Metric]:
    info = core.InfoMetricFamily("gw_worker", "Celery's name of the worker.")
    info.add_metric((), {"worker": worker.hostname})
    yield info
    states = Counter(replica.state for replica in worker.replicas)
    counted = core.GaugeMetricFamily("gw_replicas", "Replicas by state.", labels=("state",))
    for state in State:
        counted.add_metric((state.value,), states[state.value])
    yield counted
    is_open = core.GaugeMetricFamily(
        "gw_queue_open", "Whether this worker consumes the queue now.", labels=("queue",)
    )
    for queue in (*worker.open_queues, *worker.closed_queues):
        is_open.add_metric((queue,), queue in worker.open_queues)
    yield is_open
    yield core.GaugeMetricFamily(
        "gw_outage",
        "Whether an outage of the broker or the result backend pauses consuming.",
        value=bool(worker.outage or worker.broker_outage),
    )


def _of_replicas(replicas: Iterable[snapshot.Replica]) -> Iterator[core.Metric]:
    label = ("replica",)
    restarts = core.CounterMetricFamily(
        "gw_replica_restarts", "Children that ended and should not have.", labels=label
    )
    lag = core.GaugeMetricFamily(
        "gw_replica_loop_lag_seconds",
        "How late the event loop of the replica's child ran at its last heartbeat.",
        labels=label,
    )
    resident = core.GaugeMetricFamily(
        "gw_replica_resident_bytes", "Resident memory of the replica's child.", labels=label
    )
    for replica in replicas:
        number = (str(replica.number),)
        restarts.add_metric(number, replica.restarts)
        if replica.pid is not None:
            lag.add_metric(number, replica.lag)
            resident.add_metric(number, replica.resident_bytes)
    yield from (restarts, lag, resident)


def _of_services(worker: snapshot.Worker, labels: _Labels) -> Iterator[core.Metric]:
    figures = {key: _figures(worker, key) for key in labels}
    for name, text in _GAUGES.items():
        gauge = core.GaugeMetricFamily(name, text, labels=_SERVICE)
        for key, values in labels.items():
            if (figure := figures[key].get(name)) is not None:
                gauge.add_metric(values, figure)
        yield gauge


def _figures(worker: snapshot.Worker, service: str) -> dict[str, float | None]:
    """Return the gauges of a service by name; ``None`` for an unknown figure."""
    score = worker.scores.get(service, snapshot.Score())
    ready = [replica for replica in worker.replicas if replica.state == "ready"]
    replicas = sum(service not in replica.unready for replica in ready)
    figures: dict[str, float | None] = {
        "gw_score": score.value,
        "gw_score_drift_ratio": score.drift,
        "gw_capacity": None if score.value is None else score.value * replicas,
        "gw_ready_slots": worker.ready_slots.get(service, 0),
    }
    scaling = worker.scaling
    if scaling is not None and (demand := scaling.services.get(service)) is not None:
        # All workers of a group report the same demand: divide it so that the sum is correct.
        figures |= {
            "gw_queue_length": demand.queued,
            "gw_backlog_workload": demand.waiting / scaling.workers,
            "gw_wanted_replicas": max(demand.need, demand.keep) / scaling.workers,
        }
    return figures


def _of_tallies(
    counters: Mapping[str, snapshot.Counters], labels: _Labels
) -> Iterator[core.Metric]:
    for kind, name, key, text in _TALLIES:
        for unit, figure in (("workload", key), ("inputs", f"{key}_inputs")):
            family = kind(f"{name}_{unit}", f"{unit.capitalize()} {text}.", labels=_SERVICE)
            for service, values in labels.items():
                counted = counters.get(service, snapshot.Counters())
                family.add_metric(values, getattr(counted, figure))
            yield family
