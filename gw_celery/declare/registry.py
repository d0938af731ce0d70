"""What one App has declared: its contexts and services, each once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from gw_celery import errors
from gw_celery.declare import services


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """A context class and the arguments that its constructor gets in each replica."""

    cls: type
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def key(self) -> str:
        return context_key(self.cls)


def context_key(cls: type) -> str:
    """The dotted name of a context class: identity does not survive a re-import."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Registry:
    """The declarations of one App, in the order in which they were made."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.contexts: dict[str, Context] = {}
        self.services: dict[str, services.Service] = {}

    def add_context(self, context: Context) -> None:
        """Add a context class.

        Raises:
            DeclarationError: when the class is registered already.
        """
        if context.key in self.contexts:
            raise errors.DeclarationError(
                "context", context.key, f"is registered already in App({self.name!r})"
            )
        self.contexts[context.key] = context

    def add_service(self, service: services.Service) -> None:
        """Add a service.

        Raises:
            DeclarationError: when its class, function, queue or a task name is taken.
        """
        for other in self.services.values():
            _require_distinct(service, other)
        _require_free_names(service, self.services.values())
        self.services[service.key] = service


def serving(registries: Iterable[Registry], queues: Iterable[str]) -> Iterator[services.Service]:
    """Yield the services whose queue is among ``queues``."""
    consumed = set(queues)
    for registry in registries:
        for service in registry.services.values():
            if service.queue in consumed:
                yield service


def families(registries: Iterable[Registry]) -> dict[str, list[str]]:
    """Return the service queues of each family."""
    found: dict[str, list[str]] = {}
    for registry in registries:
        for service in registry.services.values():
            queues = found.setdefault(service.family, [])
            if service.queue not in queues:
                queues.append(service.queue)
    return found


def _require_distinct(service: services.Service, other: services.Service) -> None:
    if service.key == other.key:
        raise errors.DeclarationError("service", service.key, "is declared twice")
    if service.queue == other.queue and not (service.placement.queue and other.placement.queue):
        raise errors.DeclarationError(
            "queue",
            service.queue,
            f"is the queue of {other.key} too: rename one, or give both the same queue= on purpose",
        )


def _require_free_names(service: services.Service, others: Iterable[services.Service]) -> None:
    taken = {method.task_name: other.key for other in others for method in other.methods.values()}
    for method in service.methods.values():
        owner = taken.setdefault(method.task_name, f"{service.key}.{method.name}")
        if owner != f"{service.key}.{method.name}":
            raise errors.DeclarationError("name", method.task_name, f"is a task of {owner} already")
