from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest

from gw_celery import errors
from gw_celery.worker import forks

NVML = ["/dev/null", "/dev/nvidiactl", "/dev/nvidia0", "socket:[4711]"]


def torch(**answers: bool) -> dict[str, Any]:
    """The modules of a process that has imported a torch which answers so."""
    cuda = types.SimpleNamespace(**{name: lambda it=it: it for name, it in answers.items()})
    return {"torch": types.SimpleNamespace(cuda=cuda)}


@pytest.mark.parametrize(
    ("files", "modules", "sign"),
    [
        ([], torch(is_initialized=True), "torch.cuda.is_initialized() is true"),
        ([], torch(is_initialized=False, _is_in_bad_fork=True), "_is_in_bad_fork() is true"),
        ([*NVML, "/dev/nvidia-uvm"], {}, "/dev/nvidia-uvm is open"),
        (["/dev/nvidia-uvm"], torch(is_initialized=False), "/dev/nvidia-uvm is open"),
    ],
)
def test_a_process_with_cuda_is_refused_with_the_ways_out(
    files: list[str], modules: dict[str, Any], sign: str
) -> None:
    with pytest.raises(errors.ConfigurationError) as refused:
        forks.refuse_cuda(lambda: files, modules)
    for words in (sign, "do not touch CUDA when modules are imported", "gw_celery.pool:TaskPool"):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    "modules",
    [
        {},
        {"torch": None},
        {"torch": types.SimpleNamespace()},
        torch(),
        torch(is_initialized=False),
        torch(is_initialized=False, _is_in_bad_fork=False),
    ],
)
def test_a_process_without_cuda_or_with_nvml_alone_may_fork(modules: dict[str, Any]) -> None:
    forks.refuse_cuda(lambda: NVML, modules)


def test_the_files_of_this_process_are_seen(tmp_path: Path) -> None:
    opened = os.open(tmp_path / "opened", os.O_CREAT | os.O_RDWR)
    try:
        assert str(tmp_path / "opened") in forks.open_files()
    finally:
        os.close(opened)
    assert str(tmp_path / "opened") not in forks.open_files()
