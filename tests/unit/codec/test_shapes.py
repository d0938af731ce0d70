from __future__ import annotations

import collections
import dataclasses
import enum
import json
import re
import threading
from typing import Generic, NamedTuple, TypeVar

import pytest

from gw_celery import codec, errors
from tests.unit.codec import models

T = TypeVar("T")
PREFIX = "tests.unit.codec.models"


class Slotted:
    __slots__ = ("x",)


class HalfSlotted(Slotted):
    pass


class SizedAsPlain:
    """As large as an object with a ``__dict__`` alone: a slot instead of a weak reference."""

    __slots__ = ("__dict__", "x")


class Pair(NamedTuple):
    left: int
    right: int


class Box(Generic[T]):
    def __init__(self, content):
        self.content = content


@dataclasses.dataclass
class Table(dict):
    name: str


def loads(type_name, payload):
    return models.knowing.loads(json.dumps({"~obj": [type_name, payload]}))


def test_a_dataclass_goes_through_its_constructor():
    assert loads(f"{PREFIX}.Positive@1", {"value": 1}) == models.Positive(1)
    with pytest.raises(errors.SerializationError, match=r"Positive failed.*must be positive"):
        loads(f"{PREFIX}.Positive@1", {"value": 0})


def test_a_field_that_the_class_lacks_is_named():
    with pytest.raises(errors.SerializationError, match=r"models\.Doc has no field 'shell'"):
        loads(f"{PREFIX}.Doc@1", {"title": "t", "shell": True})


def test_a_required_field_that_is_missing_is_named():
    with pytest.raises(errors.SerializationError, match=r"Doc needs the field 'title'"):
        loads(f"{PREFIX}.Doc@1", {"body": "b"})


def test_a_field_with_a_default_may_be_missing():
    assert loads(f"{PREFIX}.Doc@1", {"title": "t"}) == models.Doc("t")


def test_fields_outside_of_the_constructor_come_back_too():
    doc = models.Doc("t")
    doc.length = 7
    assert models.there_and_back(doc).length == 7


