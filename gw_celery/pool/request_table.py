"""The pool's requests by state, in the worker's parent; the caller passes the time.

The state of a request decides its place in a queue, its slot, its time limits and its counters.
"""

from __future__ import annotations

import collections
import enum
import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from gw_celery.declare import services
from gw_celery.protocol import headers, snapshot

if TYPE_CHECKING:
    from gw_celery.pool.child_process import ChildProcess
    from gw_celery.pool.requests import PoolRequest

#: Weight of the newest input in the moving average of workloads.
_NEWEST = 0.05
#: Number of entries below which stale limits are kept.
_SLACK = 256


class State(enum.Enum):
    #: Redelivered, or a suspect: the pool reads how many children it has killed.
    CHECKING = enum.auto()
    #: Waits for a slot.
    WAITING = enum.auto()
    #: In a child, before its start; it may gather there for a batch.
    SENT = enum.auto()
    #: Its child has reported the start, from which its time limits count.
    RUNNING = enum.auto()
    #: Settled, but its child still holds it and its slot.
    STOPPING = enum.auto()
    #: The pool does not hold it any more.
    ENDED = enum.auto()


class Settlement(enum.Enum):
    """The only answer about an input to Celery, and through Celery to the broker."""

    #: Celery knows the outcome, and acknowledges or rejects the message.
    ANSWERED = enum.auto()
    #: There is no answer: the broker delivers the message again.
    RETURNED = enum.auto()


class Result(enum.Enum):
    """How a settled input counts."""

    #: Served, and returned a value.
    VALUE = enum.auto()
    #: Served, without a value.
    NO_VALUE = enum.auto()
    #: As NO_VALUE: the input had waited too long, and its body did not run.
    REFUSED = enum.auto()
    #: Did not finish here: lost, revoked, expired, or returned to the broker.
    GIVEN_BACK = enum.auto()


class Stage(enum.IntEnum):
    """The counter of an input; an index, because a dict by enum is several times slower."""

    WAITING = 0
    RUNNING = 1
    SERVED = 2
    GIVEN_BACK = 3


#: The states that may follow each state; ``None`` is the state of a new message.
NEXT_STATES: Mapping[State | None, frozenset[State]] = {
    None: frozenset({State.CHECKING, State.WAITING, State.ENDED}),
    State.CHECKING: frozenset({State.WAITING, State.ENDED}),
    State.WAITING: frozenset({State.SENT, State.ENDED}),
    # Back to WAITING if its child is lost before the start.
    State.SENT: frozenset({State.RUNNING, State.WAITING, State.STOPPING, State.ENDED}),
    State.RUNNING: frozenset({State.STOPPING, State.ENDED}),
    State.STOPPING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}
_IN_A_CHILD = frozenset({State.SENT, State.RUNNING, State.STOPPING})
_STAGES: Mapping[State | None, Stage] = {
    State.CHECKING: Stage.WAITING,
    State.WAITING: Stage.WAITING,
    **dict.fromkeys(_IN_A_CHILD, Stage.RUNNING),
}
_SETTLED = frozenset({State.STOPPING, State.ENDED})


