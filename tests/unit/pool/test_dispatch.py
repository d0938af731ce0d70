from __future__ import annotations

import collections
import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gw_celery.declare import services
from gw_celery.pool.request_table import Queue, Slots

SLOTS = {"embed": 2, "classify": 1, services.PLAIN: 1}


@dataclasses.dataclass(eq=False)
class Input:
    number: int
    service: str = "embed"
    runs_alone: bool = False


class Child:
    def __init__(self, slots: dict[str, int] = SLOTS) -> None:
        self.slots = Slots(slots)
        self.held: list[Input] = []

    def take(self, one: Input) -> None:
        self.held.append(one)
        self.slots.take(one.service, runs_alone=one.runs_alone)

    def end(self, one: Input) -> None:
        self.held.remove(one)
        self.slots.give_back(one.service)


def assigned(waiting: Queue, *children: Child) -> list[tuple[int, int]]:
    """Start what can start; pairs of an input's number and a child's index."""
    pairs = []
    for given, child in waiting.assign(children):
        waiting.remove(given)
        child.take(given)
        pairs.append((given.number, children.index(child)))
    return pairs


def waiting_for(*inputs: Input) -> Queue:
    waiting = Queue()
    for one in inputs:
        waiting.put(one)
    return waiting


def test_inputs_of_a_service_start_in_the_order_in_which_they_came() -> None:
    waiting = waiting_for(*(Input(number) for number in range(5)))
    child = Child()
    assert assigned(waiting, child) == [(0, 0), (1, 0)]
    child.end(child.held[1])
    assert assigned(waiting, child) == [(2, 0)]
    assert [one.number for one in waiting.of("embed")] == [3, 4]


def test_a_full_service_holds_up_no_other() -> None:
    waiting = waiting_for(Input(0), Input(1), Input(2), Input(3, "classify"), Input(4, ""))
    assert assigned(waiting, Child()) == [(0, 0), (1, 0), (3, 0), (4, 0)]
    assert waiting.by_service() == {"embed": 1, "classify": 0, "": 0}


def test_inputs_are_spread_over_the_children() -> None:
    waiting = waiting_for(*(Input(number) for number in range(4)))
    assert assigned(waiting, Child(), Child()) == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_a_task_of_a_service_that_is_not_served_takes_a_plain_slot() -> None:
    waiting = waiting_for(Input(0, "elsewhere"), Input(1, ""), Input(2, "other"))
    child = Child()
    assert assigned(waiting, child) == [(0, 0)]
    child.end(child.held[0])
    assert child.slots.total_taken == 0
    assert len(assigned(waiting, child)) == 1


def test_a_service_that_is_not_ready_in_a_child_starts_in_the_others_only() -> None:
    waiting = waiting_for(Input(0), Input(1), Input(2, "classify"))
    unready, other = Child(), Child({"embed": 1, "classify": 1, services.PLAIN: 1})
    unready.slots.unready.add("embed")
    assert assigned(waiting, unready, other) == [(0, 1), (2, 0)]
    unready.slots.unready.clear()
    assert assigned(waiting, unready, other) == [(1, 0)]


def test_a_suspect_waits_for_a_child_where_its_service_is_ready() -> None:
    waiting = waiting_for(Input(0, runs_alone=True), Input(1, "classify"))
    unready, other = Child(), Child()
    unready.slots.unready.add("embed")
    assert assigned(waiting, unready) == [(1, 0)]
    assert assigned(waiting, unready, other) == [(0, 1)]


def test_nothing_starts_without_children() -> None:
    waiting = waiting_for(Input(0), Input(1, runs_alone=True))
    assert assigned(waiting) == []
    assert len(waiting) == 2


def test_what_comes_back_from_a_child_that_is_gone_starts_first() -> None:
    waiting = waiting_for(Input(1), Input(2))
    waiting.put(Input(0), is_first=True)
    assert [one.number for one in waiting.of("embed")] == [0, 1, 2]


def test_a_suspect_waits_until_a_child_is_empty_and_then_has_it_alone() -> None:
    waiting, child = waiting_for(Input(0)), Child()
    assigned(waiting, child)
    waiting.put(Input(1, runs_alone=True))
    waiting.put(Input(2))
    assert assigned(waiting, child) == []
    child.end(child.held[0])
    assert assigned(waiting, child) == [(1, 0)]
    child.end(child.held[0])
    assert assigned(waiting, child) == [(2, 0)]


def test_the_other_children_go_on_while_a_suspect_runs_alone() -> None:
    waiting = waiting_for(Input(0, runs_alone=True), Input(1), Input(2))
    assert assigned(waiting, Child(), Child()) == [(0, 0), (1, 1), (2, 1)]


def test_suspects_run_one_at_a_time() -> None:
    waiting = waiting_for(Input(0, runs_alone=True), Input(1, runs_alone=True))
    children = Child(), Child()
    assert assigned(waiting, *children) == [(0, 0)]
    assert assigned(waiting, *children) == []
    children[0].end(children[0].held[0])
    assert assigned(waiting, *children) == [(1, 0)]


def test_a_child_that_waits_for_a_suspect_is_free_again_when_the_suspect_is_revoked() -> None:
    waiting, child = waiting_for(Input(0)), Child()
    assigned(waiting, child)
    suspect = Input(1, runs_alone=True)
    waiting.put(suspect)
    waiting.put(Input(2))
    assert assigned(waiting, child) == []
    waiting.remove(suspect)
    assert assigned(waiting, child) == [(2, 0)]


