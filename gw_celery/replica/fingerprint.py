"""What a score depends on, as one name: the same name, the same score, on this machine.

It is taken in the replica, from the code that runs there: the worker's parent may have imported an
older state of the same files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
import pickle
import platform
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gw_celery.declare import markers, registry, services

#: Of what is written; a new one measures everything again.
_VERSION = 1
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
#: What a class may hold that reads the same in every process.
_CONSTANTS = (bool, int, float, str, bytes)
#: Libraries whose version changes what a model does in a second.
_LIBRARIES = ("gw-celery", "torch")


def of(
    service: services.Service,
    method: services.Method,
    contexts: Iterable[registry.Context] = (),
    devices: Sequence[str] = (),
) -> str:
    """Return the fingerprint of a task's benchmark.

    Args:
        contexts: what the replica entered for the service.
        devices: the products that it runs on; none for the CPU.
    """
    return hashlib.sha256(_canonical(_parts(service, method, contexts, devices))).hexdigest()


def _parts(
    service: services.Service,
    method: services.Method,
    contexts: Iterable[registry.Context],
    devices: Sequence[str],
) -> dict[str, Any]:
    classes = service.target.__mro__[:-1] if service.is_class else ()
    return {
        "version": _VERSION,
        "task": method.task_name,
        "libraries": {name: _installed(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "hardware": sorted(devices) or ["CPU", _processor(), os.cpu_count()],
        "code": [code(one) for one in (method.function, *classes)],
        "contexts": [[code(one.cls), one.args, one.kwargs] for one in contexts],
        "spec": _fields(method.benchmark),
        "workload": code(method.workload_calculator),
        "batched": _fields(method.batched),
        "max_inputs": service.max_inputs,
        "parameters": {name: one.default for name, one in service.parameters.items()},
    }


def code(thing: Any) -> list[str]:
    """Return what tells a function or class from a changed one: its text, and what was compiled.

    The file may have changed since it was imported.
    """
    text = ""
    with contextlib.suppress(OSError, TypeError):  # made by exec(), or in C
        text = inspect.getsource(thing)
    return [text, *_compiled(thing)]


def _compiled(thing: Any) -> Iterator[str]:
    if inspect.isclass(thing):
        yield thing.__qualname__
        for name, value in vars(thing).items():
            function = getattr(value, markers.FUNCTION, value)
            if inspect.isroutine(inspect.unwrap(function)):
                yield name
                yield from _compiled(function)
            elif isinstance(value, _CONSTANTS) and not name.startswith("__"):
                yield f"{name} = {value!r}"
        return
    body = getattr(inspect.unwrap(thing), "__code__", thing)
    if isinstance(body, types.CodeType):
        yield f"{body.co_code!r} {body.co_names} {body.co_varnames}"
        for constant in body.co_consts:
            yield from _compiled(constant)
    else:
        yield _shown(body)


def _fields(declared: Any) -> dict[str, Any] | None:
    """The fields of a declaration, its functions by their code."""
    if declared is None:
        return None
    values = {one.name: getattr(declared, one.name) for one in dataclasses.fields(declared)}
    return {
        name: code(value) if inspect.isroutine(value) else value for name, value in values.items()
    }


def _canonical(given: Any) -> bytes:
    try:
        text = json.dumps(given, sort_keys=True, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError):  # keys that JSON has not, for example
        text = _shown(given)
    return text.encode()


def _plain(value: Any) -> Any:
    """Stand in for a value that JSON has not; one that differs each time is measured each time."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return _shown(value)
    if inspect.isroutine(value) or inspect.isclass(value):
        return code(value)
    try:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()
    except Exception:  # the value's own code may raise anything
        return _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, set | frozenset):  # they have another order in each process
        return str(sorted(map(_shown, value)))
    return _ADDRESS.sub("", repr(value))


def _installed(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
