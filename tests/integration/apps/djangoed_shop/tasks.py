from __future__ import annotations

import asyncio

from asgiref.sync import sync_to_async
from celery import chord, shared_task

import gw_celery as gw

app = gw.App("shop")
CPU = gw.Gpu("CPU")


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=20)
async def count_tables(nap: float = 0.0) -> int:
    """Ask the database from an asynchronous body, as Django's own documentation does."""
    await asyncio.sleep(nap)
    return await sync_to_async(_count)()


@app.cls(gpu=CPU)
class Counter:
    @gw.method()
    def count(self) -> int:
        return _count()


@app.remote(gpu=CPU)
async def start_chord(in_thread: bool) -> str:
    """Start a chord, which Django's backend records in the database, from a thread or the loop."""
    start = chord([count_tables.s(), count_tables.s()])
    result = await sync_to_async(start)(total.s()) if in_thread else start(total.s())
    return str(result.id)


@app.remote(gpu=CPU)
async def fail(char: int) -> None:
    raise LookupError(f"nothing there{chr(char)}")


@shared_task
def count_tables_plainly() -> int:
    return _count()


@shared_task
def total(counts: list[int]) -> int:
    return sum(counts)


def _count() -> int:
    from django.db import connection

    return len(connection.introspection.table_names())


def cut_connections() -> None:
    """Make the database end all other connections, as its restart does."""
    from django.db import connection

    if connection.vendor == "postgresql":
        others = "FROM pg_stat_activity WHERE datname = current_database()"
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT pg_terminate_backend(pid) {others} AND pid <> pg_backend_pid()")
