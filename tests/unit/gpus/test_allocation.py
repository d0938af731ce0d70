"""Which devices each replica of a worker gets, and which families a machine can serve."""

from __future__ import annotations

import pytest

import gw_celery as gw
from tests.gpu_workers import GpuWorkers, Nvml, Worker

LARGE = "T4:4,L4:4,A100_80:4"


def start(
    gpu_worker: GpuWorkers, machine: str | Nvml, *declared: gw.Gpu | None, more: str = "", **given
) -> Worker:
    """A worker for these services, all of them together."""
    queues = {"gpu" if kind is None else kind.family for kind in declared}
    return gpu_worker(f"-Q {','.join(sorted(queues))} {more}", declared, machine, **given)


def numbers(gpu_worker: GpuWorkers, machine: str, *declared: gw.Gpu | None) -> list[list[int]]:
    """The devices of each replica that fits, by their numbers on the machine."""
    replicas = start(gpu_worker, machine, *declared).replicas
    return [[int(token.removeprefix("GPU-fake-")) for token in tokens] for tokens in replicas]


# -- what a replica needs --


@pytest.mark.parametrize(
    ("declared", "needs"),
    [
        ([gw.Gpu("T4")], "1 x T4 all to itself"),
        ([gw.Gpu("T4", 2), gw.Gpu("T4"), None], "2 x T4 all to itself"),
        (
            [gw.Gpu("T4", memory_gb=4), gw.Gpu("T4", 2, memory_gb=6.5)],
            "2 x T4 with 10.5 GB on each",
        ),
        ([gw.Gpu("T4", memory_gb=4), gw.Gpu("T4")], "1 x T4 all to itself"),
        (
            [gw.Gpu("T4", memory_gb=4), gw.Gpu("L4", memory_gb=8)],
            "1 x L4 with 8 GB on each and 1 x T4 with 4 GB on each",
        ),
        ([gw.Gpu("A100", 2), gw.Gpu("A100_80")], "2 x A100_80 all to itself"),
    ],
)
def test_a_replica_needs_the_largest_count_and_the_sum_of_the_memories(
    gpu_worker: GpuWorkers, declared: list[gw.Gpu | None], needs: str
) -> None:
    worker = start(gpu_worker, LARGE, *declared, more="--replicas 999")
    assert worker.is_refused
    assert f"each needs {needs}, and this machine has" in worker.said


@pytest.mark.parametrize("declared", [[gw.Gpu("CPU")], [None]])
def test_services_without_a_kind_get_no_device(
    gpu_worker: GpuWorkers, declared: list[gw.Gpu | None]
) -> None:
    (environment,) = start(gpu_worker, LARGE, *declared).environments()
    assert "CUDA_VISIBLE_DEVICES" not in environment


# -- which devices each replica gets --


@pytest.mark.parametrize(
    ("machine", "declared", "shares"),
    [
        ("A100:3", [gw.Gpu("A100")], [[0], [1], [2]]),
        ("A100:5", [gw.Gpu("A100", 2)], [[0, 1], [2, 3]]),
        ("L4:2,A100:2", [gw.Gpu("A100")], [[2], [3]]),
        ("A100:2,L4", [gw.Gpu("A100"), gw.Gpu("L4", memory_gb=12)], [[0, 2], [1, 2]]),
        ("A100/40,A100_80", [gw.Gpu("A100")], [[0], [1]]),
        ("A100,A100_80", [gw.Gpu("A100_80")], [[1]]),
    ],
)
def test_a_replica_owns_its_devices_alone(
    gpu_worker: GpuWorkers, machine: str, declared: list[gw.Gpu], shares: list[list[int]]
) -> None:
    assert numbers(gpu_worker, machine, *declared) == shares


