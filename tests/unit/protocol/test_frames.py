from __future__ import annotations

import json
import math
import pickle
import struct
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gw_celery.protocol import frames as protocol_frames

any_text = st.text(st.characters(exclude_categories=()), max_size=20)
numbers = st.integers(1, 2**63)
seconds = st.floats(allow_nan=False, allow_infinity=False)
reports = st.one_of(
    st.just([protocol_frames.Report.LOADED]),
    st.just([protocol_frames.Report.ENTERED]),
    st.tuples(st.just(protocol_frames.Report.FAILED), any_text),
    st.tuples(st.just(protocol_frames.Report.ACCEPT), numbers, seconds),
    st.tuples(st.just(protocol_frames.Report.DONE), numbers, any_text, seconds),
    st.tuples(
        st.just(protocol_frames.Report.ERROR),
        numbers,
        st.sampled_from(protocol_frames.Outcome),
        any_text,
        any_text,
        any_text,
        any_text,
        st.booleans(),
    ),
    st.tuples(st.just(protocol_frames.Report.GONE), numbers),
    st.tuples(st.just(protocol_frames.Report.BEAT), seconds, st.integers(0)),
    st.tuples(st.just(protocol_frames.Report.OUTAGE), any_text),
    st.tuples(st.just(protocol_frames.Report.PROBED), numbers, st.booleans(), any_text, seconds),
    st.tuples(st.just(protocol_frames.Report.MEASURED), numbers, any_text),
).map(list)
orders = st.tuples(st.sampled_from(protocol_frames.Order), st.integers(), st.binary(max_size=50))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=15,
)
almost_reports = st.lists(
    st.lists(
        st.sampled_from([*protocol_frames.Report, *protocol_frames.Outcome]) | anything, max_size=9
    ),
    max_size=3,
)


def payload_of(frame: bytes) -> bytes:
    (payload,) = protocol_frames.Unpacker(2**32 - 1).feed(frame)
    return payload


def framed(payload: bytes) -> bytes:
    return struct.pack("!I", len(payload)) + payload


def refuses(payload: bytes) -> None:
    with pytest.raises(protocol_frames.Garbage):
        protocol_frames.unpack_reports(payload)


class Trap:
    """Runs code wherever it is unpickled."""

    sprung: list[str] = []

    def __reduce__(self):
        return Trap.sprung.append, ("unpickled",)


@given(st.lists(reports, max_size=5))
def test_what_a_child_reports_arrives_as_it_was(sent: list[list[object]]) -> None:
    assert protocol_frames.unpack_reports(payload_of(protocol_frames.pack_reports(sent))) == sent


@given(st.lists(orders, max_size=5))
def test_what_a_parent_orders_arrives_as_it_was(sent: list[tuple[object, ...]]) -> None:
    arrived = protocol_frames.unpack_orders(payload_of(protocol_frames.pack_orders(sent)))
    assert arrived == sent
    assert all(isinstance(order, protocol_frames.Order) for order, *_ in arrived)


@given(st.lists(st.lists(reports, max_size=3), max_size=4), st.data())
def test_frames_arrive_whole_and_in_order_however_the_socket_cuts_them(
    frames: list[list[list[object]]], data: st.DataObject
) -> None:
    stream = b"".join(map(protocol_frames.pack_reports, frames))
    unpacker, payloads = protocol_frames.Unpacker(protocol_frames.MAX_CHILD_FRAME_BYTES), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        payloads += unpacker.feed(stream[:size])
        stream = stream[size:]
    assert list(map(protocol_frames.unpack_reports, payloads)) == frames
    assert unpacker.feed(b"") == []


@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 100_000)
@example(b'["' + b"\xff" * 8)
@example(b'[["accept",1,1e999]]')
@example(b'[["accept",1,NaN]]')
@example(b'[["gone",' + b"9" * 5000 + b"]]")
def test_bytes_of_no_child_are_garbage_or_reports_and_nothing_else(payload: bytes) -> None:
    try:
        assert isinstance(protocol_frames.unpack_reports(payload), list)
    except protocol_frames.Garbage:
        return


