from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest

import gw_celery as gw
from gw_celery.protocol import frames
from tests.processes import environment


@pytest.mark.parametrize(
    ("setup", "named"), [({"version": "0.0.1"}, "0.0.1"), ({}, "an older version")]
)
def test_a_child_of_another_version_asks_for_a_restart_of_its_worker_and_exits(
    setup: dict[str, Any], named: str
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        child = subprocess.Popen(
            [sys.executable, "-m", "gw_celery.replica.boot", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment(),
        )
        theirs.close()
        ours.sendall(frames.pack_orders([(setup,)]))
        (payload,) = frames.Unpacker(frames.MAX_CHILD_FRAME_BYTES).feed(ours.recv(65536))
        assert child.wait(60) == 1
    ((kind, reason),) = frames.unpack_reports(payload)
    assert kind == frames.Report.FAILED
    assert reason.endswith("; restart this worker")
    assert named in reason
    assert gw.__version__ in reason
