"""What a worker and the children that it forks tell each other while they load.

Their pool cannot: it hears of a child only once that has loaded, and tells it nothing before.
"""

from __future__ import annotations

import dataclasses
import json
import os

from gw_celery.worker import stop_signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a child cannot serve."""

    pid: int
    reason: str


class Pipes:
    """Made before the fork: why children cannot load, and that their worker stops."""

    def __init__(self) -> None:
        self.bell = stop_signal.Bell()
        self._reader, self._writer = os.pipe()

    def report(self, reason: str) -> None:
        """Tell the worker why this child cannot serve; short, so that it is one write."""
        failure = Failure(pid=os.getpid(), reason=reason[:2000])
        os.write(self._writer, (json.dumps(dataclasses.asdict(failure)) + "\n").encode())

    def fileno(self) -> int:
        """Readable when a child has reported a failure."""
        return self._reader

    def never_wait(self) -> None:
        """Have ``failures`` return what is there from now on, and nothing when nothing is."""
        os.set_blocking(self._reader, False)

    def failures(self) -> list[Failure]:
        """Return what children have reported, waiting for it."""
        try:
            written = os.read(self._reader, 65536)
        except BlockingIOError:
            return []
        return [Failure(**json.loads(line)) for line in written.splitlines()]
