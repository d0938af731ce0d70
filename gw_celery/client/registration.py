"""Making Celery tasks of a service's methods, for one Celery app or for all of a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import celery
from celery import _state
from celery.local import PromiseProxy, Proxy

from gw_celery import conf, errors, signals
from gw_celery.client import task
from gw_celery.declare import check, registry, services

#: Not ``hasattr``: asking the class for its ``app`` would bind it to one.
_TAKEN = {*dir(task.ServingTask), *task.ServingTask.__annotations__} - {*check.OF_CELERY}
_DEFAULT_CLASS = "celery.app.task:Task"
_DJANGO_CLASS = "celery.contrib.django.task:DjangoTask"


def require_options(method: services.Method) -> None:
    """Check the options of a task that only Celery's own classes can judge.

    Raises:
        DeclarationError: for a ``base`` that is no task class, or an attribute that would take
            the place of one that every task has.
    """
    for name, value in method.options.items():
        if name in _TAKEN:
            raise errors.DeclarationError(name, value, "is part of every task: name it otherwise")
    base = method.options.get("base", celery.Task)
    if not isinstance(base, type) or not issubclass(base, celery.Task):
        raise errors.DeclarationError("base", base, "must be a subclass of celery.Task")
    if base.__call__ is not celery.Task.__call__:
        raise errors.DeclarationError(
            "base",
            base,
            "has a __call__ of its own, and so have our tasks: use before_start and after_return, "
            "or a context",
        )


def register(
    celery_app: Any, declared: registry.Registry, service: services.Service, method: services.Method
) -> Any:
    """Return the task of ``method`` on ``celery_app``; without one, a proxy of the current app's.

    Raises:
        DeclarationError: when a Celery app has another task of this name.
    """
    task_options = {
        # Celery gives the tasks of one app to every other one of the process, in no certain
        # order: of two apps with a task of the same name, one would run the other's body.
        "shared": False,
        "time_limit": service.placement.timeout,
        **{name: value for name, value in method.options.items() if name != "base"},
        "throws": (*method.options.get("throws", ()), *task.ServingTask.throws),
        "name": method.task_name,
        "gw_service": service,
        "gw_method": method,
        "gw_registry": declared,
    }
    body, base = _runner(method), method.options.get("base")
    if celery_app is not None:
        made = celery_app.task(base=_base_class(celery_app, base), **task_options)(body)
        if type(made) is PromiseProxy:  # Celery makes it when the app is finalized, or at its use
            made.__then__(require_ours, celery_app, service, method)
        else:
            require_ours(celery_app, service, method)
        return made
    task_options |= {"shared": False, "lazy": False}

    def add(to: Any) -> None:
        declared.join(to, beside=signals.registries())
        to.task(base=_base_class(to, base), **task_options)(body)
        require_ours(to, service, method)

    for_every_app(add)
    return Proxy(lambda: celery.current_app.tasks[method.task_name])


def require_ours(celery_app: Any, service: services.Service, method: services.Method) -> None:
    """Check that the task of this name is ours: Celery keeps the first one that has a name.

    The second declaration would return the first task, and its own function would never run.

    Raises:
        DeclarationError: naming both.
    """
    task = celery_app._tasks.get(method.task_name)  # ``app.tasks`` would finalize the app
    if task is not None and not hasattr(task, "gw_method"):
        raise errors.DeclarationError(
            "name",
            method.task_name,
            f"is the name of {service.key} and of the plain Celery task {_dotted(task)}: give one "
            f"of the two another name=",
        )


def _dotted(task: Any) -> str:
    return f"{task.__module__}.{getattr(task, '__qualname__', type(task).__qualname__)}"


def for_every_app(add: Callable[[Any], None]) -> None:
    """Call ``add`` with every Celery app of this process, those to come as they are finalized.

    ``shared_task`` does so, too, but would give the tasks of all apps the same base class.
    """
    for app in list(_state._get_active_apps()):  # a task may make its app now
        if not app.finalized:
            continue
        try:
            add(app)
        except errors.DeclarationError:
            # One that is not in use keeps the task that it has, as in Celery: it may be a test's.
            if app is _state.get_current_app():
                raise
    _state.connect_on_app_finalize(add)


def _base_class(celery_app: Any, base: type | None) -> type:
    """Return our class over ``base``, which replaces the app's own as it does in Celery."""
    own = base or celery_app.task_cls
    # Tasks of a Django project have delay_on_commit(); Celery's fallback app is not told so.
    is_django = own == _DEFAULT_CLASS and conf.is_django_project()
    return task.base_class(_DJANGO_CLASS if is_django else own)


def _runner(method: services.Method) -> Callable[..., Any]:
    """Return the synchronous function that Celery sees: its wrappers expect one on every pool."""

    @functools.wraps(method.function)
    def run(*args: Any, **kwargs: Any) -> Any:
        current = _state.get_current_task()
        if current is None or current.name != method.task_name:
            raise errors.UsageError(
                f"{method.task_name}.run() is what a worker calls: write .local(...) to run it "
                f"here, or .delay(...), .remote(...) or `await` to send it"
            )
        return current.execute(args, kwargs)

    run.__signature__ = method.task_signature  # type: ignore[attr-defined]
    return run
