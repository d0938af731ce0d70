"""The batcher that a user of the threads pool writes: a queue, and a thread that gathers."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

from benchmarks.peers import bodies


class Gatherer:
    """Calls ``model`` with what came, as soon as it is free: full, or after ``wait`` seconds.

    The thread is a daemon: it ends with its process.
    """

    def __init__(self, model: bodies.Model, max_batch: int, wait: float) -> None:
        self._model = model
        self._max_batch = max_batch
        self._wait = wait
        self._waiting: queue.SimpleQueue[tuple[float, Any, Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def answer(self, value: Any) -> Any:
        """Block until a call that ``value`` shares with others has answered it."""
        answered: Future[Any] = Future()
        self._waiting.put((time.monotonic(), value, answered))
        return answered.result()

    def _serve(self) -> None:
        while True:
            batch = self._gathered()
            try:
                answers = self._model([value for _, value, _ in batch])
            except Exception as exc:
                for _, _, answered in batch:
                    answered.set_exception(exc)
                continue
            for (_, _, answered), answer in zip(batch, answers, strict=True):
                answered.set_result(answer)

    def _gathered(self) -> list[tuple[float, Any, Future[Any]]]:
        """The next batch; the time that its oldest input waited for the model counts, too."""
        batch = [self._waiting.get()]
        due = batch[0][0] + self._wait
        while len(batch) < self._max_batch:
            try:
                batch.append(self._waiting.get(timeout=max(0.0, due - time.monotonic())))
            except queue.Empty:
                break
        return batch
