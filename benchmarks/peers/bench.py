"""One run: a system, a workload, and a client process that measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis

from benchmarks.peers import systems, workloads
from gw_celery import devserver

TIMEOUT = 600.0


class RunFailed(Exception):
    """Raised when a run gives no figures; says why, with the end of the system's log."""


class Bench:
    """Runs systems, one at a time, on one private server that is empty before each."""

    def __init__(
        self, folder: Path, server: devserver.Server, seconds: float, warm_up: float
    ) -> None:
        self._folder = folder
        self._server = server
        self._seconds = seconds
        self._warm_up = warm_up

    def run(self, system: systems.System, workload: workloads.Workload) -> dict[str, Any]:
        """Start a system, measure it, and stop it.

        Raises:
            RunFailed: when it does not start or does not answer.
        """
        env = self._environment(workload)
        with redis.Redis(unix_socket_path=str(self._server.socket)) as client:
            client.flushall()
        log = self._folder / f"{system.name}-{workload.name}.log"
        with systems.started(system, workload, env, log) as (pid, port):
            target = ["celery", system.client] if system.client else ["http", str(port)]
            options = ["--pid", str(pid), "--broker-pid", str(self._server.pid)]
            options += ["--seconds", str(self._seconds), "--warm-up", str(self._warm_up)]
            return _json("client", [*target, *options], env, log)

    def alone(self, workload: workloads.Workload) -> dict[str, Any]:
        """Measure the model in a process of its own."""
        return _json("ideal", [str(self._seconds)], self._environment(workload))

    def _environment(self, workload: workloads.Workload) -> dict[str, str]:
        return {
            **os.environ,
            workloads.VARIABLE: workload.name,
            workloads.DEVICE: str(self._folder / "device"),
            "CELERY_BROKER_URL": self._server.broker_url,
            "CELERY_RESULT_BACKEND": self._server.result_url,
            "PYTHONPATH": str(systems.ROOT),
        }


def _json(
    module: str, arguments: list[str], env: Mapping[str, str], log: Path | None = None
) -> dict[str, Any]:
    """What a module of this folder prints."""
    command = [sys.executable, "-m", f"benchmarks.peers.{module}", *arguments]
    try:
        done = subprocess.run(
            command, env=env, cwd=systems.ROOT, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"no figures after {TIMEOUT:.0f} s") from None
    if done.returncode:
        raise RunFailed(f"{_end(done.stderr)}; its log ends with: {_end(_read(log))}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _read(log: Path | None) -> bytes:
    return log.read_bytes() if log else b""


def _end(output: bytes) -> str:
    return " ".join(output.decode(errors="replace").split())[-300:]