class RequestTable:
    """The requests of a pool, with their queue, counters and limits; only ``move`` changes them.

    It calls no outside code. A callback of Celery that calls the pool again therefore finds
    consistent data.

    Args:
        cancel_timeout: seconds that a child may take to release an input after the order to stop.
    """

    def __init__(self, cancel_timeout: float) -> None:
        self.queue = Queue()
        #: Counters by service.
        self.counters: dict[str, Counters] = collections.defaultdict(Counters)
        self.limits = Limits()
        #: Whether a move, or the acceptance of an input, is in progress; only a signal handler can
        #: see that.
        self.is_moving = False
        self._cancel_timeout = cancel_timeout
        self._by_state: dict[State, dict[int, PoolRequest]] = {
            state: {} for state in State if state is not State.ENDED
        }

    def of(self, *states: State) -> list[PoolRequest]:
        """Return the requests in any of ``states``, in the order of ``states``."""
        return [request for state in states for request in self._by_state[state].values()]

    def count(self, *states: State) -> int:
        return sum(len(self._by_state[state]) for state in states)

    def tallies(self) -> dict[str, snapshot.Counters]:
        return {service: counters.as_snapshot() for service, counters in self.counters.items()}

    def move(
        self,
        request: PoolRequest,
        to: State,
        at: float,
        *,
        settlement: Settlement | None = None,
        result: Result = Result.GIVEN_BACK,
        child: ChildProcess | None = None,
    ) -> None:
        """Move a request to its next state.

        Args:
            request: the request.
            to: one of ``NEXT_STATES`` of its current state.
            at: the current time.
            settlement: the answer to Celery, if this move settles the request.
            result: how the request then counts.
            child: the child that takes it, for SENT.

        Raises:
            ValueError: if ``to`` cannot follow, or the request is settled twice or ends unsettled.
        """
        was_moving, self.is_moving = self.is_moving, True
        try:
            before, settled = request.state, request.settlement
            if to not in NEXT_STATES[before] or (child is None) is (to is State.SENT):
                raise ValueError(f"{request.name}[{request.task_id}] goes from {before} to {to}")
            if (settlement is not None) is (settled is not None or to not in _SETTLED):
                raise ValueError(
                    f"{request.name}[{request.task_id}] is {settled} and gets {settlement}"
                )

            if before is not None:
                del self._by_state[before][request.number]
            if to is not State.ENDED:
                self._by_state[to][request.number] = request
            request.state, request.settlement = to, settlement or settled
            self._count(request, before, at, result if settlement else None)

            if before is State.WAITING:
                self.queue.remove(request)
            elif to is State.WAITING:
                self.queue.put(request, is_first=before is State.SENT)

            if child is not None:
                request.child, request.sent_at = child, at
                child.requests[request.number] = request
                child.slots.take(request.service, runs_alone=request.runs_alone)
            elif request.child is not None and to not in _IN_A_CHILD:
                del request.child.requests[request.number]
                request.child.slots.give_back(request.service)
                request.child = None

            if to is State.RUNNING:
                self.limits.begin(request, at)
            elif to is State.STOPPING:
                self.limits.add(at + self._cancel_timeout, request, Limit.GRACE)
        finally:
            self.is_moving = was_moving

    def _count(
        self, request: PoolRequest, before: State | None, at: float, result: Result | None
    ) -> None:
        to = request.state
        if not request.is_work or (before is None and to is State.ENDED):
            return  # a task of beat, or an invalid message
        counters = self.counters[request.service]
        if before is None:
            counters.arrive(request.workload)
        elif result is not None:
            stage = _STAGES[before]
            busy = at - request.sent_at if stage is Stage.RUNNING else 0.0
            counters.settle(request.workload, stage, result, busy)
        elif to in _STAGES and _STAGES[before] is not _STAGES[to]:
            counters.move(request.workload, _STAGES[before], _STAGES[to])


class Slots:
    """The slots of one child: how many inputs of each service it holds, and may hold."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._slots = slots
        self._taken: collections.Counter[str] = collections.Counter()
        self.total_taken = 0
        #: Services whose readiness probes fail: they take no new inputs here.
        self.unready: set[str] = set()
        #: Whether a suspect runs here; the child then takes no other input.
        self.is_alone = False

    def serves(self, service: str) -> bool:
        """Return whether inputs of a service may start here if a slot is free."""
        return self._key(service) not in self.unready

    def has_free(self, service: str) -> bool:
        key = self._key(service)
        return self.serves(service) and self._taken[key] < self._slots[key]

    def take(self, service: str, *, runs_alone: bool = False) -> None:
        self._taken[self._key(service)] += 1
        self.total_taken += 1
        self.is_alone = self.is_alone or runs_alone

    def give_back(self, service: str) -> None:
        self._taken[self._key(service)] -= 1
        self.total_taken -= 1
        if self.total_taken == 0:
            self.is_alone = False

    def _key(self, service: str) -> str:
        # A task of a service that this worker does not serve fails in the child, with a clear
        # error.
        return service if service in self._slots else services.PLAIN


class Queue:
    """Inputs that wait for a slot, in order of arrival within each service.

    Suspects (inputs that were in flight when a child died) run one at a time, in a child that holds
    no other input.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, collections.deque[PoolRequest]] = {}
        self._suspects: collections.deque[PoolRequest] = collections.deque()
        #: The child reserved for the first suspect: it takes no new input until it is empty.
        self._reserved: ChildProcess | None = None

    def __len__(self) -> int:
        return len(self._suspects) + sum(map(len, self._waiting.values()))

    def of(self, service: str) -> list[PoolRequest]:
        """Return the waiting inputs of a service, without suspects."""
        return list(self._waiting.get(service, ()))

    def by_service(self) -> dict[str, int]:
        """Return the number of waiting inputs by service, without suspects."""
        return {service: len(queue) for service, queue in self._waiting.items()}

    def put(self, waiting: PoolRequest, *, is_first: bool = False) -> None:
        """Add an input; ``is_first`` puts it first, after the loss of its child."""
        queue = self._queue_of(waiting)
        (queue.appendleft if is_first else queue.append)(waiting)

    def remove(self, waiting: PoolRequest) -> None:
        self._queue_of(waiting).remove(waiting)

    def assign(
        self, children: Sequence[ChildProcess]
    ) -> Iterator[tuple[PoolRequest, ChildProcess]]:
        """Yield the inputs that can start now, each with its child.

        Args:
            children: the children that may get inputs. The caller removes each input and takes its
                slot before it asks for the next.
        """
        if not self._suspects or self._reserved not in children:
            self._reserved = None
        if self._suspects and not any(child.slots.is_alone for child in children):
            if self._reserved is None:
                able = [
                    child for child in children if child.slots.serves(self._suspects[0].service)
                ]
                self._reserved = min(able, key=_load, default=None)
            if self._reserved is not None and self._reserved.slots.total_taken == 0:
                yield self._suspects[0], self._reserved
                self._reserved = None  # the child has the suspect now, or the suspect was revoked
        for service, queue in list(self._waiting.items()):
            while queue:
                able = [
                    child
                    for child in children
                    if child is not self._reserved
                    and not child.slots.is_alone
                    and child.slots.has_free(service)
                ]
                if not able:
                    break
                yield queue[0], min(able, key=_load)

    def _queue_of(self, waiting: PoolRequest) -> collections.deque[PoolRequest]:
        if waiting.runs_alone:
            return self._suspects
        return self._waiting.setdefault(waiting.service, collections.deque())


