"""Serve in no fork of a process where CUDA is up: CUDA works in no child of it, or hangs.

CPython prints what a hook of ``os.register_at_fork`` raises and forks all the same. So it is asked
where something can be ended: in the worker's parent before it makes its pool, and in each child,
also one that replaces another, before it loads.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gw_celery import errors

#: CUDA cannot do without it. NVML, which is harmless to forks, opens the other devices, too.
_CUDA_DEVICE = "/dev/nvidia-uvm"
#: The latter is true in a fork of a process where the former was.
_QUESTIONS = ("is_initialized", "_is_in_bad_fork")


def open_files() -> list[str]:
    """Return what the descriptors of this process stand for, where the kernel tells it."""
    files = []
    with contextlib.suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # it is closed by now
                files.append(os.readlink(f"/proc/self/fd/{number}"))
    return files


def refuse_cuda(
    files: Callable[[], Iterable[str]] = open_files, modules: Mapping[str, Any] = sys.modules
) -> None:
    """Check that CUDA is not up here, nor was where this process was forked; imports nothing.

    Raises:
        ConfigurationError: with what shows it, and the ways out.
    """
    sign = _sign(files(), modules)
    if sign:
        raise errors.ConfigurationError(
            f"CUDA is up in the worker's main process ({sign}), and works in no fork of it: do not "
            f"touch CUDA when modules are imported, load in a context or @gw.on_enter(); or start "
            f"this worker with the GPU pool, which does not fork (CELERY_CUSTOM_WORKER_POOL="
            f"gw_celery.pool:TaskPool and -P custom)"
        )


def _sign(files: Iterable[str], modules: Mapping[str, Any]) -> str:
    cuda = getattr(modules.get("torch"), "cuda", None)
    for question in _QUESTIONS:
        ask = getattr(cuda, question, None)
        if ask is not None and ask():
            return f"torch.cuda.{question}() is true"
    device = next((file for file in files if file.startswith(_CUDA_DEVICE)), None)
    return f"{device} is open" if device else ""
