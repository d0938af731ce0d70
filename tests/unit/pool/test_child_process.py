from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from gw_celery import conf
from gw_celery.gpus import devices
from gw_celery.pool import child_process, child_state
from tests.processes import eventually

LIMITS = conf.Settings(
    boot_timeout=1, start_timeout=1, benchmark_timeout=1, drain_timeout=1, heartbeat_timeout=1
)
L4 = devices.Device(name="NVIDIA L4", token="GPU-1", memory_gb=24, index=1)


def environment(share: Sequence[devices.Device]) -> dict[str, str]:
    """What a child's process was started with, before its interpreter could change it."""
    state = child_state.ChildState(settings=LIMITS, now=0.0)
    sockets = child_process.Sockets()
    child = child_process.ChildProcess(0, state, {"": 1}, share, sockets)
    try:
        path = f"/proc/{child.pid}/environ"
        # Until it runs its own program, its environment is the parent's.
        eventually(lambda: b"gw_celery.replica.boot" in read(f"/proc/{child.pid}/cmdline"))
        pairs = [one.partition("=") for one in read(path).decode().split("\0") if one]
    finally:
        child.kill()
        child.process.wait()
        child.close()
        sockets.close()
    return {name: value for name, _, value in pairs}


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("inherited", [None, "", "3"])
@pytest.mark.parametrize("share", [(), (L4,)])
def test_a_child_sees_its_devices_or_what_the_worker_sees(
    monkeypatch: pytest.MonkeyPatch, inherited: str | None, share: Sequence[devices.Device]
) -> None:
    if inherited is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    expected = "GPU-1" if share else inherited
    assert environment(share).get("CUDA_VISIBLE_DEVICES") == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == inherited, "the worker's own stays"
