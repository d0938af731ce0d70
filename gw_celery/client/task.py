"""Our Celery task class, over any base class, and how methods become tasks; in every process."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import celery
from celery import _state
from celery.app.task import Task
from celery.exceptions import Ignore, TimeLimitExceeded
from celery.local import PromiseProxy, Proxy
from kombu.utils.imports import symbol_by_name

from gw_celery import codec, conf, errors, signals
from gw_celery.client import bound, execution, queue_time, results, task_context
from gw_celery.declare import check, registry, services

#: Set on a request when its body begins: from then on, a call of the task is a new call.
_BEGUN = "gw_begun"
_DEFAULT_CLASS = "celery.app.task:Task"
_DJANGO_CLASS = "celery.contrib.django.task:DjangoTask"
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


class ServingTask(bound.CallMethods, Task):
    """A Celery task whose body runs in this process's runtime, with the loaded state."""

    abstract = True

    # A child that dies must not lose its inputs.
    acks_late = True
    reject_on_worker_lost = True
    serializer = codec.NAME
    Request = "gw_celery.worker.consumer:ServingRequest"
    # Celery logs an expected exception in one line; we log nothing for it.
    throws = (errors.QueueTimeExceeded,)

    gw_service: services.Service
    gw_method: services.Method
    gw_registry: registry.Registry

    @property
    def resultrepr_maxsize(self) -> int:
        """The length to which Celery's log lines and events cut a result; 0 hides it."""
        return Task.resultrepr_maxsize if queue_time.settings_of(self.app).show_values else 0

    @classmethod
    def on_bound(cls, app: Any) -> None:
        super().on_bound(app)
        task_context.follow_requests(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> ServingTask:
        """Return the task itself in a copied signature or handle; Celery would look it up again."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body if Celery's tracer calls; otherwise return a coroutine for the answer."""
        request = self.request_stack.top
        if request is None or request.called_directly or _BEGUN in vars(request):
            return super().__call__(*args, **kwargs)
        setattr(request, _BEGUN, True)
        try:
            return self.run(*args, **kwargs)
        except execution.HardLimit as limit:
            raise TimeLimitExceeded(*limit.args) from None
        except execution.Revoked:
            raise Ignore from None  # the worker has stored the revocation and sent its event
        except Exception as exc:
            exc.__traceback__ = _user_frames(exc.__traceback__)
            raise

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one input for the tracer, inside Celery's own wrappers.

        Raises:
            NotServedError: if this process has not loaded the service.
        """
        if self.request.is_eager:
            runtime = execution.started(self.app)
            runtime.load(self)
            return runtime.run(self, args, kwargs)
        current, service = execution.current(), self.gw_service
        if current is None or not current.serves(service.key):
            request = self.request
            queue = (request.delivery_info or {}).get("routing_key")
            raise errors.NotServedError(
                f"{self.name}[{request.id}] reached {request.hostname} by the queue {queue!r}, but "
                f"that worker has not loaded {service.name}: send it to {service.queue!r} and "
                f"start a worker with -Q {service.family}"
            )
        return current.run(self, args, kwargs)

    def check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ``TypeError`` if the arguments do not fit the signature."""
        if self.typing:
            self.__header__(*args, **kwargs)

    def apply_async(
        self, args: Any = None, kwargs: Any = None, *positional: Any, **options: Any
    ) -> Any:
        """Send the task to its service's queue, unless the options or ``task_routes`` name another.

        Args:
            args, kwargs: the task's arguments.
            positional: further positional arguments of Celery's ``apply_async``.
            options: options of Celery's ``apply_async``.

        Returns:
            The ``AsyncResult``.

        Raises:
            QueueTimeExceeded: if the input would wait longer than ``max_queue_time``.
        """
        if not self._is_routed(options, args, kwargs):
            options["queue"] = self.gw_service.queue
        options = queue_time.prepared(self, args, kwargs, options)
        if not queue_time.settings_of(self.app).show_values:
            options = {**_counted(argsrepr=args, kwargsrepr=kwargs), **options}
        send = super().apply_async
        if self.app.conf.task_always_eager:
            with _own_join_flag():
                return send(args, kwargs, *positional, **options)
        return send(args, kwargs, *positional, **options)

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, **options: Any
    ) -> Any:
        """Return the signature of a retry, which shows the same of unchanged arguments."""
        request = request or self.request
        for name, values in (("argsrepr", args), ("kwargsrepr", kwargs)):
            if values is None and (shown := request.get(name)):
                options.setdefault(name, shown)
        return super().signature_from_request(request, args, kwargs, **options)

    def retry(self, *args: Any, **options: Any) -> Any:
        """Send the task again; Celery's error after the last attempt would name the arguments."""
        try:
            return super().retry(*args, **options)
        except self.MaxRetriesExceededError as exc:
            if not queue_time.settings_of(self.app).show_values:
                exc.args = (f"Can't retry {self.name}[{self.request.id}]: its retries are used up",)
            raise

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
        # A route may set other options only, such as a priority.
        return _names_queue(router.lookup_route(self.name, args, kwargs, options, self) or {})


def _counted(**given: Any) -> dict[str, str]:
    """Return what stands for arguments in headers, and so in logs, events and Flower."""
    counts = {name: len(values) for name, values in given.items() if isinstance(values, Sized)}
    return {
        name: f"<{count} argument{'s' * (count > 1)}>" for name, count in counts.items() if count
    }


def _names_queue(options: Mapping[str, Any]) -> bool:
    return any(options.get(name) for name in ("queue", "exchange", "routing_key"))


