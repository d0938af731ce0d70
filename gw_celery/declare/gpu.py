"""The devices that a service needs, and the family of queues that follows from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any, Self

from gw_celery import errors
from gw_celery.declare import check

#: The kinds that are known without configuration; ``gw_gpu_kinds`` adds to them.
KINDS = ("CPU", "T4", "A10G", "L4", "L40S", "A100", "A100_80", "H100", "H200")

#: The family of services that name no kind.
ANY = "gpu"

_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
#: The families of the built-in kinds: a queue of such a name would be meant by ``-Q`` as well.
FAMILY = re.compile(rf"cpu|{ANY}(\.({'|'.join(KINDS[1:])})(x[2-8])?)?")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The devices that one replica of a service needs.

    Args:
        kind: one of ``KINDS``, or one that the setting ``gw_gpu_kinds`` adds; ``"CPU"`` for none.
        count: how many of them one replica takes, 1 to 8.
        memory_gb: memory that one replica needs for this service on each of its devices, in units
            of 10**9 bytes; replicas may share a device only when it is given for every service.

    Raises:
        DeclarationError: for a kind that cannot be a name, or a count out of range.
    """

    kind: str
    count: int = 1
    memory_gb: float | None = None

    def __new__(cls, *_: Any, **keywords: Any) -> Self:
        """Refuse a misspelt keyword before the ``__init__`` of the dataclass does."""
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
        """The family of queues, such as ``gpu.A100`` or ``gpu.A100x2``; ``cpu`` for the CPU."""
        if self.kind == "CPU":
            return "cpu"
        return f"gpu.{self.kind}" if self.count == 1 else f"gpu.{self.kind}x{self.count}"


def is_family(queue: str) -> bool:
    """Whether ``queue`` is named as families and their service queues are."""
    return is_bare(queue) or queue.startswith((f"{ANY}.", "cpu."))


def is_bare(queue: str) -> bool:
    """Whether ``queue`` is a family that a project may use for a queue of its own."""
    return queue in (ANY, "cpu")


def require_known(gpu: object, added: Callable[[], Collection[str]]) -> Gpu | None:
    """Return ``gpu`` when its kind is known.

    Args:
        gpu: a `Gpu`, or ``None``.
        added: returns the setting ``gw_gpu_kinds``. It is called only for kinds that are not built
            in: declaring a service must not make Celery load its configuration.

    Raises:
        DeclarationError: for anything else.
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
