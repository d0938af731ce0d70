"""The rate of a model that is called in one process, with full batches and nothing around it.

python -m benchmarks.peers.ideal SECONDS
"""

from __future__ import annotations

import itertools
import json
import sys
import time

from benchmarks.peers import bodies, workloads


def main() -> None:
    """Print the rate, and the CPU seconds of an input, as JSON."""
    workload = workloads.chosen()
    model = bodies.load(workload)
    inputs = itertools.cycle(workloads.items(workload))
    model(list(itertools.islice(inputs, workload.max_batch)))
    started, used, count = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - started) < float(sys.argv[1]):
        count += len(model(list(itertools.islice(inputs, workload.max_batch))))
    cpu = (time.process_time() - used) / count
    print(json.dumps({"rate": count / elapsed, "worker_cpu": cpu}))


if __name__ == "__main__":
    main()
