"""Type aliases and data types that several folders share, in every process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

#: Any function of the user: a task body, a hook, a calculator.
AnyFunction = Callable[..., Any]
#: The parameter values of one call of a class task, by name.
ParameterValues = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One call of a batched function, as its body sees it."""

    #: Number of inputs of this call.
    size: int
    #: Why gathering ended: ``"full"``, ``"due"`` or ``"drain"``.
    flush: str
    #: Seconds that each input waited in the replica, in the order of the lists.
    waited: tuple[float, ...]
