"""A view for each way to call; ``python -m djangoed_shop.views [PATH ...]`` prints the answers."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from asgiref.sync import sync_to_async
from django.http import HttpRequest, JsonResponse
from django.urls import path

from djangoed_shop import tasks
from gw_celery.errors import RemoteTaskError

TIMEOUT = 20.0


def delay_get(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"answer": tasks.count_tables.delay().get(TIMEOUT)})


def remote(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"answer": tasks.count_tables.remote()})


def spawn_get(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"answer": tasks.count_tables.spawn().get(TIMEOUT)})


def plain(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"answer": tasks.count_tables_plainly.delay().get(TIMEOUT)})


async def awaits(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"answer": await tasks.count_tables()})


async def awaits_thread(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"answer": await tasks.Counter().count()})


async def awaits_many(request: HttpRequest) -> JsonResponse:
    answers = await asyncio.gather(*(tasks.count_tables(0.05) for _ in range(20)))
    (answer,) = set(answers)
    return JsonResponse({"answer": answer})


async def aremote(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"answer": await tasks.count_tables.aremote()})


async def awaits_spawned(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"answer": await tasks.count_tables.spawn()})


async def delay_in_async(request: HttpRequest) -> JsonResponse:
    result = tasks.count_tables.delay()
    return JsonResponse({"answer": await sync_to_async(result.get)(TIMEOUT)})


async def awaits_failure(request: HttpRequest) -> JsonResponse:
    try:
        await tasks.fail(int(request.GET["char"]))
    except Exception as exc:
        return JsonResponse({"answer": [type(exc).__name__, str(exc)[:300]]})
    raise AssertionError("it has an answer")


async def awaits_chord(request: HttpRequest) -> JsonResponse:
    try:
        chord_id = await tasks.start_chord(bool(request.GET["thread"]))
    except RemoteTaskError as exc:
        return JsonResponse({"answer": str(exc)})
    result = tasks.total.AsyncResult(chord_id)
    return JsonResponse({"answer": await sync_to_async(result.get)(TIMEOUT)})


async def awaits_limits(request: HttpRequest) -> JsonResponse:
    """Exceed a limit, which the worker's parent stores, before and after all lost the database."""
    limited = tasks.count_tables.options(time_limit=0.5, timeout=TIMEOUT)
    answers = []
    for _ in range(2):
        (exc,) = await asyncio.gather(limited(60.0), return_exceptions=True)
        answers.append(type(exc).__name__)
        await sync_to_async(tasks.cut_connections)()
    return JsonResponse({"answer": answers})


VIEWS = (
    *(delay_get, remote, spawn_get, plain, awaits, awaits_thread, awaits_many, aremote),
    *(awaits_spawned, delay_in_async),
)
MORE = (awaits_failure, awaits_chord, awaits_limits)
urlpatterns = [path(f"{view.__name__}/", view) for view in (*VIEWS, *MORE)]


#: A lone surrogate, which no database takes, makes the traceback an outcome that is refused.
PATHS = [
    *(f"/{view.__name__}/" for view in VIEWS),
    *(f"/awaits_chord/?thread={thread}" for thread in ("yes", "")),
    *(f"/awaits_failure/?char={char}" for char in (ord("!"), 0xD800)),
]


def main(paths: list[str]) -> dict[str, Any]:
    """Ask each path as a WSGI server and as an ASGI server asks it."""
    from django.test import AsyncClient, Client

    async def ask_asynchronously() -> dict[str, Any]:
        return {path: (await AsyncClient().get(path)).json()["answer"] for path in paths}

    return {
        "wsgi": {path: Client().get(path).json()["answer"] for path in paths},
        "asgi": asyncio.run(ask_asynchronously()),
    }


if __name__ == "__main__":
    import django

    django.setup()
    print(json.dumps(main(sys.argv[1:] or PATHS)))
