"""Result backends that store nothing for a worker that was declared lost: the fence.

The hold of a message names the incarnation of the worker that took it. When other workers declare
this incarnation lost, they set its tombstone, and the input runs again elsewhere. What the lost
worker stores after that, for example when it was frozen and wakes up, is refused. The texts of
errors that a worker stores are cut here, too.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import redis
from celery import states
from celery.app import backends
from celery.backends.base import DisabledBackend
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError
from kombu.utils.encoding import bytes_to_str

from gw_celery import background_thread, codec, errors
from gw_celery.protocol import headers
from gw_celery.transport import find, holds, refusals

logger = logging.getLogger(__name__)

#: Stores a result and notifies its callers, unless there is a tombstone (-1) or a stored SUCCESS
#: (0). ARGV[3], if given, is the value that a caller has read: the script stores nothing over
#: another one (2).
STORE = """
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
if ARGV[3] then
  if (redis.call('GET', KEYS[1]) or '') ~= ARGV[3] then return 2 end
elseif string.find(redis.call('GETRANGE', KEYS[1], 0, 40), '^{"status": ?"SUCCESS"') then
  return 0
end
if tonumber(ARGV[2]) > 0 then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
else redis.call('SET', KEYS[1], ARGV[1]) end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return 1
"""
SHA = hashlib.sha1(STORE.encode(), usedforsecurity=False).hexdigest()
_REFUSED, _CHANGED = -1, 2

#: Content types whose stored results begin with the status, so that the script can read it.
_READABLE = ("application/json", codec.CONTENT_TYPE)
#: Seconds after which a silent Redis counts as lost, in the parent.
_TIMEOUT = 2.0
#: Seconds that the broker may take to say whether there is a tombstone.
_CHECK_TIMEOUT = 1.0
#: Seconds between two attempts to reach a server that is away.
PAUSE = 1.0

_numbers = itertools.count(1)


def install(app: Any, derive: Callable[[Any], Any]) -> None:
    """Make ``app`` use a subclass of its result backend.

    Celery reads the server's address from the same string as the name of the class.

    Args:
        app: the Celery app.
        derive: returns the subclass of a backend class.
    """
    url = app.backend_cls or app.conf.result_backend
    if not isinstance(url, str):
        return
    named, address = backends.by_url(url, app.loader)
    base = getattr(named, "gw_base", named)  # a second worker in this process
    name = f"Backend{next(_numbers)}"
    globals()[name] = derived = derive(base)
    derived.gw_base = base
    # A name instead of the class: Celery 5.6 accepts nothing else.
    app.backend_cls = f"{__name__}:{name}" + (f"+{address}" if address else "")
    # Django's system checks, or a module of the project, may have used the backend already.
    app._backend_cache = None
    vars(app._local).pop("backend", None)


def install_in_parent(app: Any, around: Callable[..., Any]) -> None:
    """Fence what the parent of a pool stores; it must not wait for a Redis that is away.

    Args:
        app: the Celery app.
        around: calls a function with fresh connections to the databases of the project.
    """
    install(app, lambda base: _in_parent(fenced(base), Results(app), around))


def results_of(app: Any) -> Results | None:
    """Return what watches the results' Redis in this parent; ``None`` for another backend."""
    return getattr(app.backend, "gw_results", None)


def fenced(base: Any) -> Any:
    """Return a subclass of a result backend that stores nothing for a worker declared lost.

    Redis checks that in the same script that stores. For another backend we ask the broker's Redis
    before the store, so that a worker that is frozen between the two still stores.
    """
    made = _in_one_script(base) if issubclass(base, RedisBackend) else _after_a_check(base)
    return type(base.__name__, (_Bounded, made), {})


class _Bounded:
    """The part of a worker's result backend that cuts the texts of the errors that it stores."""

    def prepare_exception(self, exc: Any, serializer: Any = None) -> Any:
        prepared = super().prepare_exception(exc, serializer)  # type: ignore[misc]
        if isinstance(prepared, dict):  # a serializer such as pickle gets the exception
            prepared["exc_message"] = errors.cut_arguments(prepared["exc_message"])
        return prepared

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, **more: Any
    ) -> Any:
        if isinstance(traceback, str):
            traceback = errors.cut_traceback(traceback)
        store: Any = super().store_result  # type: ignore[misc]
        return store(task_id, result, state, traceback=traceback, **more)


def close_to(app: Any, incarnation: str, lifetime: int) -> None:
    """Make the results' Redis refuse what a lost worker stores, for ``lifetime`` seconds."""
    if isinstance(app.backend, RedisBackend):
        key = holds.tombstone(find.results_prefix(app.backend), incarnation)
        # On the broker's own Redis, the tombstone exists and names its declarer.
        app.backend.client.set(key, "", ex=lifetime, nx=True)


def is_grouped(backend: Any) -> bool:
    """Return whether children group what they write to this backend into pipelines.

    They do not for a backend derived from Redis, such as Sentinel, or for another one.
    """
    return getattr(backend, "gw_base", type(backend)) is RedisBackend