def _load(child: ChildProcess) -> int:
    return child.slots.total_taken


class Limit(enum.Enum):
    SOFT = "soft"
    HARD = "hard"
    #: The child must have released the stopped input by then.
    GRACE = "grace"


class Limits:
    """A heap of the time limits of running and stopping inputs; it may hold stale entries."""

    def __init__(self) -> None:
        #: Entries: the time, a number that breaks ties, the input, the limit.
        self._heap: list[tuple[float, int, PoolRequest, Limit]] = []
        self._count = itertools.count()
        self._clean_up_at = _SLACK

    def begin(self, request: PoolRequest, now: float) -> None:
        request.hard_limit_at = now + (request.hard_limit or math.inf)
        if request.soft_limit:
            self.add(now + request.soft_limit, request, Limit.SOFT)
        if request.hard_limit:
            self.add(request.hard_limit_at, request, Limit.HARD)

    def clear(self) -> None:
        self._heap.clear()

    def due(self, now: float) -> Iterator[tuple[PoolRequest, Limit]]:
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if _is_live(entry):
                yield entry[2], entry[3]

    def next_at(self) -> float:
        """Return the time of the next limit; infinite without one."""
        while self._heap and not _is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def add(self, when: float, request: PoolRequest, limit: Limit) -> None:
        # Most inputs end long before their limits: otherwise the heap would grow for minutes.
        if len(self._heap) >= self._clean_up_at:
            self._heap = [entry for entry in self._heap if _is_live(entry)]
            heapq.heapify(self._heap)
            self._clean_up_at = _SLACK + 2 * len(self._heap)
        heapq.heappush(self._heap, (when, next(self._count), request, limit))


def _is_live(entry: tuple[float, int, PoolRequest, Limit]) -> bool:
    _, _, request, limit = entry
    return request.state is (State.STOPPING if limit is Limit.GRACE else State.RUNNING)


class Counters:
    """The counters of one service. Each input is settled once, and does not move afterwards."""

    def __init__(self) -> None:
        self._workload = [0.0] * len(Stage)
        self._inputs = [0] * len(Stage)
        self._arrived = 0.0
        self._arrived_inputs = 0
        self._mean = headers.DEFAULT_WORKLOAD
        self._busy = 0.0
        self._failed = 0.0
        self._refused = 0.0
        self._refused_inputs = 0

    def arrive(self, workload: float) -> None:
        self._mean += (_NEWEST if self._arrived_inputs else 1.0) * (workload - self._mean)
        self._arrived += workload
        self._arrived_inputs += 1
        self._workload[Stage.WAITING] += workload
        self._inputs[Stage.WAITING] += 1

    def move(self, workload: float, before: Stage, stage: Stage) -> None:
        """Count an input that gets a slot, or that loses its slot before the start."""
        self._inputs[before] -= 1
        # Rounding errors must not accumulate over the life of the worker.
        self._workload[before] = self._workload[before] - workload if self._inputs[before] else 0.0
        self._workload[stage] += workload
        self._inputs[stage] += 1

    def settle(self, workload: float, before: Stage, result: Result, busy: float = 0.0) -> None:
        """Count an input that is answered or given back.

        Args:
            workload: workload of the input.
            before: the stage in which it counted until now.
            result: how it ended.
            busy: seconds for which it held a slot.
        """
        if result is Result.GIVEN_BACK:
            self.move(workload, before, Stage.GIVEN_BACK)
            return
        self.move(workload, before, Stage.SERVED)
        self._busy += busy
        if result is not Result.VALUE:
            self._failed += workload
        if result is Result.REFUSED:
            self._refused += workload
            self._refused_inputs += 1

    def as_snapshot(self) -> snapshot.Counters:
        waiting, running, served, given_back = (max(0.0, value) for value in self._workload)
        return snapshot.Counters(
            arrived=self._arrived,
            served=served,
            failed=self._failed,
            refused=self._refused,
            refused_inputs=self._refused_inputs,
            waiting=waiting,
            running=running,
            given_back=given_back,
            arrived_inputs=self._arrived_inputs,
            served_inputs=self._inputs[Stage.SERVED],
            waiting_inputs=self._inputs[Stage.WAITING],
            running_inputs=self._inputs[Stage.RUNNING],
            given_back_inputs=self._inputs[Stage.GIVEN_BACK],
            mean=self._mean,
            busy=self._busy,
        )
