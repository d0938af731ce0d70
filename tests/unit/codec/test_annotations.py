from __future__ import annotations

import abc
import collections.abc
import contextlib
import dataclasses
import enum
import functools
import pathlib
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import pydantic
import pytest
from django.db import models as django_models

from gw_celery import codec, errors

if TYPE_CHECKING:
    from nowhere import Hidden


class Kind(enum.Enum):
    A = 1


class Choice(django_models.TextChoices):
    ONE = "1"


@dataclasses.dataclass
class Leaf:
    kind: Kind
    hidden: Hidden | None = None


@dataclasses.dataclass
class Tree:
    leaves: list[Leaf]
    parent: Tree | None = None


class Plain:
    leaf: Leaf


class Rule(pydantic.BaseModel):
    x: int


class Slotted:
    __slots__ = ("x",)


class Options(typing.TypedDict):
    plain: Plain


class Rejected(Exception):
    pass


T = typing.TypeVar("T")


@dataclasses.dataclass
class Page(typing.Generic[T]):
    items: list[T]


def registered(function):
    registry = codec.TypeRegistry()
    codec.register_annotations(function, registry)
    classes = (Kind, Choice, Leaf, Tree, Plain, Rule, Slotted, Options, Rejected, Page)
    return {cls for cls in classes if registry.written_as(cls) is not None}


def a_list(x: list[Plain]): ...
def a_dict(x: dict[str, Plain]): ...
def an_optional(x: Optional[Plain]): ...  # noqa: UP045
def a_union(x: int | Plain | None): ...
def an_annotated(x: Annotated[Plain, Leaf]): ...
def a_tuple(x: tuple[int, Plain]): ...
def a_deep_one(x: dict[str, list[tuple[Plain | None, ...]]]): ...
def a_result() -> Plain: ...
def a_stream() -> collections.abc.AsyncIterator[Plain]: ...
def a_quoted_one(x: list[Plain]): ...
def a_keyword(*rest: int, x: Plain = None, **more: str): ...


@pytest.mark.parametrize(
    "function",
    [a_list, a_dict, an_optional, a_union, an_annotated, a_tuple, a_deep_one, a_result, a_stream,
     a_quoted_one, a_keyword],
)  # fmt: skip
def test_a_class_is_found_wherever_an_annotation_names_it(function):
    # They are found in the annotations of Plain, which is no dataclass.
    assert registered(function) == {Leaf, Kind}


def test_fields_are_followed_and_a_class_that_names_itself_ends():
    def f(x: Tree): ...

    assert registered(f) == {Tree, Leaf, Kind}


def test_an_annotation_that_only_a_type_checker_resolves_hides_no_other():
    def f(x: Hidden, y: list[Hidden], z: Kind, w: 1 / 0, v: nothing): ...  # noqa: F821

    assert registered(f) == {Kind}


def test_a_generic_class_of_the_user_and_its_argument_are_found():
    def f(x: Page[Kind]): ...

    assert registered(f) == {Page, Kind}


def test_a_typed_dict_is_followed_and_is_no_class_to_register():
    def f(x: Options): ...

    assert registered(f) == {Leaf, Kind}


def test_enums_of_a_framework_are_found_and_exceptions_and_plain_classes_are_not():
    def f(x: Choice, y: Plain) -> Rejected: ...

    assert registered(f) == {Choice, Kind, Leaf}


@dataclasses.dataclass
class Deleting:
    path: str

    def __del__(self):
        pytest.fail(f"deletes {self.path}")


@dataclasses.dataclass
class Restoring:
    path: str

    def __setstate__(self, state):
        pytest.fail(f"restores {state}")


@dataclasses.dataclass
class Heir(Deleting):
    more: int = 0


class Writing:
    def __setattr__(self, name, value):
        pytest.fail(f"writes {name}")


class Failed(Exception):
    def __setattr__(self, name, value):
        pytest.fail(f"writes {name}")


@pytest.mark.parametrize("cls", [Deleting, Restoring, Heir, Writing, Failed])
def test_a_message_cannot_run_what_a_class_does_when_it_is_changed_or_dropped(cls):
    def f(x: cls, y: list[Kind]): ...

    f.__annotations__["x"] = cls
    registry = codec.TypeRegistry()
    codec.register_annotations(f, registry)
    assert registry.written_as(Kind) is not None
    assert registry.written_as(cls) is None
    with pytest.raises(errors.DeclarationError, match=r"a message could then run; pass encode="):
        registry.register(cls)
    registry.register(cls, name="own", encode=lambda _: None, decode=lambda _: None)
    assert registry.called("own@1").cls is cls


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    path: str


def test_what_dataclass_itself_adds_to_a_frozen_class_is_no_reason_to_refuse_it():
    registry = codec.TypeRegistry()
    registry.register(Frozen)
    own = codec.Codec(registry, codec.Limits())
    assert own.loads(own.dumps(Frozen("a"))) == Frozen("a")


@pytest.mark.parametrize(
    "annotation",
    [Rule, list[Rule], Slotted, pathlib.Path, int, Any, Literal["a"], abc.ABC, typing.Protocol,
     collections.abc.Sequence, dict, BaseException, codec.TypeRegistry, django_models.Model, None,
     collections.OrderedDict, Kind.A, 3, collections.abc.Callable[[int], str]],
)  # fmt: skip
def test_what_is_not_plain_data_of_the_user_is_left_alone(annotation):
    def f(x): ...

    f.__annotations__ = {"x": annotation}
    registry = codec.TypeRegistry()
    codec.register_annotations(f, registry)
    assert not vars(registry)["_written"]


def test_the_function_inside_a_decorator_of_another_module_counts():
    assert registered(contextlib.contextmanager(a_list)) == {Leaf, Kind}


def test_a_method_is_a_function_too():
    class Service:
        def predict(self, x: Kind) -> int: ...

    assert registered(Service().predict) == {Kind}


def test_a_callable_without_annotations_registers_nothing():
    assert registered(len) == set()
    assert registered(functools.partial(a_list)) == set()


def test_a_class_that_has_a_name_keeps_it():
    registry = codec.TypeRegistry()
    registry.register(Kind, name="kind", version=4)
    codec.register_annotations(a_list, registry)
    assert registry.written_as(Kind).wire_name == "kind@4"


def test_found_classes_travel():
    registry = codec.TypeRegistry()
    codec.register_annotations(a_list, registry)
    own = codec.Codec(registry, codec.Limits())
    leaf = Leaf(Kind.A)
    assert own.loads(own.dumps([leaf])) == [leaf]
