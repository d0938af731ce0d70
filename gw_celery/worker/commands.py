"""Remote-control commands in the worker's parent: ours, and guards of Celery's own.

Celery's commands answer "ok" and act later, so that a guard must refuse before they run. Everybody
who reaches the broker can send a command with any arguments.
"""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import platforms
from celery.utils.time import rate
from celery.worker import control

from gw_celery import errors
from gw_celery.declare import gpu
from gw_celery.protocol import headers

if TYPE_CHECKING:
    from gw_celery.worker.plan import Plan

#: Maximum bytes of the name of a queue or exchange, by AMQP.
_LONGEST_NAME = 255


class _Rule(NamedTuple):
    """The values that an argument may have."""

    accepts: Callable[[Any], bool]
    #: Description of them.
    what: str


def _optional(rule: _Rule) -> _Rule:
    return _Rule(lambda value: value is None or rule.accepts(value), f"{rule.what}, or null")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    # A lone surrogate cannot be encoded, and no broker has such a name.
    is_short = isinstance(value, str) and len(value) <= _LONGEST_NAME
    return is_short and 0 < len(value.encode(errors="replace")) <= _LONGEST_NAME


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_amount(value: Any) -> bool:
    number = headers.finite(value)
    return number is not None and number >= 0


def _is_rate(value: Any) -> bool:
    try:
        return _is_amount(rate(value) if isinstance(value, str) else value)
    except (ValueError, KeyError):
        return False


def _is_signal(value: Any) -> bool:
    if isinstance(value, str):
        return value.isupper() and bool(platforms.signals.supported(value))
    return _is_positive(value) and value < platforms.signals.signum("SIGRTMAX")


def _is_revocations(value: Any) -> bool:
    """Return whether these are revoked ids, as Celery 5.7 or, with times, 5.6 sends them."""
    times = value.values() if isinstance(value, dict) else ()
    return all(map(_is_amount, times)) if times else isinstance(value, dict) or _is_texts(value)


def _is_stamps(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_text(stamp) or _is_texts(stamp) for stamp in value.values())
    return _is_texts(value) and all("=" in stamp for stamp in value)


_TEXT = _optional(_Rule(_is_text, "text"))
_NAME = _Rule(_is_name, f"a name of 1 to {_LONGEST_NAME} bytes")
_TEXTS = _optional(_Rule(_is_texts, "a list of texts"))
_IDS = _optional(_Rule(lambda value: _is_text(value) or _is_texts(value), "an id or a list of ids"))
_FLAG = _optional(_Rule(lambda value: isinstance(value, bool), "true or false"))
_COUNT = _optional(_Rule(_is_count, "an int, 0 at least"))
_AMOUNT = _optional(_Rule(_is_amount, "a number, 0 at least"))
_MAPPING = _optional(_Rule(lambda value: isinstance(value, dict), "a mapping"))
_RATE = _Rule(_is_rate, 'a number from 0, or text such as "10/m"')
#: The arguments of Celery's commands, each of which has one meaning in all of them.
_RULES = {
    "queue": _NAME,
    **dict.fromkeys(("exchange", "routing_key", "exchange_type", "alias"), _optional(_NAME)),
    **dict.fromkeys(("queue_arguments", "binding_arguments", "consumer_arguments"), _MAPPING),
    **dict.fromkeys(("durable", "exclusive", "auto_delete", "no_ack", "no_declare"), _FLAG),
    **dict.fromkeys(("expires", "message_ttl", "soft", "hard"), _AMOUNT),
    **dict.fromkeys(("max_length", "max_length_bytes", "max_priority", "max", "min"), _COUNT),
    **dict.fromkeys(("num", "max_depth", "samples"), _COUNT),
    **dict.fromkeys(("terminate", "reload", "builtins", "with_defaults", "safe"), _FLAG),
    **dict.fromkeys(("task_id", "ids"), _IDS),
    **dict.fromkeys(("msg", "type", "id", "topic", "from_node"), _TEXT),
    **dict.fromkeys(("modules", "taskinfoitems"), _TEXTS),
    "n": _Rule(_is_positive, "an int, 1 at least"),
    "task_name": _Rule(_is_text, "text"),
    "rate_limit": _optional(_RATE),
    "signal": _optional(_Rule(_is_signal, "the name or the number of a signal")),
    "headers": _Rule(_is_stamps, 'a mapping of stamps, or a list of "key=value"'),
    "revoked": _optional(_Rule(_is_revocations, "a list of ids")),
}


def install() -> None:
    """Register our commands; only for a worker with the GPU pool."""
    install_ticks()
    control.inspect_command()(gw_status)
    for command in (gw_drain, gw_restart):
        control.control_command(args=[("replica", int)], signature="[replica]")(command)


def install_ticks() -> None:
    """Register the broadcast commands in every worker: one without them would log errors."""
    for command in (gw_probe_tick, gw_benchmark_tick, gw_best_score):
        control.control_command()(command)


def describe() -> None:
    """Register the commands with ``celery inspect`` and ``control``, without their handlers.

    The same program starts workers without the GPU pool, which must not get the handlers.
    """
    carried_out = dict(control.Panel.data)
    install()
    for name in control.Panel.data.keys() - carried_out.keys():
        del control.Panel.data[name]


