"""What holds for every request: the content policy, forged requests, errors of the API."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import kombu.exceptions
import redis.exceptions
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.middleware.csrf import CsrfViewMiddleware
from django.utils.decorators import sync_and_async_middleware
from django.utils.deprecation import MiddlewareMixin

from search.errors import ApiError

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)

#: A browser sends one of them with every request that another site could make it send.
BROWSER_HEADERS = ("Origin", "Referer", "Cookie", "Sec-Fetch-Site")

#: What kombu and the result backend raise when the server behind them does not answer.
UNREACHABLE = (
    kombu.exceptions.OperationalError,
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
)


@sync_and_async_middleware
def content_security_policy(get_response: Callable[[HttpRequest], Any]) -> Callable[..., Any]:
    """Let the page load from its own origin only, and run no script that is written in it."""
    if inspect.iscoroutinefunction(get_response):

        async def answer_async(request: HttpRequest) -> HttpResponse:
            return _with_policy(await get_response(request))

        return answer_async

    def answer(request: HttpRequest) -> HttpResponse:
        return _with_policy(get_response(request))

    return answer


def _with_policy(response: HttpResponse) -> HttpResponse:
    response.headers.setdefault("Content-Security-Policy", POLICY)
    return response


class BrowserCsrfMiddleware(CsrfViewMiddleware):
    """Django's check for every browser; programs call the JSON API without a token.

    Forging a request takes a visitor's browser, and a browser says so: it sends ``Origin`` with
    each POST. curl and other programs send none of these headers, and no site can forge through
    them. The API takes ``application/json`` only, which no HTML form of another site can send.
    """

    def process_view(
        self, request: HttpRequest, callback: Any, callback_args: Any, callback_kwargs: Any
    ) -> HttpResponse | None:
        is_program = not any(header in request.headers for header in BROWSER_HEADERS)
        if is_program and request.path.startswith("/api/"):
            return None
        return super().process_view(request, callback, callback_args, callback_kwargs)


class ApiErrorMiddleware(MiddlewareMixin):
    """Turns the errors that views may raise into JSON with a status and a clear sentence."""

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        # Celery wraps what happens while it subscribes to an answer in a RuntimeError.
        if isinstance(exception, UNREACHABLE) or isinstance(exception.__cause__, UNREACHABLE):
            exception = ApiError(
                503,
                "BrokerUnreachable",
                "The message broker does not answer. Is the Redis or Valkey server running?",
            )
        if not isinstance(exception, ApiError):
            return None
        described = {"type": exception.kind, "message": exception.message}
        return JsonResponse({"error": described}, status=exception.status)