def test_a_frozen_dataclass_with_slots_comes_back():
    back = models.there_and_back(models.Point(1, (2,)))
    assert back == models.Point(1, (2,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        back.x = 2


def test_a_field_that_was_deleted_is_reported_with_its_class():
    doc = models.Doc("t")
    del doc.title
    with pytest.raises(errors.SerializationError, match=r"models\.Doc failed.*title"):
        models.knowing.dumps(doc)


def test_members_of_every_kind_of_enum_come_back_as_themselves():
    members = [models.Color.RED, models.Level.HIGH, models.Word.YES, models.Access.READ]
    back = models.there_and_back(members)
    assert [after is before for after, before in zip(back, members, strict=True)] == [True] * 4


def test_a_combination_of_flags_comes_back():
    both = models.Access.READ | models.Access.WRITE
    assert models.there_and_back([both, models.Access(0)]) == [both, models.Access(0)]


@pytest.mark.parametrize(
    ("name", "payload", "fact"),
    [
        ("Color@1", "BLUE", "Color has no member 'BLUE', only RED, GREEN, CRIMSON"),
        ("Color@1", "__class__", "no member '__class__'"),
        ("Color@1", "mro", "no member 'mro'"),
        ("Color@1", 1, "int where str"),
        ("Level@1", 1, "int where str"),
        ("Access@1", 64, "Access"),
        ("Loose@1", 64, "Loose has no member for some of the bits 0b1000000"),
        ("Loose@1", 65, "Loose has no member for some of the bits 0b1000001"),
        ("Access@1", True, "bool where str"),
        ("Bits@1", 4, "Bits has no member for some of the bits 0b100"),
        ("Bits@1", 2**64 + 1, "Bits has no member for some of the bits 0b1"),
        ("Bits@1", -1, "Bits has no member for some of the bits -0b1"),
        ("Access@1", -3, "Access has no member for some of the bits -0b11"),
    ],
)
def test_what_is_no_member_is_refused(name, payload, fact):
    with pytest.raises(errors.SerializationError, match=re.escape(fact)):
        loads(f"{PREFIX}.{name}", payload)


def test_flags_of_messages_leave_nothing_behind():
    before = len(models.Bits._value2member_map_)
    for bits in range(4, 200):
        with pytest.raises(errors.SerializationError):
            loads(f"{PREFIX}.Bits@1", bits)
    assert len(models.Bits._value2member_map_) == before
    with pytest.raises(errors.SerializationError, match="has no member for some of the bits 0b101"):
        models.knowing.dumps(models.Bits(5))


def test_a_plain_object_comes_back_without_a_call_of_its_constructor(monkeypatch):
    text = models.knowing.dumps(models.Bag(a=1, b=(models.Color.RED,)))
    monkeypatch.setattr(models.Bag, "__init__", lambda self: pytest.fail("called"))
    assert vars(models.knowing.loads(text)) == {"a": 1, "b": (models.Color.RED,)}


@pytest.mark.parametrize("payload", [[], "x", None, {"~dict": [[1, 2]]}])
def test_attributes_are_a_dict_with_names(payload):
    for name in ("Bag", "Doc"):
        with pytest.raises(errors.SerializationError):
            loads(f"{PREFIX}.{name}@1", payload)


def test_an_instance_of_a_generic_class_comes_back():
    registry = codec.TypeRegistry()
    registry.register(Box)
    own = codec.Codec(registry, codec.Limits())
    back = own.loads(own.dumps(Box((1,))))
    assert type(back) is Box
    assert back.content == (1,)


def test_an_exception_comes_back_with_its_args_attributes_and_notes():
    error = models.OutOfMemory(5, "GiB")
    error.add_note("on GPU 3")
    back = models.there_and_back(error)
    assert type(back) is models.OutOfMemory
    assert (str(back), back.args, back.needed) == ("5 GiB", ("5 GiB",), 5)
    assert back.__notes__ == ["on GPU 3"]


def test_an_exception_keeps_what_it_holds_in_c():
    registry = codec.TypeRegistry()
    registry.register(FileNotFoundError)
    registry.register(UnicodeDecodeError)
    own = codec.Codec(registry, codec.Limits())
    for error in (OSError(2, "gone", "x.bin"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")):
        back = own.loads(own.dumps(error))
        assert type(back) is type(error)
        assert str(back) == str(error)


class Native(threading.local):
    pass


@pytest.mark.parametrize(
    "cls",
    [
        Slotted,
        HalfSlotted,
        SizedAsPlain,
        Pair,
        Table,
        Native,
        models.Celsius,
        collections.OrderedDict,
    ],
)
def test_a_class_whose_data_would_be_lost_needs_its_own_functions(cls):
    registry = codec.TypeRegistry()
    with pytest.raises(errors.DeclarationError, match="pass encode= and decode="):
        registry.register(cls)
    registry.register(cls, encode=lambda value: None, decode=lambda payload: cls)
    assert registry.written_as(cls) is not None


def test_a_subclass_that_is_not_decorated_keeps_what_it_adds():
    class Chapter(models.Doc):
        pass

    registry = codec.TypeRegistry()
    registry.register(Chapter)
    own = codec.Codec(registry, codec.Limits())
    chapter = Chapter("t")
    chapter.number = 4
    assert vars(own.loads(own.dumps(chapter))) == vars(chapter)


def test_the_functions_of_the_user_are_used():
    warm = models.Celsius(21.5)
    assert json.loads(models.knowing.dumps(warm)) == {"~obj": ["Celsius@3", 21.5]}
    assert type(models.there_and_back(warm)) is models.Celsius


def test_what_the_functions_of_the_user_raise_names_the_class():
    registry = codec.TypeRegistry()
    registry.register(
        models.Bag, name="Bag", encode=lambda bag: bag.missing, decode=lambda payload: 1 / 0
    )
    own = codec.Codec(registry, codec.Limits())
    with pytest.raises(errors.SerializationError, match=r"models\.Bag failed.*AttributeError"):
        own.dumps(models.Bag())
    with pytest.raises(errors.SerializationError, match=r"models\.Bag failed.*ZeroDivisionError"):
        own.loads('{"~obj":["Bag@1",null]}')


class Size(enum.Enum):
    SMALL = object()


def test_an_enum_whose_values_json_lacks_is_written_by_name():
    registry = codec.TypeRegistry()
    registry.register(Size)
    own = codec.Codec(registry, codec.Limits())
    assert own.loads(own.dumps(Size.SMALL)) is Size.SMALL