def test_a_revoked_suspect_frees_no_child_in_which_another_runs() -> None:
    waiting, child = waiting_for(Input(0, runs_alone=True)), Child()
    assigned(waiting, child)
    second = Input(1, runs_alone=True)
    waiting.put(second)
    waiting.put(Input(2))
    waiting.remove(second)
    assert assigned(waiting, child) == []


def test_a_suspect_goes_to_another_child_when_the_one_it_waits_for_is_gone() -> None:
    waiting, gone, left = waiting_for(Input(0), Input(1), Input(2)), Child(), Child()
    assigned(waiting, gone, left)
    waiting.put(Input(3, runs_alone=True))
    assert assigned(waiting, left) == []
    left.end(left.held[0])
    assert assigned(waiting, left) == [(3, 0)]


def test_an_input_is_taken_out_from_where_it_waits() -> None:
    plain, suspect = Input(0), Input(1, runs_alone=True)
    waiting = waiting_for(plain, suspect)
    waiting.remove(plain)
    assert (len(waiting), waiting.of("embed")) == (1, [])
    waiting.remove(suspect)
    assert len(waiting) == 0


def test_a_suspect_that_was_revoked_takes_no_slot_and_keeps_no_child() -> None:
    waiting = waiting_for(Input(0, runs_alone=True), Input(1))
    child, started = Child(), []
    for given, at in waiting.assign([child]):
        waiting.remove(given)
        if not given.runs_alone:
            at.take(given)
            started.append(given.number)
    assert started == [1]


service_names = st.sampled_from([*SLOTS, "elsewhere"])


def slot_of(one: Input) -> str:
    return one.service if one.service in SLOTS else services.PLAIN


class Dispatching(RuleBasedStateMachine):
    """Inputs come, start, end and are revoked; children come and go."""

    @initialize(children=st.integers(0, 3))
    def begin(self, children: int) -> None:
        self.waiting = Queue()
        self.children = [Child() for _ in range(children)]
        self.model: dict[str, collections.deque[Input]] = collections.defaultdict(collections.deque)
        self.numbers = 0

    def queue_of(self, one: Input) -> collections.deque[Input]:
        return self.model["suspects" if one.runs_alone else "queue of " + one.service]

    @property
    def inputs(self) -> list[Input]:
        return [one for queue in self.model.values() for one in queue]

    @rule(service=service_names, runs_alone=st.booleans(), first=st.booleans())
    def come(self, service: str, runs_alone: bool, first: bool) -> None:
        self.numbers += 1
        one = Input(self.numbers, service, runs_alone and self.numbers % 3 == 0)
        self.waiting.put(one, is_first=first)
        queue = self.queue_of(one)
        (queue.appendleft if first else queue.append)(one)

    @rule()
    def start(self) -> None:
        suspects = len(self.model["suspects"])
        are_idle = self.children and not any(child.held for child in self.children)
        for one, child in self.waiting.assign(self.children):
            assert self.queue_of(one).popleft() is one, "not the first of its service"
            self.waiting.remove(one)
            child.take(one)
        if are_idle and suspects:
            assert len(self.model["suspects"]) == suspects - 1
        if not self.model["suspects"]:
            self.nothing_waits_for_a_free_slot()

    def nothing_waits_for_a_free_slot(self) -> None:
        for queue in self.model.values():
            for child in self.children if queue else ():
                used = sum(slot_of(one) == slot_of(queue[0]) for one in child.held)
                is_alone = any(one.runs_alone for one in child.held)
                assert is_alone or used == SLOTS[slot_of(queue[0])]

    @precondition(lambda self: any(child.held for child in self.children))
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        child = data.draw(st.sampled_from([one for one in self.children if one.held]))
        child.end(data.draw(st.sampled_from(child.held)))

    @precondition(lambda self: len(self.waiting))
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.inputs))
        self.waiting.remove(one)
        self.queue_of(one).remove(one)

    @precondition(lambda self: len(self.children) < 4)
    @rule()
    def child_comes(self) -> None:
        self.children.append(Child())

    @precondition(lambda self: self.children)
    @rule(data=st.data())
    def child_goes(self, data: st.DataObject) -> None:
        self.children.remove(data.draw(st.sampled_from(self.children)))

    @rule()
    def lose_the_broker(self) -> None:
        for one in self.inputs:
            self.waiting.remove(one)
        self.model.clear()

    @invariant()
    def what_waits_is_what_came_and_did_not_start(self) -> None:
        assert len(self.waiting) == sum(map(len, self.model.values()))
        for name, queue in self.model.items():
            if name != "suspects":
                assert self.waiting.of(name.removeprefix("queue of ")) == list(queue)

    @invariant()
    def no_child_holds_more_than_its_slots(self) -> None:
        for child in self.children:
            assert child.slots.total_taken == len(child.held)
            used = collections.Counter(map(slot_of, child.held))
            assert all(used[service] <= slots for service, slots in SLOTS.items())

    @invariant()
    def a_suspect_is_alone(self) -> None:
        for child in self.children:
            if any(one.runs_alone for one in child.held):
                assert len(child.held) == 1


Dispatching.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestDispatching = Dispatching.TestCase
