"""The GPUs that a service needs, and the queue names that follow. Every process loads it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any, Self

from gw_celery import errors
from gw_celery.declare import check

#: The built-in kinds; the setting ``gw_gpu_kinds`` adds others.
KINDS = ("CPU", "T4", "A10G", "L4", "L40S", "A100", "A100_80", "H100", "H200")

#: The family of the services that name no kind.
ANY = "gpu"

_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
#: Names of the families of built-in kinds. A queue must not have one: ``-Q`` would mean both.
FAMILY = re.compile(rf"cpu|{ANY}(\.({'|'.join(KINDS[1:])})(x[2-8])?)?")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The devices that one replica of a service needs.

    Args:
        kind: one of the built-in kinds (``KINDS``) or of the setting ``gw_gpu_kinds``, such as
            ``"A100"``; ``"CPU"`` means no GPU.
        count: devices of this kind per replica, 1 to 8; must be 1 for ``"CPU"``.
        memory_gb: memory that the service uses on each of its devices, in units of 10**9 bytes.
            Replicas share a device only if all services of this kind in a worker state it.

    Raises:
        DeclarationError: if the kind is not a valid name, or a number is out of range.
    """

    kind: str
    count: int = 1
    memory_gb: float | None = None

    def __new__(cls, *_: Any, **keywords: Any) -> Self:
        """Refuse a misspelt keyword with a hint, which the dataclass's ``__init__`` lacks."""
        check.unknown("gw.Gpu", keywords, [field.name for field in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not _NAME.fullmatch(self.kind):
            raise errors.DeclarationError("kind", self.kind, _known_kinds(self.kind, KINDS))
        check.integer("count", self.count, 1, 8)
        check.optional("memory_gb", self.memory_gb)
        if self.kind == "CPU" and self.count != 1:
            raise errors.DeclarationError("count", self.count, 'must be 1 for Gpu("CPU")')

    @property
    def family(self) -> str:
        """The family of queues: ``gpu.A100``, ``gpu.A100x2``, or ``cpu`` for the CPU."""
        if self.kind == "CPU":
            return "cpu"
        return f"gpu.{self.kind}" if self.count == 1 else f"gpu.{self.kind}x{self.count}"


def is_family(queue: str) -> bool:
    """Return whether ``queue`` looks like the name of a family or of a service's queue."""
    return is_bare(queue) or queue.startswith((f"{ANY}.", "cpu."))


def is_bare(queue: str) -> bool:
    """Return whether ``queue`` is a family name that a project may use for its own queue."""
    return queue in (ANY, "cpu")


def require_known(gpu: object, added: Callable[[], Collection[str]]) -> Gpu | None:
    """Return ``gpu`` if its kind is known.

    Args:
        gpu: a `Gpu`, or ``None``.
        added: returns the setting ``gw_gpu_kinds``. It is called only for a kind that is not
            built in, because a declaration must not make Celery load its configuration.

    Raises:
        DeclarationError: if ``gpu`` is not a `Gpu`, or its kind is unknown.
    """
    if gpu is None:
        return None
    if not isinstance(gpu, Gpu):
        raise errors.DeclarationError("gpu", gpu, 'must be a gw.Gpu, such as gw.Gpu("A100")')
    if gpu.kind in KINDS:
        return gpu
    kinds = (*KINDS, *added())
    if gpu.kind not in kinds:
        raise errors.DeclarationError("gpu", gpu.kind, _known_kinds(gpu.kind, kinds))
    return gpu


def _known_kinds(kind: object, kinds: Collection[str]) -> str:
    hint = errors.near_miss(str(kind).upper(), kinds)
    unknown = f"unknown GPU kind; {hint}" if hint else "unknown GPU kind"
    return f"{unknown}; known: {', '.join(kinds)} (the setting gw_gpu_kinds adds others)"
