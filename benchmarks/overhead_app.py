"""No-op tasks: a plain Celery task, and ours in each form."""

from __future__ import annotations

from typing import Any

from celery import Celery

import gw_celery as gw

celery = Celery("overhead", set_as_current=False)
gw.preset(celery)
app = gw.App("overhead", celery)


@celery.task(queue="cpu.Service", acks_late=True, reject_on_worker_lost=True)
def plain(x: Any) -> Any:
    """What our tasks are measured against, with the same delivery guarantees."""
    return x


@app.cls(gpu=gw.Gpu("CPU"))
class Service:
    @gw.method()
    def sync(self, x: Any) -> Any:
        return x


@app.remote(gpu=gw.Gpu("CPU"))
async def asynchronous(x: Any) -> Any:
    return x


TASKS = {"plain": plain, "sync": Service().sync, "async": asynchronous}