@pytest.mark.parametrize(
    ("machine", "declared", "shares"),
    [
        ("A100:2", [gw.Gpu("A100", memory_gb=13)], [[0], [1]] * 3),
        ("A100", [gw.Gpu("A100", memory_gb=40)], [[0]]),
        pytest.param("L4/0.3", [gw.Gpu("L4", memory_gb=0.1)], [[0]] * 3, id="rounding"),
        pytest.param(
            "A100/20,A100_80",
            [gw.Gpu("A100", memory_gb=20)],
            [[1], [1], [1], [0], [1]],
            id="the device with most room is next",
        ),
        pytest.param(
            "A100:3",
            [gw.Gpu("A100", 2, memory_gb=20)],
            [[0, 1], [0, 2], [1, 2]],
            id="the devices of one replica are different ones",
        ),
        pytest.param(
            "A100",
            [gw.Gpu("A100", memory_gb=1), gw.Gpu("A100")],
            [[0]],
            id="a service without its memory makes the replica own its devices",
        ),
    ],
)
def test_replicas_share_a_device_while_their_memories_fit(
    gpu_worker: GpuWorkers, machine: str, declared: list[gw.Gpu], shares: list[list[int]]
) -> None:
    assert numbers(gpu_worker, machine, *declared) == shares


def test_one_replica_gets_one_slice_of_a_gpu_at_most(gpu_worker: GpuWorkers) -> None:
    name = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    slices = [{"name": name, "uuid": f"MIG-{n}", "memory": 5 * 10**9} for n in range(3)]
    machine = Nvml({"name": "NVIDIA A100-SXM4-40GB", "uuid": "GPU-0", "mig": 1, "slices": slices})
    worker = start(gpu_worker, machine, gw.Gpu("A100"))
    assert worker.replicas == [["MIG-0"], ["MIG-1"], ["MIG-2"]]
    worker = start(gpu_worker, machine, gw.Gpu("A100", 2))
    assert worker.is_refused
    assert "a replica needs 2 x A100 all to itself" in worker.said


def test_a_device_of_two_kinds_is_not_given_twice(gpu_worker: GpuWorkers) -> None:
    ada = {"name": "NVIDIA RTX 6000 Ada Generation", "memory": 51_500_000_000}
    machine = Nvml({**ada, "uuid": "GPU-0"}, {**ada, "uuid": "GPU-1"})
    both = gw.Gpu("RTX"), gw.Gpu("ADA")
    worker = start(gpu_worker, machine, *both, gpu_kinds=["RTX", "ADA"])
    assert worker.is_refused
    assert "1 x ADA all to itself and 1 x RTX all to itself" in worker.said


def test_a_tiny_memory_makes_no_millions_of_replicas(gpu_worker: GpuWorkers) -> None:
    worker = start(gpu_worker, "A100:8", gw.Gpu("A100", memory_gb=1e-6))
    assert worker.slots == 2 * 1024, "one for the service, one for plain tasks"


@pytest.mark.parametrize(
    ("machine", "declared", "said"),
    [
        ("L4:2", gw.Gpu("A100"), ["needs 1 x A100 all to itself", "2 x L4", "GW_FAKE_GPUS=A100:1"]),
        ("A100", gw.Gpu("A100", 2), ["2 x A100 all to itself", "has 1 x A100 (fake A100, 40 GB)"]),
        (
            "A100",
            gw.Gpu("A100", memory_gb=41),
            ["1 x A100 with 41 GB on each", "40 GB", "GW_FAKE_GPUS=A100/41:1"],
        ),
    ],
)
def test_a_machine_without_room_for_one_replica_is_refused_with_what_it_has(
    gpu_worker: GpuWorkers, machine: str, declared: gw.Gpu, said: list[str]
) -> None:
    worker = start(gpu_worker, machine, declared)
    assert worker.is_refused
    for words in (*said, f"looked at GW_FAKE_GPUS='{machine}'"):
        assert words in worker.said


def test_more_replicas_than_fit_are_refused_with_what_was_asked_and_what_there_is(
    gpu_worker: GpuWorkers,
) -> None:
    assert start(gpu_worker, "A100:5", gw.Gpu("A100", 2), more="--replicas 2").code == 0
    worker = start(gpu_worker, "A100:5", gw.Gpu("A100", 2), more="--replicas 3")
    assert worker.is_refused
    assert (
        "3 replicas were asked for, and 2 fit: each needs 2 x A100 all to itself, and this machine "
        "has 5 x A100 (fake A100, 40 GB); looked at GW_FAKE_GPUS='A100:5'"
    ) in worker.said


