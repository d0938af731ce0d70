"""Our Celery task: routing, parameters, and ``await task(x)``, over any task base class."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any

from celery import _state
from celery.app.task import Task
from celery.exceptions import Ignore, TimeLimitExceeded
from kombu.utils.imports import symbol_by_name

from gw_celery import codec, errors
from gw_celery.client import bound, execution, queue_time, results, task_context
from gw_celery.declare import registry, services

#: Set on a request once its body has begun: a call of the task from inside it is a new call.
_BEGUN = "gw_begun"
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


class ServingTask(bound.CallMethods, Task):
    """A Celery task whose body runs on the loop, with the loaded state of its process."""

    abstract = True

    # A replica that dies must not take its inputs with it.
    acks_late = True
    reject_on_worker_lost = True
    serializer = codec.NAME
    # Expected under overload: one line in the log for each, and none of ours.
    throws = (errors.QueueTimeExceeded,)

    gw_service: services.Service
    gw_method: services.Method
    gw_registry: registry.Registry

    @classmethod
    def on_bound(cls, app: Any) -> None:
        super().on_bound(app)
        task_context.follow_requests(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> ServingTask:
        """A copied signature or handle is for the same task; Celery asks the current app for it."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body when Celery's tracer calls, else return an awaitable of the answer."""
        request = self.request_stack.top
        if request is None or request.called_directly or _BEGUN in vars(request):
            return super().__call__(*args, **kwargs)
        setattr(request, _BEGUN, True)
        try:
            return self.run(*args, **kwargs)
        except execution.HardLimit as limit:
            raise TimeLimitExceeded(*limit.args) from None
        except execution.Revoked:
            raise Ignore from None  # the worker has stored and announced the revocation
        except Exception as exc:
            exc.__traceback__ = _user_frames(exc.__traceback__)
            raise

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one input for the tracer: what ``run`` does behind Celery's own wrappers.

        Raises:
            NotServedError: when this process has not loaded the service.
        """
        if self.request.is_eager:
            runtime = execution.started(self.app)
            runtime.load(self)
            return runtime.run(self, args, kwargs)
        current = execution.current()
        if current is None or not current.serves(self.gw_service.key):
            raise self._not_served(self.request)
        return current.run(self, args, kwargs)

    def check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ``TypeError`` when the arguments do not fit the signature."""
        if self.typing:
            self.__header__(*args, **kwargs)

    def apply_async(
        self, args: Any = None, kwargs: Any = None, *positional: Any, **options: Any
    ) -> Any:
        """Send the task to its service's queue, unless the options or ``task_routes`` say else.

        Raises:
            QueueTimeExceeded: when it would wait there for longer than ``max_queue_time``.
        """
        if not self._is_routed(options, args, kwargs):
            options["queue"] = self.gw_service.queue
        options = queue_time.prepared(self, args, kwargs, options)
        send = super().apply_async
        if self.app.conf.task_always_eager:
            with _own_join_flag():
                return send(args, kwargs, *positional, **options)
        return send(args, kwargs, *positional, **options)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> results.Result:  # noqa: N802
        return results.Result(
            task_id, backend=self.backend, task_name=self.name, app=self.app, **kwargs
        )

    def _is_routed(self, options: dict[str, Any], args: Any, kwargs: Any) -> bool:
        if _names_queue(options):
            return True
        router = self.app.amqp.router
        if not router.routes:
            return False
        # A route may say something else alone, such as a priority.
        return _names_queue(router.lookup_route(self.name, args, kwargs, options, self) or {})

    def _not_served(self, request: Any) -> errors.NotServedError:
        queue = (request.delivery_info or {}).get("routing_key")
        service = self.gw_service
        return errors.NotServedError(
            f"{self.name}[{request.id}] reached {request.hostname} by the queue {queue!r}, but "
            f"that worker has not loaded {service.name}: send it to {service.queue!r} and start a "
            f"worker with -Q {service.family}"
        )


def _names_queue(options: Mapping[str, Any]) -> bool:
    return any(options.get(name) for name in ("queue", "exchange", "routing_key"))


_flagging = threading.Lock()
#: Eager calls under way, and what Celery's flag was before the first of them.
_under_way: list[bool] = []


@contextlib.contextmanager
def _own_join_flag() -> Iterator[None]:
    """Put back Celery's flag against joining results in tasks, which is one for all threads.

    Celery saves and restores it around each eager call: when two overlap, it would stay set.
    """
    with _flagging:
        _under_way.append(_under_way[0] if _under_way else _state.task_join_will_block())
    try:
        yield
    finally:
        with _flagging:
            before = _under_way.pop()
            if not _under_way:
                _state._set_task_join_will_block(before)


def _user_frames(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """Skip our frames before the body's: what is stored and logged should show the body."""
    first = traceback
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        first = first.tb_next
    return first or traceback


@functools.cache
def base_class(task_class: str | type) -> type[ServingTask]:
    """Return our task over ``task_class``, so that an app's own base class keeps its methods."""
    base = symbol_by_name(task_class)
    if issubclass(ServingTask, base):
        return ServingTask
    return type("ServingTask", (ServingTask, base), {"abstract": True})
