"""Plain Celery tasks that have the name of one of ours.

Celery registers a name once, and hands whoever declares it again the task that has it: one of the
two functions would never run, with a warning at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from celery import _state

from gw_celery import errors
from gw_celery.declare import services

#: A function that Celery will make a task of, and the options of its decorator.
_Declared = tuple[Callable[..., Any], dict[str, Any]]
#: What ``shared_task`` leaves for every app that is finalized later.
_SHARED = ("fun", "options")
#: The option by which our tasks are told from others.
_OURS = "gw_registry"


def require_free(app: Any, service: services.Service) -> None:
    """Check that ``app`` neither has nor will have a plain task of a name that ``service`` uses.

    Raises:
        DeclarationError: naming both.
    """
    ours = {method.task_name for method in service.methods.values()}
    for name, owner in _plain_tasks(app):
        if name in ours:
            raise errors.DeclarationError(
                "name",
                name,
                f"is the name of {service.key} and of the plain Celery task {owner}: give one of "
                f"the two another name=",
            )


def current_app() -> Any:
    """Return the Celery app in use, ``None`` before there is one: asking Celery would make one."""
    return _state._tls.current_app or _state.default_app


def _plain_tasks(app: Any) -> Iterator[tuple[str, str]]:
    # Not ``app.tasks``, which finalizes the app.
    for name, task in list(app._tasks.items()):
        if not hasattr(task, _OURS):
            yield name, _dotted(task)
    for function, options in (*_pending(app), *_shared()):
        if _OURS not in options:
            name = options.get("name") or app.gen_task_name(function.__name__, function.__module__)
            yield name, _dotted(function)


def _pending(app: Any) -> Iterator[_Declared]:
    """Yield what ``@app.task`` has put aside until the app is finalized, or the task used."""
    for promise in list(app._pending):
        try:
            (function,) = object.__getattribute__(promise, "_Proxy__args")
            yield function, object.__getattribute__(promise, "_Proxy__kwargs")
        except AttributeError:  # used: it is among the tasks of the app
            continue


def _shared() -> Iterator[_Declared]:
    for callback in list(_state._on_app_finalizers):
        code = getattr(callback, "__code__", None)
        if code is not None and code.co_freevars == _SHARED:
            function, options = (cell.cell_contents for cell in callback.__closure__)
            yield function, options


def _dotted(one: Any) -> str:
    name = getattr(one, "__qualname__", None) or type(one).__qualname__
    return f"{one.__module__}.{name}"
