"""Reads what clients of the JSON API send, and says what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

from django.http import HttpRequest

from search.errors import bad_input

MAX_BODY_BYTES = 100_000
MAX_RESULTS = 20


def json_object(request: HttpRequest) -> dict[str, Any]:
    """Return the JSON object in the body.

    Raises:
        ApiError: 400 for anything else, 413 for a body that is too large.
    """
    if request.content_type != "application/json":
        raise bad_input("Send the header Content-Type: application/json.")
    if len(request.body) > MAX_BODY_BYTES:
        raise bad_input(f"The body is larger than {MAX_BODY_BYTES} bytes.", status=413)
    try:
        given = json.loads(request.body)
    except ValueError as error:
        raise bad_input(f"The body is not JSON: {error}.") from error
    if not isinstance(given, dict):
        raise bad_input("The body must be a JSON object.")
    return given


def text_field(given: dict[str, Any], name: str, longest: int | None = None) -> str:
    """Return the text called ``name``, without the space around it."""
    value = given.get(name)
    if not isinstance(value, str) or not value.strip():
        raise bad_input(f'"{name}" must be a text that is not empty.')
    if any("\ud800" <= one <= "\udfff" for one in value):
        raise bad_input(f'"{name}" has half of a character: it cannot be written as UTF-8.')
    value = value.strip()
    if longest is not None and len(value) > longest:
        raise bad_input(f'"{name}" has {len(value)} characters; at most {longest} fit.')
    return value


def top_k(given: dict[str, Any]) -> int:
    """Return how many results are wanted: ``top_k``, or five."""
    value = given.get("top_k", 5)
    if type(value) is not int or not 1 <= value <= MAX_RESULTS:
        raise bad_input(f'"top_k" must be a whole number from 1 to {MAX_RESULTS}.')
    return value