# -- which families a machine can serve --


DECLARED = [
    None,
    gw.Gpu("CPU"),
    gw.Gpu("A100"),
    gw.Gpu("A100", memory_gb=10),
    gw.Gpu("A100", 2),
    gw.Gpu("L4", memory_gb=30),
    gw.Gpu("T4"),
]


def serving(gpu_worker: GpuWorkers, kind: str | None, machine: str, but: str = "") -> Worker:
    """The worker that has ``--gpu KIND`` on a machine, ``""`` for one without a GPU."""
    families = [("gpu" if gpu is None else gpu.family, gpu) for gpu in DECLARED]
    declared = [gpu for family, gpu in families if family not in but.split()]
    return gpu_worker(f"--gpu {kind}" if kind else "", declared, machine or Nvml())


@pytest.mark.parametrize(
    ("kind", "machine", "but", "taken"),
    [
        ("A100", "A100", "", ["gpu.A100"]),
        ("A100", "A100:2,T4", "", ["gpu.A100", "gpu.A100x2"]),
        ("A100", "A100_80:2", "", ["gpu.A100", "gpu.A100x2"]),
        ("T4", "A100:2,T4", "", ["gpu.T4"]),
        ("CPU", "A100:2", "", ["cpu"]),
        ("CPU", "", "", ["cpu"]),
        (None, "A100,T4", "", ["gpu", "gpu.A100", "gpu.T4"]),
        (None, "L4", "", ["gpu"]),
        (None, "", "", ["cpu"]),
        pytest.param(None, "H100", "gpu", ["cpu"], id="gpus that serve nothing"),
    ],
)
def test_a_worker_takes_the_families_that_its_machine_can_serve(
    gpu_worker: GpuWorkers, kind: str | None, machine: str, but: str, taken: list[str]
) -> None:
    assert serving(gpu_worker, kind, machine, but).families == taken


@pytest.mark.parametrize(
    ("kind", "machine", "but", "said"),
    [
        ("A100", "T4", "", "--gpu A100: this machine has 1 x T4"),
        ("A100", "", "", "--gpu A100: this machine has no GPU; looked at NVML; to run"),
        ("H100", "H100", "", "--gpu H100: no service here can be served; families: cpu, gpu, "),
        ("L4", "L4", "", "--gpu L4: no service here can be served"),
        ("CPU", "", "cpu", "--gpu CPU: no service here can be served"),
        (
            None,
            "",
            "cpu",
            "here can be served; families: gpu, gpu.A100 (needs 1 x A100 all to itself",
        ),
        (None, "", "cpu", '; what needs no GPU declares gpu=gw.Gpu("CPU")'),
        ("L4", "L4", "", "gpu.L4 (needs 1 x L4 with 30 GB on each)"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_there_is(
    gpu_worker: GpuWorkers, kind: str | None, machine: str, but: str, said: str
) -> None:
    worker = serving(gpu_worker, kind, machine, but)
    assert worker.is_refused
    assert said in worker.said


def test_devices_that_a_variable_hides_are_not_to_be_faked(gpu_worker: GpuWorkers) -> None:
    worker = gpu_worker("--gpu A100", DECLARED, "A100:4", visible="")
    assert worker.is_refused
    assert "CUDA_VISIBLE_DEVICES hides devices" in worker.said


def test_the_remedy_for_a_kind_of_the_setting_works(gpu_worker: GpuWorkers) -> None:
    given = {"declared": [gw.Gpu("RTX_4090")], "gpu_kinds": ["RTX_4090"]}
    worker = gpu_worker("--gpu RTX_4090", machine=Nvml(), **given)
    assert worker.is_refused
    assert "set GW_FAKE_GPUS=RTX_4090/24:1" in worker.said
    assert gpu_worker("--gpu RTX_4090", machine="RTX_4090/24:1", **given).families == [
        "gpu.RTX_4090"
    ]
