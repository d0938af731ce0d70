"""The workload as a plain Celery task, for the stock prefork and threads pools.

The client sends ``infer`` to celery-batches, too: it sees a task of that name and no more.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery, signals

from benchmarks.peers import bodies, gathering, workloads

#: Set to "prefork" or "threads" in a worker.
POOL = "PEERS_POOL"

workload = workloads.chosen()
celery = Celery("peers", set_as_current=False)
celery.conf.task_default_queue = "peers"
_loaded: dict[str, Any] = {}


# Delivered as ours are: an input stays the broker's until it is answered.
@celery.task(name="peers.infer", acks_late=True, reject_on_worker_lost=True)
def infer(value: Any) -> Any:
    if workload.name == "io":
        time.sleep(workload.base)
        return value
    return _loaded["answer"](value)


@signals.worker_process_init.connect
def _load_in_child(**_: Any) -> None:
    # In the child, as CUDA demands it: a copy for each.
    model = bodies.load(workload)
    _loaded["answer"] = lambda value: model([value])[0]


@signals.worker_init.connect
def _load_in_worker(**_: Any) -> None:
    if os.environ.get(POOL) != "threads":
        return
    model = bodies.load(workload)
    if workload.has_model:
        gatherer = gathering.Gatherer(model, workload.max_batch, workload.wait_ms / 1000)
        _loaded["answer"] = gatherer.answer
    else:
        _loaded["answer"] = lambda value: model([value])[0]
