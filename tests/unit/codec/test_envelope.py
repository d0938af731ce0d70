from __future__ import annotations

import dataclasses
import json

import kombu.exceptions
import pytest
from kombu import serialization

from gw_celery import codec, errors
from tests.unit.codec import models
from tests.unit.codec.sameness import same


class Unknown:
    pass


@pytest.fixture
def limits():
    """Restores the limits of the process."""
    yield codec.configure
    codec.configure(codec.Limits())


def of_size(size):
    return codec.Codec(models.registry, codec.Limits(size=size))


@pytest.mark.parametrize("kind", [str, str.encode, lambda t: bytearray(t, "utf-8")])
def test_text_and_bytes_are_read(kind):
    assert codec.loads(kind('["é", 1]')) == ["é", 1]


def test_a_memoryview_is_read():
    assert codec.loads(memoryview(b'{"a": {"~tuple": []}}')) == {"a": ()}


@pytest.mark.parametrize(
    "text",
    ["", "[", '{"a"', "[1,]", "NaN", "[Infinity]", "-Infinity", "nul", "[1] 2", "\ufeff[]",
     b"\xff", "9" * 5000, "[" + "9" * 5000 + "]", "'a'"],
    ids=range(14),
)  # fmt: skip
def test_what_is_not_json_is_refused(text):
    with pytest.raises(errors.SerializationError, match="the text is not JSON"):
        codec.loads(text)


@pytest.mark.parametrize("bracket", ["[", '{"a":', '{"~tuple":[', '{"~dict":[[1,'])
@pytest.mark.parametrize("times", [150, 100_000])
def test_brackets_beyond_the_limit_are_refused_and_the_stack_survives(bracket, times):
    closing = "".join({"[": "]", "{": "}"}[c] for c in reversed(bracket) if c in "[{")
    with pytest.raises(errors.SerializationError, match=r"nested deeper|not JSON"):
        codec.loads(bracket * times + "1" + closing * times)


def test_a_limit_beyond_the_stack_still_ends_in_our_error():
    own = codec.Codec(models.registry, codec.Limits(depth=10**6))
    value = []
    for _ in range(50_000):
        value = [value]
    with pytest.raises(errors.SerializationError, match="stack"):
        own.dumps(value)
    with pytest.raises(errors.SerializationError, match="stack"):
        own.loads("[" * 50_000 + "]" * 50_000)


@pytest.mark.parametrize("value", ["abcdef", "äöü", "😀€", ["\ud800"], b"123", float("nan")])
def test_size_is_counted_in_bytes_alike_on_both_sides(value):
    text = codec.dumps(value)
    size = len(text.encode())
    assert of_size(size).dumps(value) == text
    assert same(of_size(size).loads(text), of_size(size).loads(text.encode()))
    for refused in (
        lambda: of_size(size - 1).dumps(value),
        lambda: of_size(size - 1).loads(text),
        lambda: of_size(size - 1).loads(text.encode()),
        lambda: of_size(size - 1).loads(memoryview(text.encode())),
    ):
        with pytest.raises(errors.SerializationError, match=f"{size} bytes where {size - 1} are"):
            refused()


def test_size_is_checked_before_anything_is_parsed():
    with pytest.raises(errors.SerializationError, match="6 bytes where 5"):
        of_size(5).loads("[[[[[[")


def test_the_size_of_a_memoryview_of_words_is_its_bytes():
    words = memoryview(b'["abcd"]').cast("I")
    with pytest.raises(errors.SerializationError, match="8 bytes where 7"):
        of_size(7).loads(words)


def test_limits_are_those_of_the_process_when_they_are_set(limits):
    limits(codec.Limits(depth=2, size=20))
    assert codec.loads(codec.dumps([[1]])) == [[1]]
    with pytest.raises(errors.SerializationError, match="deeper than 2"):
        codec.dumps([[[1]]])
    with pytest.raises(errors.SerializationError, match="where 20 are allowed"):
        codec.loads('"' + "x" * 30 + '"')


@pytest.mark.parametrize("name", ["depth", "size"])
@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None])
def test_a_limit_is_a_positive_int(name, value):
    with pytest.raises(errors.DeclarationError) as raised:
        codec.Limits(**{name: value})
    assert raised.value.argument == name


def test_limits_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.Limits().depth = 1


def test_kombu_writes_and_reads_it_by_name():
    codec.register()
    codec.register()
    content_type, encoding, text = serialization.dumps([(1,)], serializer="gw-json")
    assert (content_type, encoding) == ("application/x-gw-json", "utf-8")
    assert json.loads(text) == [{"~tuple": [1]}]
    back = serialization.loads(
        text.encode(), content_type, encoding, accept={"application/x-gw-json"}
    )
    assert back == [(1,)]


def test_limits_hold_for_kombu_when_they_are_set_after_registration(limits):
    codec.register()
    limits(codec.Limits(size=3))
    with pytest.raises(kombu.exceptions.EncodeError, match="3 are allowed"):
        serialization.dumps("abcdef", serializer=codec.NAME)


def test_the_message_of_our_error_survives_kombus():
    codec.register()
    with pytest.raises(kombu.exceptions.EncodeError, match=r"gw\.register_type\(Unknown\)") as sent:
        serialization.dumps(Unknown(), serializer=codec.NAME)
    assert isinstance(sent.value.__cause__ or sent.value.args[0], errors.SerializationError)
    with pytest.raises(kombu.exceptions.DecodeError, match=r"'shop\.Cart@1' is not registered"):
        serialization.loads(b'{"~obj":["shop.Cart@1",{}]}', codec.CONTENT_TYPE, "utf-8")


def test_a_consumer_that_does_not_accept_it_decodes_nothing():
    codec.register()
    with pytest.raises(kombu.exceptions.ContentDisallowed):
        serialization.loads(b"[", codec.CONTENT_TYPE, "utf-8", accept={"application/json"})
