"""The objects that callers use, in every process: bound tasks, and the handle of ``Cls(...)``."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import amqp.basic_message
from celery import Celery, Task
from celery.app.amqp import AMQP
from kombu.messaging import Producer

from gw_celery import conf, errors
from gw_celery.client import calls, execution
from gw_celery.declare import check, markers, parameters, services
from gw_celery.protocol import headers
from gw_celery.types import AnyFunction


class CallMethods:
    """The call methods that our tasks have in addition to Celery's.

    The prefix ``_gw_`` keeps these names apart from those of the user's base class.
    """

    _gw_options: Mapping[str, Any] = {}
    _gw_timeout: float | None = None
    apply_async: Callable[..., Any]

    @property
    def _gw_task(self) -> Any:
        return self

    def options(self, *, timeout: float | None = None, **options: Any) -> BoundTask:
        """Return the same task with other options for its calls.

        Args:
            timeout: seconds that a caller waits for the answer; ``None`` keeps the present value.
            options: options of Celery's ``apply_async``, such as ``queue`` or ``priority``.

        Returns:
            A bound task; the task itself is unchanged.

        Raises:
            UsageError: if an option resembles a known one and is probably misspelt.
            DeclarationError: if ``timeout`` is not a finite number over 0.
        """
        _refuse_misspelt(options)
        bound = self._gw_timeout if timeout is None else check.positive("timeout", timeout)
        return BoundTask(self._gw_task, self._gw_merged(options), bound)

    def spawn(self, *args: Any, **kwargs: Any) -> calls.Spawned:
        """Send the task without waiting for its answer.

        Args:
            args, kwargs: the task's arguments.

        Returns:
            A handle to ``get``, ``await`` or ``cancel``.

        Raises:
            CallTimeout: if sending takes longer than ``.options(timeout=...)`` seconds.
            UsageError: if the task ignores its result, or ``gw_max_waiting`` calls wait already.
        """
        spawned = self._gw_spawned(args, kwargs)
        spawned._wait_sent()
        return spawned

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task, block until the answer arrives, and return its value or raise its error.

        Args:
            args, kwargs: the task's arguments.

        Raises:
            BlockingCallError: on a running event loop, or inside a task.
            CallTimeout: after ``.options(timeout=...)`` or ``gw_call_timeout`` seconds.
        """
        calls.require_may_block(f"{self._gw_task.name}.remote()")
        bound = self._gw_timeout
        if bound is None:
            bound = conf.read(self._gw_task.app.conf).call_timeout
        return calls.block(self._gw_spawned(args, kwargs)._value(bound))

    async def aremote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task and await the answer without blocking the event loop.

        Args:
            args, kwargs: the task's arguments.

        Raises:
            CallTimeout: after ``.options(timeout=...)`` seconds.
        """
        if self._gw_task.app.conf.task_always_eager:
            self._gw_require_result()
            runtime = execution.started(self._gw_task.app)
            send = functools.partial(self.apply_async, args, kwargs)
            sent = await runtime.call_eagerly(self._gw_task, send)
            return sent.get(disable_sync_subtasks=False)
        return await self._gw_spawned(args, kwargs)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body here if this process serves the task; otherwise send the input.

        A body that calls its own service sends the input if running it here would need a second
        slot.
        """
        runtime = execution.current()
        if runtime is not None and runtime.can_run(self._gw_task):
            return await runtime.run_async(self._gw_task, self._gw_options, args, kwargs)
        return await self.aremote(*args, **kwargs)

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """Enter what the task needs, run its body in this process, and return the answer.

        Args:
            args, kwargs: the task's arguments.
        """
        done = self._gw_task.apply(args, kwargs, throw=True, **self._gw_merged({}))
        return done.get(disable_sync_subtasks=False)

    def _no_canvas(self, *_: Any, **__: Any) -> Any:
        """Refuse ``map``, ``starmap`` and ``chunks``: Celery would run the body without its model.

        Raises:
            UsageError: always, with the code to write instead.
        """
        task = self._gw_task
        service, method = task.gw_service, task.gw_method
        written = f"{service.name}(...).{method.name}" if service.is_class else task.name
        raise errors.UsageError(
            f"{task.name}.map(), .starmap() and .chunks() would call the body one by one in "
            f"a plain Celery task, where its model is not loaded: write group({written}.s(x) for x "
            f"in xs)"
        )

    map = starmap = chunks = _no_canvas

    def _gw_spawned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> calls.Spawned:
        self._gw_require_result()
        app = self._gw_task.app
        if app.conf.task_always_eager:
            sending: calls.Sending = Future()
            sending.set_result(self.apply_async(args, kwargs))
        else:
            send = functools.partial(self.apply_async, args, kwargs)
            sending = calls.watcher(app).submit(send)
        return calls.Spawned(self._gw_task, sending, self._gw_timeout)

    def _gw_merged(self, options: dict[str, Any]) -> dict[str, Any]:
        merged = {**self._gw_options, **options}
        if both := {**self._gw_options.get("headers", {}), **(options.get("headers") or {})}:
            merged["headers"] = both
        return merged

    def _gw_require_result(self) -> None:
        if self._gw_options.get("ignore_result", self._gw_task.ignore_result):
            raise errors.UsageError(
                f"{self._gw_task.name} ignores its result, so there is no answer to wait for: call "
                f".delay(), or declare it with ignore_result=False"
            )


