"""Types that several floors share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

#: A user's function: a task body, a hook, a calculator.
AnyFunction = Callable[..., Any]
#: The parameter values of one call of a class task, by name.
ParameterValues = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One call of a batched method, as its body sees it."""

    #: Inputs of this call.
    size: int
    #: Why it was closed: ``"full"``, ``"due"`` or ``"drain"``.
    flush: str
    #: Seconds that each input waited in the replica, in the order of the lists.
    waited: tuple[float, ...]