_flagging = threading.Lock()
#: The value of Celery's flag before the first of the eager calls in progress; one entry per call.
_under_way: list[bool] = []


@contextlib.contextmanager
def _own_join_flag() -> Iterator[None]:
    """Restore, after eager calls, Celery's global flag that forbids joining results inside tasks.

    Celery saves and restores it around each call; two overlapping calls would leave it set.
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
    """Skip our frames, so that the stored and logged traceback begins in the user's body."""
    first = traceback
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        first = first.tb_next
    return first or traceback


#: Names that every task has. ``hasattr`` would read ``app``, and so bind the class to an app.
_TAKEN = {*dir(ServingTask), *ServingTask.__annotations__} - {*check.OF_CELERY}


def require_options(method: services.Method) -> None:
    """Check the task options that depend on Celery's own classes.

    Raises:
        DeclarationError: if ``base`` is not a task class, or an attribute would replace one that
            every task has.
    """
    for name, value in method.options.items():
        if name in _TAKEN:
            raise errors.DeclarationError(name, value, "is part of every task: name it otherwise")
    base = method.options.get("base", celery.Task)
    if not isinstance(base, type) or not issubclass(base, celery.Task):
        raise errors.DeclarationError("base", base, "must be a subclass of celery.Task")
    if base.__call__ is not celery.Task.__call__:
        raise errors.DeclarationError(
            "base",
            base,
            "has a __call__ of its own, and so have our tasks: use before_start and after_return, "
            "or a context",
        )


def register(
    celery_app: Any, declared: registry.Registry, service: services.Service, method: services.Method
) -> Any:
    """Return the task of ``method`` on ``celery_app``; with ``None``, a proxy for the current app.

    Raises:
        DeclarationError: if a Celery app has another task of this name.
    """
    task_options = {
        # Celery copies shared tasks to every app of the process, in no fixed order: if two apps
        # have a task of the same name, one would run the other's body.
        "shared": False,
        "time_limit": service.placement.timeout,
        **{name: value for name, value in method.options.items() if name != "base"},
        "throws": (*method.options.get("throws", ()), *ServingTask.throws),
        "name": method.task_name,
        "gw_service": service,
        "gw_method": method,
        "gw_registry": declared,
    }
    body, base = _runner(method), method.options.get("base")
    if celery_app is not None:
        made = celery_app.task(base=_base_class(celery_app, base), **task_options)(body)
        if type(made) is PromiseProxy:  # Celery creates it at finalization or first use
            made.__then__(require_ours, celery_app, service, method)
        else:
            require_ours(celery_app, service, method)
        return made
    task_options |= {"shared": False, "lazy": False}

    def add(to: Any) -> None:
        declared.join(to, beside=signals.registries())
        to.task(base=_base_class(to, base), **task_options)(body)
        require_ours(to, service, method)

    for_every_app(add)
    return Proxy(lambda: celery.current_app.tasks[method.task_name])


def require_ours(celery_app: Any, service: services.Service, method: services.Method) -> None:
    """Check that the task of this name is ours.

    Celery keeps the first task of a name and returns it for the second declaration, whose own
    function would never run.

    Raises:
        DeclarationError: if it is a plain Celery task; the message names both tasks.
    """
    task = celery_app._tasks.get(method.task_name)  # ``app.tasks`` finalizes the app
    if task is not None and not hasattr(task, "gw_method"):
        name = f"{task.__module__}.{getattr(task, '__qualname__', type(task).__qualname__)}"
        raise errors.DeclarationError(
            "name",
            method.task_name,
            f"is the name of {service.key} and of the plain Celery task {name}: give one of the "
            f"two another name=",
        )


def for_every_app(add: Callable[[Any], None]) -> None:
    """Call ``add`` with every present and future Celery app of this process, once it is finalized.

    ``shared_task`` does the same, but would use one task base class for all apps.
    """
    for app in list(_state._get_active_apps()):  # adding a task may create an app
        if not app.finalized:
            continue
        try:
            add(app)
        except errors.DeclarationError:
            # Any app but the current one keeps its own task, as in Celery; a test may own that app.
            if app is _state.get_current_app():
                raise
    _state.connect_on_app_finalize(add)


def _base_class(celery_app: Any, base: type | None) -> type[ServingTask]:
    """Return our class over ``base``, or over the app's base class if ``base`` is ``None``."""
    own = base or celery_app.task_cls
    # Tasks of a Django project have delay_on_commit(); those of Celery's fallback app lack it.
    is_django = own == _DEFAULT_CLASS and conf.is_django_project()
    return _over(symbol_by_name(_DJANGO_CLASS if is_django else own))


@functools.cache
def _over(base: type) -> type[ServingTask]:
    if issubclass(ServingTask, base):
        return ServingTask
    return type("ServingTask", (ServingTask, base), {"abstract": True})


def _runner(method: services.Method) -> Callable[..., Any]:
    """Return the synchronous function that Celery's wrappers expect on every pool."""

    @functools.wraps(method.function)
    def run(*args: Any, **kwargs: Any) -> Any:
        current = _state.get_current_task()
        if current is None or current.name != method.task_name:
            raise errors.UsageError(
                f"{method.task_name}.run() is what a worker calls: write .local(...) to run it "
                f"here, or .delay(...), .remote(...) or `await` to send it"
            )
        return current.execute(args, kwargs)

    run.__signature__ = method.task_signature  # type: ignore[attr-defined]
    return run
