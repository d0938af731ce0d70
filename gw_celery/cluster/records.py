"""What workers tell one another about a service: pure data, and how it is written."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from gw_celery.protocol import untrusted

#: Nobody counts further: whoever can write into the Redis must not hold up those who read.
_LARGEST = 1e18
_MOST = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """One worker and one service, as the other workers see them."""

    worker: str
    #: All that the worker serves: replicas are dealt out among workers that serve the same.
    serves: str = ""
    #: Replicas that it could have now: those that fail to start do not count.
    capacity: int = 1
    #: Replicas that it keeps whatever the load.
    least: int = 0
    #: Replicas that it has, starting and draining ones among them.
    replicas: int = 0
    #: Workload a second of one replica; ``None`` when nobody knows yet.
    score: float | None = None
    #: Workload that it has taken since it started; what it gave back is not in it.
    taken: float = 0.0
    #: Tells a worker from the one that had its name before.
    life: str = ""
    #: Workload that it holds and no replica has a slot for, and how many inputs that is.
    waiting: float = 0.0
    waiting_inputs: int = 0
    running_inputs: int = 0
    #: Workload of one input.
    mean: float = 1.0

    def dumps(self, at: float) -> str:
        """Write them down as of ``at``, by the clock of Redis."""
        return json.dumps(dataclasses.asdict(self) | {"at": round(at, 3)}, separators=(",", ":"))


def loads(written: str | bytes) -> tuple[Facts, float]:
    """Return the facts and their time.

    Raises:
        ValueError: for anything else, such as those of another version.
    """
    found = json.loads(written)
    if not isinstance(found, dict):
        raise ValueError(f"not facts of a worker: {written[:100]!r}")
    at = _number(found.get("at"))
    hints = {field.name: field.type for field in dataclasses.fields(Facts)}
    return Facts(**{name: _read(found.get(name), hints[name]) for name in hints}), at


def _read(value: Any, kind: Any) -> Any:
    if kind == "str":
        if not isinstance(value, str):
            raise ValueError(f"not a name: {value!r:.100}")
        return value
    if kind == "float | None" and value is None:
        return None
    number = _number(value)
    if kind == "int" and number > _MOST:
        raise ValueError(f"more replicas or inputs than can be true: {number:.0f}")
    return int(number) if kind == "int" else number


def _number(value: Any) -> float:
    number = untrusted.finite(value)
    if number is None or abs(number) > _LARGEST:
        raise ValueError(f"not a number that can be true: {value!r:.100}")
    return number
