"""The contexts and services that one App declares, in every process that imports them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Iterable
from typing import Any

from gw_celery import errors
from gw_celery.declare import gpu, services


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """A context class, and the arguments that its constructor gets in each replica."""

    cls: type
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def key(self) -> str:
        return context_key(self.cls)


def context_key(cls: type) -> str:
    """Return the dotted name of a context class, which stays the same after a re-import."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Registry:
    """The declarations of one App, in the order of the source code."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.contexts: dict[str, Context] = {}
        self.services: dict[str, services.Service] = {}
        #: The Celery apps that have this App's tasks. Names must be unique among the Apps of one.
        self.celery_apps: weakref.WeakSet[Any] = weakref.WeakSet()

    def add_context(self, context: Context, beside: Iterable[Registry] = ()) -> None:
        """Add a context class; ``beside`` lists Apps that may share a Celery app with this one.

        Raises:
            DeclarationError: if the class is registered already, or its constructor does not take
                the arguments.
        """
        for owner in (self, *self._neighbours(beside)):
            if context.key in owner.contexts:
                raise errors.DeclarationError(
                    "context", context.key, f"is registered already in App({owner.name!r})"
                )
        try:
            with contextlib.suppress(ValueError):  # a class written in C has no signature
                inspect.signature(context.cls).bind(*context.args, **context.kwargs)
        except TypeError as exc:
            raise errors.DeclarationError(
                "context",
                context.key,
                f"cannot be made with the arguments of @app.context(): {exc}",
            ) from exc
        self.contexts[context.key] = context

    def add_service(self, service: services.Service, beside: Iterable[Registry] = ()) -> None:
        """Add a service; ``beside`` lists Apps that may share a Celery app with this one.

        Raises:
            DeclarationError: if its class, function, queue or a task name is already in use.
        """
        _require_no_family(service, service)
        for other in self.services.values():
            if service.key == other.key:
                raise errors.DeclarationError("service", service.key, "is declared twice")
            is_shared = service.placement.queue and other.placement.queue
            if service.queue == other.queue and not is_shared:
                raise errors.DeclarationError(
                    "queue",
                    service.queue,
                    f"is the queue of {other.key} too: rename one, or give both the same queue= on "
                    f"purpose",
                )
        for owner in (self, *self._neighbours(beside)):
            owner._require_free(service)
        names: dict[str, str] = {}
        for method in service.methods.values():
            first = names.setdefault(method.task_name, method.name)
            if first != method.name:
                raise errors.DeclarationError(
                    "name", method.task_name, f"is the task of {service.key}.{first} too: change it"
                )
        self.services[service.key] = service

    def join(self, celery_app: Any, beside: Iterable[Registry]) -> None:
        """Add this App's tasks to a Celery app, which may have those of Apps ``beside`` it.

        Raises:
            DeclarationError: if another App has a context or task of the same name.
        """
        if celery_app in self.celery_apps:
            return
        for other in beside:
            if other is self or celery_app not in other.celery_apps:
                continue
            for key in self.contexts:
                if key in other.contexts:
                    apps = f"App({other.name!r}) and App({self.name!r})"
                    raise errors.DeclarationError("context", key, f"is in {apps}: keep one")
            for service in self.services.values():
                other._require_free(service)
        self.celery_apps.add(celery_app)

    def _neighbours(self, others: Iterable[Registry]) -> list[Registry]:
        mine = set(self.celery_apps)
        return [
            other
            for other in others
            if other is not self and not mine.isdisjoint(other.celery_apps)
        ]

    def _require_free(self, service: services.Service) -> None:
        for owner in self.services.values():
            _require_no_family(service, owner)
            _require_no_family(owner, service)
            taken = {method.task_name for method in owner.methods.values()}
            for method in service.methods.values():
                if method.task_name in taken:
                    raise errors.DeclarationError(
                        "name",
                        method.task_name,
                        f"is a task of {owner.key} in App({self.name!r}) already: give one of the "
                        f"two another name=",
                    )


def serving(registries: Iterable[Registry], queues: Iterable[str]) -> list[services.Service]:
    declared = [service for registry in registries for service in registry.services.values()]
    consumed = set(queues)
    return [service for service in declared if service.queue in consumed]


def families(registries: Iterable[Registry]) -> dict[str, list[str]]:
    """Return the service queues of each family, without duplicates."""
    queues: dict[str, dict[str, None]] = {}
    for registry in registries:
        for service in registry.services.values():
            queues.setdefault(service.family, {})[service.queue] = None
    return {family: list(names) for family, names in queues.items()}


def _require_no_family(service: services.Service, other: services.Service) -> None:
    """Refuse a queue that has the name of a family: ``-Q`` would then reach this queue alone."""
    if gpu.FAMILY.fullmatch(service.queue) or service.queue == other.family:
        raise errors.DeclarationError(
            "queue",
            service.queue,
            f"is the name of a family: `-Q {service.queue}` means every service of it, and would "
            f"reach {service.name} alone; give another queue=",
        )
