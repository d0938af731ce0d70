"""What ``celery gw worker`` was asked for, on its way to the worker that it starts."""

from __future__ import annotations

import dataclasses

#: The option by which it travels, among those that Celery gives to its worker.
OPTION = "gw_asked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that are ours."""

    #: Kind of GPU whose families are served; ``None`` for all that the machine can serve.
    gpu: str | None = None
    #: ``None`` for as many as fit.
    replicas: int | None = None
    #: ``-Q`` says what is served.
    names_queues: bool = False
