from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from celery import current_task

import gw_celery as gw


def ids() -> tuple[str, str | None, str]:
    request = current_task.request
    return request.id, request.parent_id, request.root_id


def test_a_call_that_a_body_awaits_has_its_parent_and_root_as_in_celery(app, serve) -> None:
    @app.remote
    async def child(depth):
        return ids(), await child(depth - 1) if depth else None

    @app.remote
    async def parent():
        return ids(), await child.aremote(1)

    serve()
    (root, of_root, own_root), (first, (second, _)) = parent.remote()

    assert (of_root, own_root) == (None, root)
    assert first[1:] == (root, root)
    assert second[1:] == (first[0], root)


def test_a_call_from_no_body_has_no_parent(app, serve) -> None:
    @app.remote
    async def child():
        return ids()

    serve()
    own, parent, root = child.remote()
    assert (parent, root) == (None, own)


def test_threads_that_are_in_no_task_may_block_while_another_one_runs_a_body(
    app: gw.App, serve: Callable[[], None]
) -> None:
    began, may_end = threading.Event(), threading.Event()

    @app.cls()
    class Model:
        @gw.method()
        def hold(self) -> str:
            began.set()
            assert may_end.wait(20)
            return "held"

        @gw.method()
        def quick(self) -> str:
            return "quick"

    serve()
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(Model().hold.remote)
        assert began.wait(20)
        try:
            assert Model().quick.remote() == "quick"
        finally:
            may_end.set()
        assert held.result(20) == "held"
