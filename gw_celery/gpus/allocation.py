"""Which devices each replica of a worker gets, and so how many replicas fit.

A replica holds one copy of everything that its worker serves. Of each kind of GPU it takes as many
devices as the greediest service of that kind wants (``count``), and its services share these: on
each of them it needs the sum of their ``memory_gb``. Replicas share a device only while these sums
fit in its memory; a replica with a service that does not say its ``memory_gb`` owns its devices.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gw_celery import errors
from gw_celery.declare import gpu
from gw_celery.gpus import devices

#: More processes than a machine can run: a tiny ``memory_gb`` must not make millions.
_MOST = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """What one replica takes of one kind of GPU."""

    kind: str
    count: int = 1
    #: On each device; ``None``: all of it.
    memory_gb: float | None = None

    def __str__(self) -> str:
        share = "all to itself" if self.memory_gb is None else f"with {self.memory_gb:g} GB on each"
        return f"{self.count} x {self.kind} {share}"

    def room_on(self, device: devices.Device) -> int:
        """Return how many replicas ``device`` holds."""
        if self.kind not in device.kinds or (self.count > 1 and device.slice_of):
            return 0
        return 1 if self.memory_gb is None else int(device.memory_gb / self.memory_gb + 1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allotment:
    """The devices of each replica, by its number: a new child of a replica gets the same."""

    needs: tuple[Need, ...]
    machine: devices.Machine
    shares: tuple[tuple[devices.Device, ...], ...]

    @property
    def most(self) -> int:
        """How many replicas fit."""
        return len(self.shares)

    def refusal(self, wanted: int) -> str | None:
        """Say why there cannot be this many replicas; ``None`` when there can."""
        if wanted <= self.most:
            return None
        return (
            f"{wanted} replicas were asked for, and {self.most} fit: each needs "
            f"{_listed(self.needs)}, and this machine has {self.machine}"
        )


def needs_of(declared: Iterable[gpu.Gpu | None]) -> tuple[Need, ...]:
    """Return what one replica takes that holds services with these declarations.

    Services without a kind, or for the CPU, take no device. ``A100`` and ``A100_80`` together are
    served by one ``A100_80``, which is both.
    """
    wanted = [wish for wish in declared if wish is not None and wish.kind != "CPU"]
    kinds = {wish.kind for wish in wanted}
    grouped: dict[str, list[gpu.Gpu]] = {}
    for wish in wanted:
        special = [kind for kind in kinds if kind.startswith(f"{wish.kind}_")]
        grouped.setdefault(max(special, key=len, default=wish.kind), []).append(wish)
    return tuple(_sum(kind, grouped[kind]) for kind in sorted(grouped))


def allot(needs: Sequence[Need], machine: devices.Machine) -> Allotment:
    """Give devices to as many replicas as fit.

    Raises:
        ConfigurationError: when not even one fits.
    """
    shares = tuple(itertools.islice(_shares(needs, machine.devices), _MOST))
    if not shares:
        raise errors.ConfigurationError(
            f"a replica needs {_listed(needs)}, and this machine has {machine}. Start this worker "
            f"where there is one, or serve fewer services with it{_remedy(needs, machine)}"
        )
    return Allotment(needs=tuple(needs), machine=machine, shares=shares)


def families_for(
    kind: str | None, declared: Mapping[str, Sequence[gpu.Gpu | None]], machine: devices.Machine
) -> list[str]:
    """Return the families that a worker on ``machine`` takes.

    Args:
        kind: the kind of GPU to serve; ``CPU`` for the family ``cpu``; ``None`` for every family
            that the devices can serve, or ``cpu`` where there is none such.
        declared: what the services of each family declare.

    Raises:
        ConfigurationError: when there is none, with what there is.
    """
    if kind not in (None, "CPU") and not machine.has(kind):
        remedy = _remedy([Need(kind=str(kind))], machine)
        raise errors.ConfigurationError(f"--gpu {kind}: this machine has {machine}{remedy}")
    fitting = [name for name in sorted(declared) if _can_serve(declared[name], machine)]
    if kind is None:
        found = [name for name in fitting if name != "cpu"] or [n for n in fitting if n == "cpu"]
    else:
        of_kind = (gpu.Gpu(kind, count).family for count in ([1] if kind == "CPU" else range(1, 9)))
        found = [name for name in of_kind if name in fitting]
    if not found:
        there = "" if kind == "CPU" else f"; this machine has {machine}"
        if kind is None:
            there += '; what needs no GPU declares gpu=gw.Gpu("CPU")'
        raise errors.ConfigurationError(
            f"{'gw worker' if kind is None else f'--gpu {kind}'}: no service here can be served; "
            f"families: {_families(declared)}{there}"
        )
    return found


def _sum(kind: str, wanted: Sequence[gpu.Gpu]) -> Need:
    sizes = [wish.memory_gb for wish in wanted]
    known = [size for size in sizes if size is not None]
    memory = sum(known) if len(known) == len(sizes) else None
    return Need(kind=kind, count=max(wish.count for wish in wanted), memory_gb=memory)


def _shares(
    needs: Sequence[Need], there: Sequence[devices.Device]
) -> Iterator[tuple[devices.Device, ...]]:
    """Yield the devices of replica 0, 1, ...: those with most room, so that few share."""
    rooms = _rooms(needs, there)
    while rooms:
        share: list[int] = []
        for need, room in rooms:
            free = [place for place in room if room[place]]
            if len(free) < need.count:
                return
            share += sorted(sorted(free, key=lambda place: -room[place])[: need.count])
            for place in share[-need.count :]:
                room[place] -= 1
        yield tuple(there[place] for place in share)


def _rooms(
    needs: Sequence[Need], there: Sequence[devices.Device]
) -> list[tuple[Need, dict[int, int]]]:
    """How many replicas each device holds, by its place; each is for one need alone."""
    rooms: list[tuple[Need, dict[int, int]]] = []
    taken: set[int] = set()
    for need in needs:
        found = {
            place: need.room_on(device) for place, device in enumerate(there) if place not in taken
        }
        rooms.append((need, {place: room for place, room in found.items() if room}))
        taken.update(rooms[-1][1])
    return rooms


def _can_serve(declared: Iterable[gpu.Gpu | None], machine: devices.Machine) -> bool:
    """Whether each of these services finds its devices, alone; none are needed for the CPU."""
    listed = list(declared)
    if all(wish is None for wish in listed):
        return bool(machine.devices)
    each = [needs_of([wish]) for wish in listed]
    return all(not needs or any(_shares(needs, machine.devices)) for needs in each)


def _families(declared: Mapping[str, Sequence[gpu.Gpu | None]]) -> str:
    """Say what each family takes of a machine."""
    said = []
    for name, listed in sorted(declared.items()):
        needs = list(dict.fromkeys(need for wish in listed for need in needs_of([wish])))
        said.append(f"{name} (needs {' or '.join(map(str, needs))})" if needs else name)
    return ", ".join(said) or "none: is their module imported"


def _remedy(needs: Iterable[Need], machine: devices.Machine) -> str:
    if devices.VISIBLE in machine.source:
        return f"; {devices.VISIBLE} hides devices from this worker: unset it, or name others in it"
    fakes = ",".join(f"{need.kind}{_size(need)}:{need.count}" for need in needs)
    return f"; to run without GPUs while you develop, set GW_FAKE_GPUS={fakes}"


def _size(need: Need) -> str:
    if need.memory_gb is not None:
        return f"/{need.memory_gb:g}"
    # A kind of the setting gw_gpu_kinds has no size of its own.
    return "" if need.kind in gpu.KINDS else "/24"


def _listed(needs: Sequence[Need]) -> str:
    return " and ".join(map(str, needs))