def _in_one_script(base: Any) -> Any:
    class Fenced(base):
        gw_base = base

        def _store_result(
            self,
            task_id: Any,
            result: Any,
            state: str,
            traceback: Any = None,
            request: Any = None,
            **_: Any,
        ) -> Any:
            meta = self._get_result_meta(result, state, traceback, request)
            meta["task_id"] = bytes_to_str(task_id)
            key, value = self.get_key_for_task(task_id), self.encode(meta)
            self.require_room(value)
            lifetime = self.expires
            if state == states.FAILURE:  # Celery 5.6 has one lifetime
                lifetime = getattr(self, "failure_expires", lifetime)
            keys = [key] if (hold := headers.hold_of(request)) is None else [key, self._tomb(hold)]
            answer = _CHANGED
            while answer == _CHANGED:
                if (seen := self._seen(key)) is None:
                    return result
                answer = self.run_script(len(keys), *keys, value, lifetime or 0, *seen)
            if answer == _REFUSED:
                raise errors.DeclaredLost(task_id, hold)
            return result

        def _seen(self, key: Any) -> list[Any] | None:
            """Return what the script compares with the stored value; ``None``: it is a success."""
            if self.content_type in _READABLE and not getattr(self, "compression", None):
                return []
            stored = self.get(key)
            if stored and self.decode(stored)["status"] == states.SUCCESS:
                return None
            return [stored or ""]

        def require_room(self, value: Any) -> None:
            if isinstance(value, str) and len(value) > self._MAX_STR_VALUE_SIZE:
                # The server would close the connection, and all commands on it would fail.
                raise BackendStoreError(
                    f"a result of {len(value)} characters is too large: Redis takes "
                    f"{self._MAX_STR_VALUE_SIZE}; return a reference to the data"
                )

        def require_alive(self, request: Any) -> None:
            """Raise if the worker was declared lost, before anything is published for an input."""
            hold = headers.hold_of(request)
            if hold is not None and self.exists(self._tomb(hold)):
                raise errors.DeclaredLost(request.get("id"), hold)

        def _tomb(self, hold: str) -> str:
            return holds.tombstone(find.results_prefix(self), headers.incarnation_of(hold))

        def run_script(self, *arguments: Any) -> Any:
            """Run ``STORE``; a restarted server has forgotten it, and learns it with EVAL."""
            try:
                return self.client.evalsha(SHA, *arguments)
            except redis.exceptions.NoScriptError:
                return self.client.eval(STORE, *arguments)

        def exists(self, key: str) -> Any:
            return self.client.exists(key)

    return Fenced


def probe_of(backend: Any) -> tuple[Any, ...]:
    """Return arguments of ``STORE`` that show whether results can be stored."""
    return 1, f"{find.results_prefix(backend)}gw:probe", "", 1


def _after_a_check(base: Any) -> Any:
    class Checked(base):
        def store_result(self, *args: Any, **kwargs: Any) -> Any:
            if not issubclass(base, DisabledBackend):
                self.require_alive(kwargs.get("request"))
            return super().store_result(*args, **kwargs)

        def require_alive(self, request: Any) -> None:
            hold = headers.hold_of(request)
            if hold is not None and self._is_dead(headers.incarnation_of(hold)):
                raise errors.DeclaredLost(request.get("id"), hold)

        def _is_dead(self, incarnation: str) -> bool:
            broker = self._broker
            if broker is None:
                return False
            try:
                tombstone = holds.tombstone(broker.prefix, incarnation)
                return bool(broker.client().exists(tombstone))
            except Exception as exc:  # a broker that is away must not hold up the results
                logger.debug("it is unknown whether this worker was declared lost: %r", exc)
                broker.close()
                return False

        @functools.cached_property
        def _broker(self) -> Any:
            return find.redis_of(self.app, _CHECK_TIMEOUT)

    return Checked


def _in_parent(base: Any, results: Results, around: Callable[..., Any]) -> Any:
    """Return a subclass of a fenced backend that raises at once while its Redis is away."""
    if not issubclass(base, RedisBackend):
        return _connected(base, around)

    class InParent(base):
        gw_results = results

        @functools.cached_property
        def client(self) -> Any:
            return find.results_client(self, _TIMEOUT)

        def get(self, key: Any) -> Any:
            return results.call(super().get, key)

        def run_script(self, *arguments: Any) -> Any:
            return results.call(super().run_script, *arguments)

        def probe(self) -> None:
            """Raise if the server is away, or refuses to write, for now."""
            super().run_script(*probe_of(self))

    InParent.__name__ = base.__name__
    return InParent


def _connected(base: Any, around: Callable[..., Any]) -> Any:
    """Return a subclass of a backend that never uses an old connection to a database.

    Django keeps a connection that its server has ended, and every later store would fail.
    """

    class InParent(base):
        def store_result(self, *args: Any, **kwargs: Any) -> Any:
            return around(super().store_result, *args, **kwargs)

        def on_chord_part_return(self, *args: Any, **kwargs: Any) -> Any:
            return around(super().on_chord_part_return, *args, **kwargs)

        def get_task_meta(self, *args: Any, **kwargs: Any) -> Any:
            return around(super().get_task_meta, *args, **kwargs)

    InParent.__name__ = base.__name__
    return InParent


class Results(background_thread.BackgroundThread):
    """Whether the parent can store results; a thread tries until it can again.

    Args:
        app: the Celery app, with our fenced backend.
    """

    def __init__(self, app: Any) -> None:
        super().__init__("gw-results", "the worker cannot store results", period=math.inf)
        self._app = app
        #: Why results cannot be stored; ``""`` while they can.
        self.reason = ""

    def call(self, command: Callable[..., Any], *arguments: Any) -> Any:
        """Run a command on the results' Redis.

        Raises:
            ResultsUnavailable: if the server is away; at once, if that is known.
        """
        if self.reason:
            raise errors.ResultsUnavailable(self.reason)
        try:
            return command(*arguments)
        except Exception as exc:
            if not refusals.is_outage(exc):
                raise
            self.reason = errors.titled(exc)
            self.start()
            self.wake()
            raise errors.ResultsUnavailable(self.reason) from exc

    def run_round(self) -> None:
        self.period = PAUSE
        if self.reason:
            self._app.backend.probe()
            self.reason = ""
        self.period = math.inf