@given(anything | almost_reports)
def test_json_is_taken_only_where_every_report_has_its_shape(value: object) -> None:
    payload = json.dumps(value).encode()
    try:
        taken = protocol_frames.unpack_reports(payload)
    except protocol_frames.Garbage:
        return
    assert taken == value
    for kind, *rest in taken:
        assert kind in set(protocol_frames.Report)
        assert not any(isinstance(one, list | dict) or one is None for one in rest)
        assert all(math.isfinite(one) for one in rest if isinstance(one, float))


@pytest.mark.parametrize(
    "report",
    [
        ["gone", True],
        ["gone", 1.0],
        ["gone", "1"],
        ["gone", None],
        ["gone"],
        ["gone", 1, 2],
        ["accept", 1, 2],
        ["done", 1, None, 0.5],
        ["beat", 0.0, True],
        ["error", 1, "failure", "t", "x", "m", "tb", 0],
        ["unknown", 1],
        [1, "gone"],
        [["gone"], 1],
        [{}],
        [],
        {},
        "gone",
        None,
    ],
)
def test_a_report_of_another_shape_is_garbage(report: object) -> None:
    refuses(json.dumps([report]).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_seconds_that_are_no_number_are_garbage(number: str) -> None:
    refuses(f'[["accept",1,{number}]]'.encode())


@pytest.mark.parametrize("around", ["{}", "[{}]", '[["gone",{}]]', "[[{}]]"])
def test_nesting_of_any_depth_is_garbage_and_no_error_of_the_interpreter(around: str) -> None:
    for depth in range(1, sys.getrecursionlimit() + 50):
        refuses(around.format("[" * depth + "1" + "]" * depth).encode())


def test_a_pickle_from_a_child_is_garbage_and_runs_nothing() -> None:
    modules = set(sys.modules)
    for payload in (pickle.dumps(Trap()), pickle.dumps([Trap()]), b"csmtplib\nSMTP\n."):
        refuses(payload)
    assert Trap.sprung == []
    assert "smtplib" not in set(sys.modules) - modules


def test_one_bad_report_spoils_its_whole_frame() -> None:
    refuses(json.dumps([["gone", 1], ["gone", "x"]]).encode())


def test_a_frame_of_the_largest_length_is_taken_and_one_byte_more_is_garbage() -> None:
    assert protocol_frames.Unpacker(10).feed(framed(b"x" * 10)) == [b"x" * 10]
    unpacker = protocol_frames.Unpacker(10)
    assert unpacker.feed(framed(b"x" * 11)) == []
    assert "announces 11 bytes; at most 10" in str(unpacker.garbage)


def test_a_length_over_the_largest_is_garbage_before_its_bytes_arrive() -> None:
    unpacker = protocol_frames.Unpacker(protocol_frames.MAX_CHILD_FRAME_BYTES)
    assert unpacker.feed(b"\xff\xff\xff\xff") == []
    assert unpacker.garbage is not None


def test_what_came_before_a_broken_frame_counts() -> None:
    unpacker = protocol_frames.Unpacker(10)
    assert unpacker.feed(framed(b"good") + b"\xff\xff\xff\xff") == [b"good"]
    assert unpacker.garbage is not None


def test_an_empty_frame_has_no_reports_in_it() -> None:
    assert protocol_frames.Unpacker(10).feed(framed(b"")) == [b""]
    refuses(b"")


def test_what_garbage_says_is_short_however_long_the_garbage_is() -> None:
    with pytest.raises(protocol_frames.Garbage) as caught:
        protocol_frames.unpack_reports(json.dumps([["gone", "x" * 100_000]]).encode())
    assert len(str(caught.value)) < 300
