"""The workload behind BentoML: ``python -m bentoml serve benchmarks.peers.bento:Service``.

Its dispatcher learns for how long to wait; ``max_latency_ms`` is when it gives a request up.
"""

from __future__ import annotations

from typing import Any

import bentoml

from benchmarks.peers import bodies, workloads

workload = workloads.chosen()
_batched: dict[str, Any] = (
    {"batchable": True, "max_batch_size": workload.max_batch, "max_latency_ms": 600_000}
    if workload.has_model
    else {}
)


@bentoml.service(workers=1, traffic={"timeout": 600})
class Service:
    """A model behind an endpoint, batched where the workload has one."""

    def __init__(self) -> None:
        self.model = bodies.load(workload)

    if workload.has_model:

        @bentoml.api(**_batched)
        def infer(self, values: list[Any]) -> list[Any]:
            return self.model(values)

    else:

        @bentoml.api
        async def infer(self, values: list[Any]) -> list[Any]:
            return [await bodies.io(values[0])] if workload.name == "io" else values