class _Checked:
    """A command whose arguments are checked before it runs."""

    def __init__(self, command: Callable[..., Any]) -> None:
        self._command = command
        self._declared = inspect.signature(command).parameters

    def __call__(self, state: Any, **arguments: Any) -> Any:
        if (why := self._refusal(arguments)) is not None:
            return control.nok(errors.printable(why))
        return self._command(state, **arguments)

    def _refusal(self, arguments: Mapping[str, Any]) -> str | None:
        for name, value in arguments.items():
            if (rule := _RULES.get(name)) is not None and not rule.accepts(value):
                return f"{name}={errors.cut(repr(value), 100)}: must be {rule.what}"
            if rule is None and name not in self._declared:
                return f"{name}: unknown argument"
        return None


def check_arguments() -> None:
    """Check the arguments of all registered commands, except the project's own ones."""
    for name, command in control.Panel.data.items():
        module = getattr(command, "__module__", None) or ""
        is_known = module.startswith(("celery.", "gw_celery."))
        if is_known and not isinstance(command, _Checked):
            control.Panel.data[name] = _Checked(command)


def gw_status(state: Any) -> dict[str, Any]:
    """Show the replicas of a worker: state, pid, slots, in flight, restarts, last error."""
    answer: dict[str, Any] = state.consumer.pool.snapshot().as_json()
    return answer


def gw_drain(state: Any, replica: int | None = None) -> Any:
    """Drain one replica, or all; they stay stopped until gw_restart."""
    return _applied("drain", state.consumer.pool.hold, state, replica)


def gw_restart(state: Any, replica: int | None = None) -> Any:
    """Replace the child of one replica, or of all in turn, by draining."""
    return _applied("restart", state.consumer.pool.restart, state, replica)


def gw_probe_tick(state: Any) -> Any:
    """Record a tick of beat; probes follow their own periods."""
    return _ticked(state, "probe_tick")


def gw_benchmark_tick(state: Any) -> Any:
    """Measure the scores of all replicas again, when they are idle."""
    return _ticked(state, "benchmark_tick")


def _ticked(state: Any, tick: str) -> Any:
    if not hasattr(state.consumer.pool, tick):
        return control.ok("nothing to do: no GPU pool")
    getattr(state.consumer.pool, tick)()
    return control.ok("tick")


def gw_best_score(state: Any, worker: str = "", scores: Any = None) -> None:
    """Do nothing: older workers beside this one broadcast their scores with this command."""


def _listed(numbers: list[int]) -> str:
    """Return the names of replicas; a bare number would read as their count."""
    if len(numbers) < 2:
        return f"replica {numbers[0]}" if numbers else "none"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"replicas {numbers[0]} to {numbers[-1]}"
    return f"replicas {', '.join(map(str, numbers))}"


def _applied(
    what: str, steer: Callable[[int | None], None], state: Any, replica: int | None
) -> Any:
    numbers = [seen.number for seen in state.consumer.pool.snapshot().replicas]
    # Python takes True for 1.
    if replica is not None and (type(replica) is not int or replica not in numbers):
        return control.nok(f"there is no replica {replica!r}: this worker has {_listed(numbers)}")
    steer(replica)
    return control.ok(f"{what}: {'all replicas' if replica is None else f'replica {replica}'}")


def guard_queues(plan: Plan) -> None:
    """Make ``add_consumer`` refuse a service queue that ``plan`` has not loaded."""
    declared = {queue for queues in plan.families.values() for queue in queues}
    loaded = {service.queue for service in plan.served}
    original = control.add_consumer

    @functools.wraps(original)
    def add_consumer(state: Any, queue: str, *args: Any, **options: Any) -> Any:
        if queue not in loaded and (queue in declared or gpu.is_family(queue)):
            return control.nok(
                f"{queue}: this worker has not loaded its service; it serves "
                f"{', '.join(sorted(loaded))}. Start a worker with -Q {queue}"
            )
        return original(state, queue, *args, **options)

    control.Panel.data["add_consumer"] = add_consumer


def guard_size() -> None:
    """Make ``pool_grow`` and ``autoscale`` refuse more replicas than this worker can have.

    With our autoscaler, ``pool_grow`` and ``pool_shrink`` widen its bounds, as in Celery 4.
    """
    _guard_resize(control.pool_grow, "force_scale_up", sign=1)
    _guard_resize(control.pool_shrink, "force_scale_down", sign=-1)
    original = control.autoscale

    @functools.wraps(original)
    def autoscale(state: Any, max: Any = None, min: Any = None) -> Any:  # noqa: A002
        wanted = builtins.max(max or 0, min or 0)
        if (why := state.consumer.pool.refusal(wanted)) is not None:
            return control.nok(why)
        return original(state, max=max, min=min)

    control.Panel.data["autoscale"] = autoscale


def _guard_resize(original: Callable[..., Any], how: str, *, sign: int) -> None:
    @functools.wraps(original)
    def resize(state: Any, n: int = 1, **options: Any) -> Any:
        pool = state.consumer.pool
        if (why := pool.refusal(pool.limit + sign * n)) is not None:
            return control.nok(why)
        force = getattr(state.consumer.controller.autoscaler, how, None)
        if force is None:  # no autoscaler, or Celery's own
            return original(state, n, **options)
        force(n)
        return control.ok(f"now {pool.limit} slots")

    control.Panel.data[original.__name__] = resize
