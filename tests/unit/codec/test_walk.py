from __future__ import annotations

import collections
import datetime as dt
import enum
import json
import re

import pytest
from django.utils import functional as django_functional
from kombu.utils import functional as kombu_functional

from gw_celery import codec, errors
from tests.unit.codec import models
from tests.unit.codec.sameness import same


class Sub(models.Doc):
    pass


class Price(int):
    pass


class Tone(enum.IntEnum):
    A = 1


class Free:
    pass


class Reduced:
    def __json__(self):
        return {"reduced": (1,)}


class Endless:
    def __json__(self):
        return self


class Broken:
    def __json__(self):
        raise KeyError("gone")


class Unhashable:
    __hash__ = None


def limited(depth):
    return codec.Codec(models.registry, codec.Limits(depth=depth))


def nested(levels, wrap):
    value = wrap(0)
    for _ in range(levels - 1):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"~tuple": [1]}, {"~obj": ["os.system@1", {}]}, {"~": 0}, {"~dict": []}, {"~x": {"~y": 1}},
        [{"~tuple": {"~tuple": 1}}], {"~a": 1, "~b": 2}, {"~a": 1, 2: 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_dict_that_looks_like_a_marker_comes_back_as_a_dict(value):
    assert same(models.there_and_back(value), value)


def test_keys_of_any_kind_keep_their_type_and_order():
    value = {1: "a", "1": "b", 2.5: "c", (1, "x"): "d", None: "e", b"k": "f", models.Color.RED: "g"}
    assert same(models.there_and_back(value), value)
    assert same(models.there_and_back({True: 1}), {True: 1})


def test_a_str_key_with_a_lone_surrogate_comes_back():
    assert same(models.there_and_back({"\udc80": 1, "b": 2}), {"\udc80": 1, "b": 2})


def test_the_same_object_twice_is_no_cycle():
    shared = [1, (2,)]
    assert models.there_and_back([shared] * 3) == [shared] * 3


def test_writing_leaves_the_value_as_it_was():
    value = {"a": [(1, float("nan")), {2: {3}}], "b": [models.Doc([1])]}
    before = repr(value)
    models.knowing.dumps(value)
    assert repr(value) == before


def cyclic_list():
    value = []
    value.append(value)
    return value


def cyclic_dict():
    value = {}
    value[1] = value
    return value


def cyclic_object():
    bag = models.Bag()
    bag.me = (bag,)
    return bag


@pytest.mark.parametrize("make", [cyclic_list, cyclic_dict, cyclic_object, Endless])
def test_a_value_that_contains_itself_is_refused(make):
    with pytest.raises(errors.SerializationError, match="contains itself: break the cycle"):
        models.knowing.dumps(make())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: [inner],
        lambda inner: (inner,),
        lambda inner: frozenset({inner}),
        lambda inner: {"k": inner},
        lambda inner: {1: inner},
    ],
)
def test_depth_is_counted_alike_on_both_sides(wrap):
    value = nested(5, wrap)
    text = models.knowing.dumps(value)
    assert limited(5).dumps(value) == text
    assert limited(5).loads(text) == value
    with pytest.raises(errors.SerializationError, match="deeper than 4 levels"):
        limited(4).dumps(value)
    with pytest.raises(errors.SerializationError, match="deeper than 4 levels"):
        limited(4).loads(text)


@pytest.mark.parametrize("value", [dt.date(2024, 1, 1), float("nan"), "\ud800", models.Bag()])
def test_whatever_depth_can_be_written_can_be_read(value):
    value = [[[value]]]
    readable = {depth for depth in range(1, 8) if not refuses(limited(depth).dumps, value)}
    text = models.knowing.dumps(value)
    assert readable
    assert readable == {depth for depth in range(1, 8) if not refuses(limited(depth).loads, text)}


def refuses(function, argument):
    try:
        function(argument)
    except errors.SerializationError:
        return True
    return False


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (Free(), "test_walk.Free: it is not registered: register it with gw.register_type(Free)"),
        (Sub("t"), "only its base class Doc is: register it with gw.register_type(Sub)"),
        (Price(3), "would come back as int: send a plain int, or register it"),
        (Tone.A, "would come back as int"),
        (collections.OrderedDict(a=1), "collections.OrderedDict: it is not registered, and"),
        (collections.defaultdict(list), "would come back as dict"),
        (collections.namedtuple("Pair", "a b")(1, 2), "would come back as tuple"),
        (type("Loud", (str,), {})("x"), "would come back as str"),
        (ValueError("x"), "builtins.ValueError"),
        (object(), "builtins.object"),
        (int, "builtins.type"),
        (bytearray(b"x"), "builtins.bytearray"),
        (iter([]), "builtins.list_iterator"),
    ],
)
def test_a_value_of_an_unregistered_type_is_refused_by_name(value, fact):
    for holder in (value, [value], {"k": value}, (1, {2: value}), models.Doc(value)):
        with pytest.raises(errors.SerializationError, match=re.escape(fact)):
            models.knowing.dumps(holder)


def test_a_subclass_of_str_is_refused_as_a_key_too():
    key = type("Loud", (str,), {})("x")
    with pytest.raises(errors.SerializationError, match=r"Loud.*come back as str"):
        models.knowing.dumps({key: 1})


def test_an_object_with_kombus_json_protocol_is_written_as_what_it_returns():
    assert models.there_and_back([Reduced()]) == [{"reduced": (1,)}]
    with pytest.raises(errors.SerializationError, match=r"Broken failed.*KeyError"):
        models.knowing.dumps(Broken())


def test_lazy_values_of_kombu_and_django_are_written_as_what_they_hold():
    lazy_text = django_functional.lazy(lambda: "bonjour", str)()
    values = [kombu_functional.lazy(lambda: (1, 2)), lazy_text]
    assert same(models.there_and_back(values), [(1, 2), "bonjour"])


def test_an_unknown_marker_is_named():
    with pytest.raises(errors.SerializationError, match="marker '~pickle' is not known here"):
        models.knowing.loads('{"~pickle": "gASV"}')


def test_a_marker_whose_tilde_is_an_escape_is_a_marker_too():
    assert models.knowing.loads('{"\\u007etuple": [1]}') == (1,)


@pytest.mark.parametrize(
    "document",
    [
        {"~tuple": {}}, {"~tuple": "ab"}, {"~set": [[1]]}, {"~set": {"~set": []}},
        {"~frozenset": [{"~set": []}]}, {"~dict": {}}, {"~dict": [1]}, {"~dict": [[1]]},
        {"~dict": [[1, 2, 3]]}, {"~dict": [[[1], 2]]}, {"~dict": [{"~tuple": [1, 2]}]},
        {"~obj": []}, {"~obj": "os.system@1"}, {"~obj": [1, {}]}, {"~obj": [["a"], {}]},
        {"~obj": ["a@1", {}, 1]}, {"~obj": {"~tuple": ["a@1", {}]}}, {"~obj": None},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_a_marker_with_a_payload_of_another_form_is_refused(document):
    with pytest.raises(errors.SerializationError):
        models.knowing.loads(json.dumps(document))


def test_what_a_registered_class_raises_while_it_is_hashed_refuses_the_message():
    registry = codec.TypeRegistry()
    registry.register(Unhashable, name="U")
    own = codec.Codec(registry, codec.Limits())
    with pytest.raises(errors.SerializationError, match="unhashable type"):
        own.loads('{"~set": [{"~obj": ["U@1", {}]}]}')
