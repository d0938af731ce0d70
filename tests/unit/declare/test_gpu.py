from __future__ import annotations

import pytest

import gw_celery as gw
from gw_celery.declare import gpu
from tests.unit.refusals import NOT_FINITE, NOT_NUMBERS, refused


@pytest.mark.parametrize(
    ("device", "family"),
    [
        *((gw.Gpu(kind), f"gpu.{kind}") for kind in gpu.KINDS if kind != "CPU"),
        (gw.Gpu("A100", 2), "gpu.A100x2"),
        (gw.Gpu("CPU"), "cpu"),
        (None, "gpu"),
    ],
)
def test_the_family_of_a_service_follows_from_its_devices(
    app: gw.App, device: gw.Gpu | None, family: str
) -> None:
    async def embed(): ...

    app.remote(gpu=device)(embed)
    (service,) = app.registry.services.values()

    assert (service.family, service.queue) == (family, f"{family}.embed")


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    error = refused(gpu.require_known, gw.Gpu("A1000"), tuple)

    assert (error.argument, error.value) == ("gpu", "A1000")
    assert "unknown GPU kind" in error.rule
    assert "did you mean 'A100'?" in error.rule
    assert "gw_gpu_kinds" in error.rule


@pytest.mark.parametrize("kind", ["", "a100", "A 100", "A100\n", "x", None, 100, b"A100"])
def test_a_kind_that_cannot_be_a_name_is_refused(kind: object) -> None:
    error = refused(gw.Gpu, kind)

    assert (error.argument, error.value) == ("kind", kind)
    assert "unknown GPU kind" in error.rule


def test_the_setting_adds_kinds() -> None:
    added = gw.Gpu("B200")

    assert gpu.require_known(added, lambda: ("B200",)) is added


def test_the_setting_is_not_read_for_a_kind_that_is_built_in() -> None:
    def read() -> tuple[str, ...]:
        raise AssertionError("a declaration made Celery load its configuration")

    assert gpu.require_known(gw.Gpu("A100"), read) == gw.Gpu("A100")
    assert gpu.require_known(None, read) is None


@pytest.mark.parametrize("device", ["A100", gw.Gpu, 1, {"kind": "A100"}])
def test_what_is_no_gpu_is_refused(device: object) -> None:
    error = refused(gpu.require_known, device, tuple)

    assert (error.argument, error.value) == ("gpu", device)
    assert 'gw.Gpu("A100")' in error.rule


@pytest.mark.parametrize("count", [0, 9, -1, 2.0, *NOT_FINITE, *NOT_NUMBERS])
def test_a_count_outside_1_to_8_is_refused(count: object) -> None:
    error = refused(gw.Gpu, "A100", count)

    assert error.argument == "count"
    assert error.value is count
    assert "1 to 8" in error.rule


@pytest.mark.parametrize("count", [1, 8])
def test_a_count_of_1_to_8_is_taken(count: int) -> None:
    assert gw.Gpu("A100", count).count == count


def test_there_is_one_cpu() -> None:
    error = refused(gw.Gpu, "CPU", 2)

    assert (error.argument, error.value) == ("count", 2)
    assert 'Gpu("CPU")' in error.rule


@pytest.mark.parametrize(
    "memory", [0, -1.5, *NOT_FINITE, *(one for one in NOT_NUMBERS if one is not None)]
)
def test_memory_that_is_no_size_is_refused(memory: object) -> None:
    error = refused(gw.Gpu, "A100", memory_gb=memory)

    assert error.argument == "memory_gb"
    assert error.value is memory
    assert "over 0" in error.rule
    assert "seconds" not in error.rule


@pytest.mark.parametrize("queue", ["gpu", "cpu", "gpu.A100", "gpu.A100.embed", "cpu.rank"])
def test_family_names_are_told_from_other_queues(queue: str) -> None:
    assert gpu.is_family(queue)


@pytest.mark.parametrize("queue", ["celery", "gpus", "cpus.x", "default", ""])
def test_other_queues_are_no_families(queue: str) -> None:
    assert not gpu.is_family(queue)
