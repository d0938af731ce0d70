from __future__ import annotations

import contextvars
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

import gw_celery as gw
from gw_celery.client.calls import Publisher
from tests.processes import ROOT, environment

LONG = 60.0


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = Publisher(2)
    yield made
    made.close(LONG)


def test_what_is_submitted_runs_elsewhere_and_its_outcome_comes_back(publisher) -> None:
    assert publisher.submit(threading.get_ident).result(LONG) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        publisher.submit(lambda: 1 / 0).result(LONG)


def test_what_is_submitted_sees_the_context_of_the_caller(publisher) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("trace")
    variable.set("of the caller")

    assert publisher.submit(variable.get).result(LONG) == "of the caller"


def test_no_more_threads_are_started_than_were_asked_for(publisher) -> None:
    both = threading.Barrier(2)
    idents = [publisher.submit(lambda: (both.wait(LONG), threading.get_ident())) for _ in range(8)]

    assert len({one.result(LONG)[1] for one in idents}) == 2


def test_what_has_not_begun_can_be_cancelled(publisher) -> None:
    open_ = threading.Event()
    ran: list[str] = []
    busy = [publisher.submit(lambda: open_.wait(LONG)) for _ in range(2)]
    assert publisher.submit(lambda: ran.append("cancelled")).cancel()
    last = publisher.submit(lambda: ran.append("last"))
    open_.set()

    assert all(one.result(LONG) for one in busy)
    last.result(LONG)
    assert ran == ["last"]


def test_closing_waits_for_what_was_submitted_and_then_refuses(publisher) -> None:
    ran: list[str] = []
    publisher.submit(lambda: ran.append("last words"))
    publisher.close(LONG)

    assert ran == ["last words"]
    with pytest.raises(gw.UsageError, match="exiting"):
        publisher.submit(int).result(LONG)


def test_a_publication_that_blocks_does_not_hold_up_the_exit() -> None:
    """As while the broker is frozen; ``concurrent.futures`` would wait for it without limit."""
    program = (
        "import threading; from gw_celery.client.calls import Publisher\n"
        "publisher, began = Publisher(1), threading.Event()\n"
        "publisher.submit(lambda: (began.set(), threading.Event().wait()))\n"
        "began.wait(); publisher.close(0.1); print('bye')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=True,
    )
    assert done.stdout == "bye\n"