class BoundTask(CallMethods):
    """A task with fixed call options: ``.delay()``, ``await``, ``.remote()``, ``.spawn()``.

    Args:
        task: the Celery task.
        options: options of Celery's ``apply_async`` for every call.
        timeout: seconds that a caller waits for an answer; ``None``: no limit.
    """

    _gw_task: Any = None

    def __init__(self, task: Any, options: Mapping[str, Any], timeout: float | None = None) -> None:
        self._gw_task = task
        self._gw_options = options
        self._gw_timeout = timeout

    def __repr__(self) -> str:
        return f"<BoundTask {self.task.name}>"

    @property
    def task(self) -> Any:
        """The Celery task that the calls run."""
        return self._gw_task

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send the task and return its ``AsyncResult``.

        Args:
            args, kwargs: the task's arguments.
            options: Celery's options for this call; they override the fixed ones.
        """
        return self.task.apply_async(args, kwargs, **self._gw_merged(options))

    def signature(
        self, args: Any = None, kwargs: Any = None, *, immutable: bool = False, **options: Any
    ) -> Any:
        """Return Celery's signature of a call, for chains, groups and chords.

        Args:
            args, kwargs: the task's arguments.
            immutable: ``True`` ignores the result of the previous task in a chain.
            options: Celery's options for this call; they override the fixed ones.
        """
        return self.task.signature(args, kwargs, self._gw_merged(options), immutable=immutable)

    # Celery's own methods; they call our ``apply_async`` and ``signature``.
    delay, s, si = Task.delay, Task.s, Task.si


def _refuse_misspelt(options: Mapping[str, Any]) -> None:
    """Refuse an option that resembles a known one; Celery would send it without a warning.

    Any other unknown option passes: Celery hands it to its publisher, for the broker.
    """
    stamps = options.get("stamped_headers") or ()
    for name, value in options.items():
        if name in _known_options() or name in stamps:
            continue
        if hint := errors.near_miss(name, _known_options(), "{}=", cutoff=0.8):
            raise errors.UsageError(f"options({name}={value!r}): unknown option; {hint}")


@functools.cache
def _known_options() -> frozenset[str]:
    """Return the names of our options, of Celery's and kombu's, and of AMQP's properties."""
    take = (Task.apply_async, Celery.send_task, AMQP.as_task_v2, Producer.publish)
    names = {name for function in take for name in inspect.signature(function).parameters}
    properties = {name for name, _ in amqp.basic_message.Message.PROPERTIES}
    unsaid = {"timeout", "queue", "exchange_type"}
    return frozenset(names | properties | unsaid) - {"self", "args", "kwargs", "options"}


class Handle:
    """The result of ``Cls(...)``: one caller's parameter values, with bound tasks as attributes."""

    # Python mangles names with two underscores, so that they cannot clash with a user's method.
    def __init__(
        self, service: services.Service, tasks: dict[str, Any], values: dict[str, Any]
    ) -> None:
        self.__service = service
        self.__tasks = tasks
        self.__values = parameters.bind(service.name, service.parameters, values)
        self.__options: dict[str, Any] = {}
        if self.__values:
            written = parameters.canonical(self.__values)
            self.__options["headers"] = {headers.PARAMETERS: written}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__values.items())
        return f"{self.__service.name}({shown})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # ``copy`` reads such names before ``__init__`` has run
            raise AttributeError(name)
        if name in self.__tasks:
            return BoundTask(self.__tasks[name], self.__options)
        service = self.__service
        if name in service.enter_hooks or name in service.exit_hooks:
            raise errors.UsageError(
                f"{service.name}.{name} is a hook: the worker calls it when it loads or unloads"
            )
        listed = ", ".join(service.methods)
        raise errors.UnknownAttribute(
            f"{service.name}() has no method {name!r} marked with @gw.method(); it has: {listed}"
        )


class MethodOfClass:
    """Replaces a marked method in its class.

    On an instance, in a replica, it is the plain method. A call on the class lacks parameter
    values; the error shows the code to write.
    """

    def __init__(self, function: AnyFunction, owner: str) -> None:
        setattr(self, markers.FUNCTION, function)
        self._function = function
        self._owner = owner
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__

    def __get__(self, instance: object, owner: type) -> Any:
        return self if instance is None else types.MethodType(self._function, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain function with an instance, as ``super().method`` does."""
        if not args or isinstance(args[0], Handle):
            raise self._refused("(...)")
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _CALLS:
            raise self._refused(f".{name}(...)")
        raise AttributeError(name)

    def _refused(self, call: str) -> errors.UsageError:
        name = self.__name__
        return errors.UsageError(
            f"{self._owner}.{name}{call} needs an instance: write {self._owner}().{name}{call}"
        )


_CALLS = frozenset(name for name in dir(BoundTask) if not name.startswith("_"))


def install(service: services.Service, tasks: dict[str, Any]) -> None:
    """Make ``Cls(...)`` return handles, and refuse calls of the methods on the class itself."""
    cls = service.target
    for name in service.methods:
        setattr(cls, name, MethodOfClass(service.methods[name].function, service.name))

    def make(called: type, *args: Any, **values: Any) -> Any:
        if called is not cls:  # a subclass that is not a service stays an ordinary class
            return object.__new__(called)
        if args:
            raise errors.UsageError(
                f"{service.name}() takes parameters by name: "
                f"{', '.join(service.parameters) or 'it has none'}"
            )
        return Handle(service, tasks, values)

    cls.__new__ = make
    setattr(cls, markers.SERVICE, service)
