"""The JSON API. Ordinary views send a task and answer at once; ``ask`` awaits the answer.

Errors that views raise become JSON in ``ApiErrorMiddleware``; bad input is found in ``requests``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import traceback
from typing import Any
from uuid import UUID

from celery import states
from celery.result import AsyncResult
from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from search import requests
from search.errors import ApiError
from search.models import Document
from search.tasks import Ranker, embed, make_searchable

#: Seconds that ``ask`` waits: long enough for a worker that still loads the model.
ASK_TIMEOUT = 60.0
MAX_LISTED = 100


class AnswerEncoder(DjangoJSONEncoder):
    """Writes the dataclasses that tasks return."""

    def default(self, o: Any) -> Any:
        if dataclasses.is_dataclass(o) and not isinstance(o, type):
            return dataclasses.asdict(o)
        return super().default(o)


@require_http_methods(["GET", "POST"])
def documents(request: HttpRequest) -> HttpResponse:
    """List the library, or add a document: the worker makes it searchable."""
    if request.method == "POST":
        return _add(requests.json_object(request))
    listed = [_summary(document) for document in Document.objects.all()[:MAX_LISTED]]
    return JsonResponse({"count": Document.objects.count(), "documents": listed})


def _add(given: dict[str, Any]) -> HttpResponse:
    title = requests.text_field(given, "title", longest=120)
    text = requests.text_field(given, "text")
    document = Document.objects.create(title=title, text=text)
    try:
        answer = make_searchable(document)
    except Exception:
        # Nothing was sent, so nothing would ever make it searchable.
        document.delete()
        raise
    # Two tasks run one after the other; a client that shows progress follows both.
    steps = [answer.parent.id, answer.id]
    return JsonResponse(
        {"task_id": answer.id, "document_id": document.pk, "steps": steps}, status=202
    )


@require_POST
def search(request: HttpRequest) -> HttpResponse:
    """Send a query to the ranker; the client asks for the answer at ``/api/tasks/<id>/``."""
    given = requests.json_object(request)
    query = requests.text_field(given, "query")
    answer = Ranker(top_k=requests.top_k(given)).rank.delay(query)
    return JsonResponse({"task_id": answer.id}, status=202)


@require_GET
def task(request: HttpRequest, task_id: UUID) -> HttpResponse:
    """Tell how far a task is. Celery cannot tell a queued task from one it never heard of."""
    # Not Celery's plain one, which makes whatever class a stored error names.
    answer = embed.AsyncResult(str(task_id))
    state = answer.state
    error = _described(answer) if state in states.EXCEPTION_STATES else None
    result = answer.result if state == states.SUCCESS else None
    payload = {"state": state, "result": result, "error": error}
    return JsonResponse(payload, encoder=AnswerEncoder)


@require_POST
async def ask(request: HttpRequest) -> HttpResponse:
    """Await the ranker; the thread that would wait for it serves other visitors."""
    given = requests.json_object(request)
    query = requests.text_field(given, "query")
    ranker = Ranker(top_k=requests.top_k(given))
    try:
        async with asyncio.timeout(ASK_TIMEOUT):
            ranking = await ranker.rank(query)
    except TimeoutError as error:
        message = f"No worker answered within {ASK_TIMEOUT:.0f} s."
        raise ApiError(504, "Timeout", message) from error
    except ValueError as error:
        # The model's own rule about texts: the visitor can do something about it.
        raise ApiError(400, "ValueError", str(error)) from error
    return JsonResponse({"query": query, **dataclasses.asdict(ranking)}, encoder=AnswerEncoder)


@require_GET
def healthz(request: HttpRequest) -> HttpResponse:
    """Answer when Django and its database do; workers and the broker have checks of their own."""
    return JsonResponse({"ok": True, "documents": Document.objects.count()})


def _summary(document: Document) -> dict[str, Any]:
    return {
        "id": document.pk,
        "title": document.title,
        "text": document.text,
        "searchable": document.embedding is not None,
        "created_at": document.created_at,
    }


def _described(answer: AsyncResult) -> dict[str, str]:
    error = answer.result
    described = {"type": type(error).__name__, "message": str(error)}
    if settings.DEBUG:
        remote = answer.traceback or "".join(traceback.format_exception(error))
        described["traceback"] = remote
    return described
