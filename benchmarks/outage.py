"""The lag of a replica's event loop, and what is lost, while Redis is frozen under load.

    python -m benchmarks.outage [--inputs 20000] [--seconds 10]

Redis is broker and result backend. It is stopped (SIGSTOP) in the middle of the load.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import psutil

from benchmarks import kills, kills_app
from gw_celery import devserver


def main() -> None:
    """Send, freeze Redis once, wait until all is done, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    os.environ["KEEP_RESULTS"] = "1"
    with tempfile.TemporaryDirectory() as folder, devserver.running(Path(folder)) as server:
        ledger = Path(folder) / "ledger"
        kills_app.celery.conf.update(broker_url=server.broker_url, result_backend=server.result_url)
        for number in range(options.inputs):
            kills_app.record.delay(number)
        worker = kills.Victims(server.broker_url, server.result_url, ledger, Path(folder) / "log")
        try:
            _freeze(server, ledger, options.seconds)
            kills.wait(ledger, options.inputs)
        finally:
            worker.end()
        lines = kills.counts(ledger)
        lags = sorted((float(one) for one in lines["L"]), reverse=True)
        begun, ended = lines["B"], lines["E"]
        print(
            f"sent {options.inputs}, Redis frozen for {options.seconds:g} s; lost "
            f"{options.inputs - len(ended)}, started twice {sum(n > 1 for n in begun.values())}; "
            f"largest loop lags {lags[:5]} s"
        )


def _freeze(server: devserver.Server, ledger: Path, seconds: float) -> None:
    """Stop the server once the load runs, and let it go on."""
    deadline = time.monotonic() + 60
    while not (ledger.exists() and ledger.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    program = psutil.Process(server.pid)
    program.send_signal(signal.SIGSTOP)
    threading.Event().wait(seconds)
    program.send_signal(signal.SIGCONT)


if __name__ == "__main__":
    main()
