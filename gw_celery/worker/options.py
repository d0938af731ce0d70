"""The options of ``celery gw worker``, on their way to the worker that it starts."""

from __future__ import annotations

import dataclasses

#: The name of `WorkerOptions` among the options that Celery gives to its worker.
KEY = "gw_options"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """The options that Celery's own worker command does not have."""

    #: Kind of GPU whose families are served; ``None`` for all that the machine can serve.
    gpu: str | None = None
    #: ``None`` for as many as fit.
    replicas: int | None = None
    #: ``-Q`` names what is served.
    names_queues: bool = False
