"""How an instance of a registered class is taken apart, and built again from what a message says.

Nothing here looks up a name that a message gives, except among the names that the class itself
declares: its fields, its members.
"""

from __future__ import annotations

import dataclasses
import enum
import reprlib
from collections.abc import Callable
from typing import Any, Protocol

from gw_celery import errors
from gw_celery.codec import scalars

#: Of ``type.__flags__``: the class was made by a class statement. (Py_TPFLAGS_HEAPTYPE)
_HEAP_TYPE = 1 << 9


class Shape(Protocol):
    """Both ways between an instance and a payload that gw-json can write."""

    def take(self, value: Any) -> object:
        """Return the payload for ``value``."""

    def build(self, payload: object) -> object:
        """Return an instance, or raise any exception when the payload does not fit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Custom:
    """The two functions that the user gave."""

    take: Callable[[Any], object]
    build: Callable[[Any], object]


class Members:
    """An Enum, by the name of the member; a combination of flags that has no name, by its value."""

    def __init__(self, cls: type[enum.Enum]) -> None:
        self.cls = cls

    def take(self, value: enum.Enum) -> object:
        return value.name if value.name in self.cls.__members__ else value.value

    def build(self, payload: object) -> object:
        if issubclass(self.cls, enum.Flag) and type(payload) is int:
            made = self.cls(payload)
            # Some Pythons drop an unknown bit without a word; a class can ask for that, too.
            if made.value != payload:
                raise _misfit(self.cls, f"has no member for some of the bits {payload:#b}")
            return made
        name = scalars.expect(str, payload)
        if name not in self.cls.__members__:
            known = ", ".join(self.cls.__members__)
            raise _misfit(self.cls, f"has no member {reprlib.repr(name)}, only {known}")
        return self.cls.__members__[name]


class Fields:
    """A dataclass, by its fields: the constructor checks them, and no name more is accepted.

    Fields with ``init=False`` are written when they are set, and set after the constructor.
    """

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.fields = {field.name: field for field in dataclasses.fields(cls)}

    def take(self, value: object) -> object:
        return {
            name: getattr(value, name)
            for name, field in self.fields.items()
            if field.init or hasattr(value, name)
        }

    def build(self, payload: object) -> object:
        given = _attributes(payload)
        self._check(given)
        made: object = self.cls(**{k: v for k, v in given.items() if self.fields[k].init})
        for name in given:
            if not self.fields[name].init:
                # A frozen dataclass sets its own fields in this way too.
                object.__setattr__(made, name, given[name])
        return made

    def _check(self, given: dict[str, object]) -> None:
        for name in given:
            if name not in self.fields:
                raise _misfit(self.cls, f"has no field {reprlib.repr(name)}")
        for name, field in self.fields.items():
            if name not in given and _is_required(field):
                raise _misfit(self.cls, f"needs the field {name!r}, which is missing")


class Attributes:
    """A plain object, by its ``__dict__``; its constructor is not called."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def take(self, value: object) -> object:
        return vars(value)

    def build(self, payload: object) -> object:
        made: object = object.__new__(self.cls)
        vars(made).update(_attributes(payload))
        return made


class Raised:
    """An exception, by its ``args`` and its ``__dict__``; no ``__init__`` of a user's is called."""

    def __init__(self, cls: type[Exception]) -> None:
        self.cls = cls
        self._native: Any = next(base for base in cls.__mro__ if _is_native(base))

    def take(self, value: Exception) -> object:
        # Not value.args: OSError keeps the name of the file elsewhere.
        args: object = self._native.__reduce__(value)[1]
        return [args, vars(value)]

    def build(self, payload: object) -> object:
        args, attributes = scalars.expect(list, payload)
        made: Exception = self._native.__new__(self.cls, *scalars.expect(tuple, args))
        # Some keep what str() shows beside args: UnicodeDecodeError, StopIteration.
        self._native.__init__(made, *args)
        vars(made).update(_attributes(attributes))
        return made


def shape_of(cls: type) -> Shape:
    """Choose how instances of ``cls`` are written when the user gives no functions for it.

    Raises:
        DeclarationError: its instances hold something that none of the shapes would keep.
    """
    if issubclass(cls, enum.Enum):
        return Members(cls)
    if issubclass(cls, Exception):
        return Raised(cls)
    if any(_is_native(base) for base in cls.__mro__ if base is not object):
        raise _needs_functions(cls, "is built on a class written in C, whose data would be lost")
    # A subclass that is not decorated itself may hold more than the fields it inherits.
    if "__dataclass_fields__" in vars(cls):
        return Fields(cls)
    if not _is_plain(cls):
        raise _needs_functions(cls, "keeps data outside of __dict__, which would be lost")
    return Attributes(cls)


class _Empty:
    """The layout of an instance that has a ``__dict__`` and nothing else."""


def _is_plain(cls: type) -> bool:
    slots = any(vars(base).get("__slots__") for base in cls.__mro__)
    return not slots and cls.__basicsize__ == _Empty.__basicsize__ and cls.__dictoffset__ != 0


def _is_native(cls: type) -> bool:
    return not cls.__flags__ & _HEAP_TYPE


def _is_required(field: dataclasses.Field[Any]) -> bool:
    absent = dataclasses.MISSING
    return field.init and field.default is absent and field.default_factory is absent


def _attributes(payload: object) -> dict[str, object]:
    attributes = scalars.expect(dict, payload)
    if any(type(name) is not str for name in attributes):
        raise errors.SerializationError("a name of an attribute is not a str")
    return attributes


def _misfit(cls: type, fact: str) -> errors.SerializationError:
    return errors.SerializationError(
        f"{cls.__module__}.{cls.__qualname__} {fact}: sender and receiver run different "
        "versions of the class; register it with version= and keep a decoder for the old one"
    )


def _needs_functions(cls: type, fact: str) -> errors.DeclarationError:
    return errors.DeclarationError("cls", cls, f"{fact}; pass encode= and decode=")
