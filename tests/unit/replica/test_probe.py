from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import current_task

import gw_celery as gw
from tests import child_harness
from tests.child_harness import Order, Report


class Replica:
    """The probes of one class task, asked as the parent asks them."""

    def __init__(self, app: gw.App, child: child_harness.Child) -> None:
        self.child = child
        (self.service,) = app.registry.services.values()
        self.key = self.service.key
        self.calls = itertools.count(1)

    def ask(self, method: str) -> int:
        number = next(self.calls)
        self.child.send(Order.PROBE, number, self.key, method)
        return number

    def answer(self, method: str) -> tuple[bool, str]:
        is_ok, detail, seconds = self.child.answer(Report.PROBED, self.ask(method))
        assert seconds >= 0
        return is_ok, detail


@pytest.fixture
def serve(app: gw.App) -> Iterator[Callable[..., Replica]]:
    with contextlib.ExitStack() as stack:

        def serve(cls: type, **probe_options: Any) -> Replica:
            names = [name for name in vars(cls) if not name.startswith("_")]
            methods = [name for name in names if name != "threshold"]
            declared = [gw.Probe.on(method, **probe_options) for method in methods]
            app.cls(probes=declared)(cls)
            return Replica(app, stack.enter_context(child_harness.child_of(app)))

        yield serve


class Scalar:
    """What an array library answers with."""

    def __init__(self, value: bool, dtype: str) -> None:
        self.value, self.dtype = value, dtype

    def __bool__(self) -> bool:
        return self.value


class Array:
    """The answer of a model, which is neither true nor false."""

    dtype = "float32"

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array with more than one element is ambiguous")


ANSWERS: list[tuple[Any, bool]] = [
    (None, True),
    (True, True),
    (0, True),
    ("", True),
    ([], True),
    ({}, True),
    ({"loaded": False}, True),
    ({"ok": True}, True),
    ({"ok": 1}, True),
    (False, False),
    ({"ok": False}, False),
    ({"ok": None}, False),
    ({"ok": 0, "why": "no memory"}, False),
    (Scalar(False, "bool"), False),
    (Scalar(False, "torch.bool"), False),
    (Scalar(True, "bool"), True),
    (Scalar(True, "torch.bool"), True),
    (Scalar(False, "float32"), True),
    (Array(), True),
]


def test_only_false_and_a_mapping_that_is_not_ok_fail(serve: Any) -> None:
    answers = iter(ANSWERS)

    class Model:
        @gw.method()
        async def health(self) -> Any:
            return next(answers)[0]

    replica = serve(Model)
    assert [replica.answer("health")[0] for _ in ANSWERS] == [is_ok for _, is_ok in ANSWERS]


def test_probes_run_on_the_loop_or_in_a_thread_of_their_own(serve: Any) -> None:
    class Model:
        @gw.method()
        async def on_loop(self) -> dict[str, Any]:
            here = threading.current_thread()
            return {"ok": here is replica.child.thread, "task": bool(current_task)}

        @gw.method()
        def in_thread(self) -> dict[str, Any]:
            here = threading.current_thread()
            return {"ok": here.daemon and here is not replica.child.thread}

    replica = serve(Model)
    assert replica.answer("on_loop") == (True, "{'ok': True, 'task': False}")
    assert replica.answer("in_thread") == (True, "{'ok': True}")


def test_what_a_probe_raises_is_the_reason_in_one_short_line(serve: Any) -> None:
    class Model:
        @gw.method()
        async def raises(self) -> None:
            raise OSError("the device\nfell off " + 1000 * "x")

        @gw.method()
        def exits(self) -> None:
            sys.exit(3)

        @gw.method()
        async def stops(self) -> None:
            raise KeyboardInterrupt

    replica = serve(Model)
    is_ok, detail = replica.answer("raises")
    assert not is_ok
    assert detail.startswith("OSError: the device fell off xxx")
    assert len(detail) == 200
    for name in ("exits", "stops"):
        is_ok, detail = replica.answer(name)
        assert not is_ok
        assert detail.startswith("BodyExited: the body raised")
    assert replica.answer("raises")[0] is False


def hanging() -> tuple[type, threading.Event, threading.Event]:
    """A class whose probe hangs until it is cancelled, and what is set at its start and end."""
    began, ended = threading.Event(), threading.Event()

    class Model:
        @gw.method()
        async def hangs(self) -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

    return Model, began, ended


def test_a_coroutine_that_hangs_is_cancelled_so_that_it_can_be_asked_again(serve: Any) -> None:
    model, _, ended = hanging()
    replica = serve(model, timeout_s=0.1)
    assert replica.answer("hangs") == (False, "TimeoutError")
    assert ended.is_set()


def test_a_replica_that_leaves_stops_its_probes(serve: Any) -> None:
    model, began, ended = hanging()
    replica = serve(model, timeout_s=1000)
    number = replica.ask("hangs")
    assert began.wait(10)
    assert not ended.is_set()
    replica.child.send(Order.LEAVE)
    replica.child.thread.join(10)
    assert ended.is_set()
    assert replica.child.left_behind == []
    assert replica.child.told(number) == []


def test_a_service_that_is_not_here_is_a_failed_probe(serve: Any) -> None:
    class Model:
        @gw.method()
        def health(self) -> None: ...

    replica = serve(Model)
    replica.key = "proj.Gone"
    assert replica.answer("health")[0] is False


def test_the_instance_of_the_default_parameters_is_asked(serve: Any) -> None:
    class Model:
        threshold: float = gw.parameter(default=0.5)

        @gw.method()
        def health(self) -> dict[str, Any]:
            return {"ok": True, "threshold": self.threshold}

    replica = serve(Model)
    assert replica.answer("health") == (True, "{'ok': True, 'threshold': 0.5}")


def test_a_class_without_a_default_instance_is_well_until_one_is_loaded(serve: Any) -> None:
    class Model:
        threshold: float = gw.parameter()

        @gw.method()
        def health(self) -> dict[str, Any]:
            return {"ok": False, "threshold": self.threshold}

    replica = serve(Model)
    assert replica.answer("health") == (True, "{'ok': True, 'loaded': 0}")
    name = replica.service.methods["health"].task_name
    number = replica.child.run(name, headers={"gw_params": json.dumps({"threshold": 0.7})})
    assert replica.child.outcome(number)[0] == Report.DONE
    assert replica.answer("health") == (False, "{'ok': False, 'threshold': 0.7}")


def test_a_batched_method_is_asked_with_a_batch_of_one(serve: Any) -> None:
    class Model:
        @gw.method()
        @gw.batched(max_batch_size=4)
        def health(self, texts: str = "ping") -> Any:
            return [{"ok": text == "ping"} for text in texts]

    replica = serve(Model)
    assert replica.answer("health") == (True, "{'ok': True}")
