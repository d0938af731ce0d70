"""Golden files: what crosses a process or is stored, compared with ``tests/goldens/*.json``.

``GW_UPDATE_GOLDENS=1`` rewrites a file instead: its diff is what a change does to others.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "goldens"
IS_UPDATE = os.environ.get("GW_UPDATE_GOLDENS") == "1"

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
#: What differs from run to run in a text; the first that matches goes first.
_VOLATILE = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:\d\d|Z)?"), "<time>"),
    (re.compile(r"w-[0-9a-f]{8}@test"), "<worker>"),
    (re.compile(r"(gen)?\d+@[\w.-]+"), "<origin>"),
    (re.compile(r"\b[0-9a-f]{16,}\b"), "<hash>"),
    (re.compile(r"(?:/[\w.+-]+)+/(?=[\w-]+\.py)"), "<folder>/"),
    (re.compile(r"line \d+"), "line <number>"),
    (re.compile(r"^\d+$"), "<number>"),
)
#: Names whose values are times, durations, pids or sizes.
_MEASURED = re.compile(
    r"(^|_)(pid|time|timestamp|seconds|since|age|lag|bytes|updated|runtime)$|gw-enqueued|delivery_tag"
)


def check(name: str, value: Any) -> None:
    """Compare ``value``, which JSON can hold, with a golden file, or rewrite that."""
    path = FOLDER / f"{name}.json"
    if IS_UPDATE:
        path.write_text(_dumped(value))
    golden, now = path.read_text().splitlines(), _dumped(value).splitlines()
    changes = difflib.unified_diff(golden, now, path.name, "now", n=2, lineterm="")
    assert golden == now, "\n".join(
        ["GW_UPDATE_GOLDENS=1 rewrites the file where this change is meant:", *changes]
    )


def wait_and_check(name: str, read: Callable[[], Any], timeout: float = 30.0) -> None:
    """Compare what ``read`` returns with a golden file until it is the same, or time is over.

    What it reads may not be complete at once, and may hold something short-lived for a moment.
    """
    if IS_UPDATE:
        time.sleep(5)
    path, end = FOLDER / f"{name}.json", time.monotonic() + timeout
    while (
        not IS_UPDATE
        and path.exists()
        and _dumped(read()) != path.read_text()
        and time.monotonic() < end
    ):
        time.sleep(0.1)
    check(name, read())


def normal(value: Any, ids: dict[str, str] | None = None, key: str = "") -> Any:
    """Return ``value`` with placeholders for what differs from run to run.

    Args:
        value: what JSON can hold.
        ids: placeholders of ids that occurred before; the same id gets the same one.
        key: the name that ``value`` has.
    """
    ids = {} if ids is None else ids
    if isinstance(value, Mapping):
        return {normal(name, ids): normal(one, ids, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [normal(one, ids) for one in value]
    if isinstance(value, str):
        return _normal_text(value, ids)
    if isinstance(value, int | float) and not isinstance(value, bool) and _MEASURED.search(key):
        return f"<{key}>"
    return value


def shape(value: Any) -> Any:
    """Return the names and types in ``value``: one entry for each kind of element of a list."""
    if isinstance(value, Mapping):
        return {normal_key(str(key)): shape(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return distinct(map(shape, value))
    return "null" if value is None else type(value).__name__


def normal_key(key: str) -> str:
    """Return a name with one placeholder for every id, worker and number in it."""
    return _normal_text(_ID.sub("<id>", key), {})


def stored_shape(value: bytes) -> Any:
    """Return the shape of what is stored as ``value``: of its JSON, or what kind of text it is.

    A hold has a line with the name of its queue before its JSON.
    """
    queue, newline, message = value.partition(b"\n")
    if newline and message.startswith(b"{"):
        return {queue.decode(): stored_shape(message)}
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if isinstance(found, dict | list):
        return shape(found)
    if isinstance(found, int | float):
        return "number"
    try:
        return normal_key(value.decode())
    except UnicodeDecodeError:
        return "bytes"


def _normal_text(text: str, ids: dict[str, str]) -> str:
    text = _ID.sub(lambda match: ids.setdefault(match[0], f"<id {len(ids) + 1}>"), text)
    for pattern, placeholder in _VOLATILE:
        text = pattern.sub(placeholder, text)
    return text


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return each of ``values`` once, in an order of their own."""
    by_text = {json.dumps(one, sort_keys=True): one for one in values}
    return [by_text[text] for text in sorted(by_text)]


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
