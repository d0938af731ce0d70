"""The states of a request: which may follow which, and what follows from each."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gw_celery.pool.request_table import NEXT_STATES, RequestTable, Settlement, Slots, State
from gw_celery.pool.requests import PoolRequest
from tests.pool_harness import Child, Harness, Outcome, Request

SETTLED = (State.STOPPING, State.ENDED)
#: A way to each state.
WAYS: dict[State | None, list[State]] = {
    None: [],
    State.CHECKING: [State.CHECKING],
    State.WAITING: [State.WAITING],
    State.SENT: [State.WAITING, State.SENT],
    State.RUNNING: [State.WAITING, State.SENT, State.RUNNING],
    State.STOPPING: [State.WAITING, State.SENT, State.STOPPING],
    State.ENDED: [State.WAITING, State.ENDED],
}


class Table:
    """A table with one request, and a child that takes it."""

    def __init__(self) -> None:
        self.table = RequestTable(5.0)
        self.child: Any = SimpleNamespace(slots=Slots({"embed": 2, "": 1}), requests={})
        pool: Any = None
        options: Any = {"soft_timeout": 1.0, "timeout": 3.0}
        self.request = PoolRequest(7, ("n", "id", {}), "embed", options, pool)

    def move(self, to: State) -> None:
        is_settled = to in SETTLED and self.request.settlement is None
        settlement = Settlement.ANSWERED if is_settled else None
        child = self.child if to is State.SENT else None
        self.table.move(self.request, to, 10.0, settlement=settlement, child=child)

    def at(self, state: State | None) -> Table:
        for step in WAYS[state]:
            self.move(step)
        return self

    def picture(self) -> tuple[Any, ...]:
        """Everything that a move may change."""
        table, request = self.table, self.request
        return (
            *(request.state, request.settlement, request.child),
            *(len(table.queue), self.child.slots.total_taken, list(self.child.requests)),
            *(table.tallies(), table.limits.next_at()),
            [table.count(state) for state in State if state is not State.ENDED],
        )


@pytest.mark.parametrize("before", WAYS, ids=str)
@pytest.mark.parametrize("to", State, ids=str)
def test_only_the_states_of_the_table_follow_and_a_refused_move_changes_nothing(
    before: State | None, to: State
) -> None:
    made = Table().at(before)
    picture = made.picture()
    if to in NEXT_STATES[before]:
        made.move(to)
        assert made.request.state is to
    else:
        with pytest.raises(ValueError, match="goes from"):
            made.move(to)
        assert made.picture() == picture


@pytest.mark.parametrize("state", State, ids=str)
def test_queue_slot_and_limits_follow_the_state(state: State) -> None:
    made = Table().at(state)
    limits = {State.RUNNING: 11.0, State.STOPPING: 15.0}
    has_slot = state in (State.SENT, State.RUNNING, State.STOPPING)
    assert len(made.table.queue) == (state is State.WAITING)
    assert made.child.slots.total_taken == has_slot
    assert list(made.child.requests) == [7] * has_slot
    assert (made.request.child is made.child) is has_slot
    assert made.table.limits.next_at() == limits.get(state, math.inf)


@pytest.mark.parametrize("state", [State.CHECKING, State.WAITING, State.SENT, State.RUNNING])
def test_an_input_is_settled_when_it_stops_or_ends_and_not_before(state: State) -> None:
    made = Table().at(state)
    for to in NEXT_STATES[state]:
        settlement = None if to in SETTLED else Settlement.RETURNED
        child = made.child if to is State.SENT else None
        with pytest.raises(ValueError, match="is None and gets"):
            made.table.move(made.request, to, 10.0, settlement=settlement, child=child)
    assert made.request.settlement is None


def test_an_input_is_settled_once_and_its_slot_comes_back_when_the_child_lets_go() -> None:
    made = Table().at(State.STOPPING)
    with pytest.raises(ValueError, match="ANSWERED and gets"):
        made.table.move(made.request, State.ENDED, 10.0, settlement=Settlement.RETURNED)
    assert made.child.slots.total_taken == 1
    made.move(State.ENDED)
    assert (made.request.settlement, made.child.slots.total_taken) == (Settlement.ANSWERED, 0)


# -- whatever happens in a pool --

IN_A_CHILD = (State.SENT, State.RUNNING, State.STOPPING)


class Pool(RuleBasedStateMachine):
    """Inputs come, are revoked, end and reach limits; children die; the broker is lost."""

    @initialize(replicas=st.integers(1, 2))
    def begin(self, replicas: int) -> None:
        self.harness = Harness({"work": 2, "batch": 2}, replicas=replicas, cancel_timeout=5.0)
        self.running = self.harness.running()
        self.running.__enter__()
        for child in self.harness.children:
            child.ready()

    def teardown(self) -> None:
        if hasattr(self, "running"):
            self.running.__exit__(None, None, None)

    @property
    def table(self) -> RequestTable:
        table: RequestTable = self.harness.pool.supervisor.requests.table
        return table

    def held(self, *states: State) -> list[tuple[Request, Child]]:
        """What children hold in any of these states."""
        handles = {request.handle: request for request in self.harness.requests}
        children = {child.pid: child for child in self.harness.children}
        return [
            (handles[held], children[held.child.pid])
            for held in self.table.of(*states)
            if held.child is not None and children[held.child.pid].is_alive
        ]

    # -- what happens --

    @rule(
        task=st.sampled_from(["work", "work", "batch", "plain"]),
        is_redelivered=st.booleans(),
        hard=st.sampled_from([None, 1.0, 30.0]),
        twin=st.integers(0, 5),
    )
    def submit(self, task: str, is_redelivered: bool, hard: float | None, twin: int) -> None:
        earlier = self.harness.requests[-twin:][:1] if twin else []
        task_id = earlier[0].id if earlier and is_redelivered else None
        soft = None if hard is None else hard / 2
        self.harness.submit(task, task_id, is_redelivered=is_redelivered, hard=hard, soft=soft)

    @precondition(lambda self: self.held(State.SENT, State.STOPPING))
    @rule(data=st.data())
    def begin_one(self, data: st.DataObject) -> None:
        request, child = data.draw(st.sampled_from(self.held(State.SENT, State.STOPPING)))
        child.accept(request)

    @precondition(lambda self: self.held(*IN_A_CHILD))
    @rule(data=st.data(), how=st.sampled_from(["done", "error", "retry", "gone"]))
    def end_one(self, data: st.DataObject, how: str) -> None:
        request, child = data.draw(st.sampled_from(self.held(*IN_A_CHILD)))
        if how == "retry":
            child.error(request, outcome=Outcome.RETRY)
        else:
            getattr(child, how)(request)

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data(), terminate=st.booleans())
    def revoke(self, data: st.DataObject, terminate: bool) -> None:
        request = data.draw(st.sampled_from(self.harness.requests[-8:]))
        self.harness.revoke(request, terminate=terminate)

    @precondition(lambda self: any(child.is_alive for child in self.harness.children))
    @rule(data=st.data(), how=st.sampled_from(["die", "garbage"]))
    def lose_a_child(self, data: st.DataObject, how: str) -> None:
        alive = [child for child in self.harness.children if child.is_alive]
        getattr(data.draw(st.sampled_from(alive)), how)()

    @rule(seconds=st.sampled_from([0.5, 2.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.harness.advance(seconds)
        for child in self.harness.children:
            if child.is_alive and not any(child.runs):
                child.ready()

    @rule()
    def lose_the_broker(self) -> None:
        self.harness.pool.flush()

    @rule(number=st.integers(0, 1))
    def restart(self, number: int) -> None:
        self.harness.pool.restart(number)

    # -- what holds --

    @invariant()
    def slots_in_use_are_those_of_what_children_hold(self) -> None:
        if hasattr(self, "harness"):
            children = self.harness.pool.supervisor.children()
            used = sum(child.slots.total_taken for child in children)
            assert used == self.table.count(*IN_A_CHILD)
            assert used == sum(len(child.requests) for child in children)

    @invariant()
    def what_arrived_is_somewhere(self) -> None:
        if not hasattr(self, "harness"):
            return
        counters = self.table.tallies().values()
        for service in counters:
            now = service.waiting_inputs + service.running_inputs
            assert service.arrived_inputs == now + service.served_inputs + service.given_back_inputs
        waiting = self.table.count(State.CHECKING, State.WAITING)
        assert sum(service.waiting_inputs for service in counters) == waiting
        running = self.table.count(State.SENT, State.RUNNING)
        assert sum(service.running_inputs for service in counters) == running
        assert len(self.table.queue) == self.table.count(State.WAITING)

    @invariant()
    def celery_hears_of_one_end_at_most_and_of_no_more_after_it(self) -> None:
        starts = ("accepted", "soft limit")
        for request in self.harness.requests if hasattr(self, "harness") else ():
            ends = [what for what in request.heard if what not in starts]
            assert len([what for what in ends if what != "revoked"]) <= 1, request
            assert request.heard.count("accepted") <= 1, request
            if ends:
                assert request.heard[-1] not in starts, request


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase
