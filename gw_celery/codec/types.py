"""The registered classes of this process, and how their instances are taken apart and rebuilt.

Only a registry maps a name in a message to a class. A shape accepts only names that its class
declares itself: its fields or members.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import itertools
import operator
import reprlib
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TypedDict, TypeVar, Unpack, overload

from gw_celery import errors
from gw_celery.codec import scalars

T = TypeVar("T")

#: The classes that gw-json writes without registration, excluding their subclasses.
BUILT_IN: frozenset[type] = frozenset(
    {bool, type(None), list, tuple, dict, set, frozenset, *(s.cls for s in scalars.SCALARS)}
)

#: Packages whose objects hold more than their attributes: connections, device memory, rules.
_FOREIGN = frozenset({"celery", "django", "gw_celery", "kombu", "numpy", "pydantic", "torch"})
#: Flag in ``type.__flags__`` of classes made by a class statement (Py_TPFLAGS_HEAPTYPE).
_HEAP_TYPE = 1 << 9


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    cls: type
    name: str
    version: int
    shape: Shape

    @property
    def wire_name(self) -> str:
        return f"{self.name}@{self.version}"


class _Options(TypedDict, total=False):
    name: str | None
    version: int
    encode: Callable[[Any], object] | None
    decode: Callable[[Any], Any] | None


class TypeRegistry:
    """Registered classes, by class for writing and by versioned name for reading."""

    def __init__(self) -> None:
        self._written: dict[type, Entry] = {}
        self._read: dict[str, Entry] = {}
        self._exceptions: dict[str, type[Exception]] = {}

    @overload
    def register(self, cls: type[T], **options: Unpack[_Options]) -> type[T]: ...

    @overload
    def register(
        self, cls: None = None, **options: Unpack[_Options]
    ) -> Callable[[type[T]], type[T]]: ...

    def register(
        self,
        cls: type[T] | None = None,
        *,
        name: str | None = None,
        version: int = 1,
        encode: Callable[[Any], object] | None = None,
        decode: Callable[[Any], Any] | None = None,
    ) -> type[T] | Callable[[type[T]], type[T]]:
        """Let instances of a class travel in gw-json; a function, and a decorator of classes.

        Without ``encode`` and ``decode``, a dataclass is written by its fields, an Enum by the name
        of the member, an exception by its ``args``, and any other object by its ``__dict__``.
        Subclasses are not included. Reading checks the names of fields, but not their types.

        Args:
            cls: the class; left out in ``@register_type(name=...)``.
            name: the name in messages; default: ``module.qualname``. It must not contain "@".
            version: 1 or more; raise it when the written form changes. A class is written in the
                highest version of its latest name. Every registered version can be read.
            encode: converts an instance to a value that gw-json can write.
            decode: converts such a value to an instance; an exception refuses the message.

        Returns:
            The class; without ``cls``, a decorator that returns it.

        Raises:
            DeclarationError: if an argument is invalid, another class has the name, or, without
                functions, data of instances would be lost (slots, a subclass of ``dict``).
        """

        def add(cls: type[T]) -> type[T]:
            if not isinstance(cls, type):
                raise errors.DeclarationError("cls", cls, "must be a class")
            if cls in BUILT_IN:
                raise errors.DeclarationError("cls", cls, "gw-json writes this type already")
            if issubclass(cls, BaseException) and not issubclass(cls, Exception):
                raise errors.DeclarationError(
                    "cls", cls, "must not end a process: derive from Exception"
                )
            if name is not None and (type(name) is not str or not name or "@" in name):
                raise errors.DeclarationError(
                    "name", name, "must be a str, not empty and without '@'"
                )
            if type(version) is not int or version < 1:
                raise errors.DeclarationError("version", version, "must be an int of 1 or more")
            if (encode is None) != (decode is None):
                missing = "encode" if encode is None else "decode"
                raise errors.DeclarationError(missing, None, "give both encode and decode")
            shape = Custom(encode, decode) if encode and decode else shape_of(cls)
            self._add(Entry(cls, _dotted(cls) if name is None else name, version, shape))
            return cls

        return add if cls is None else add(cls)

    def exception_class(self, type_name: str) -> type[Exception] | None:
        """Return the registered exception class of the name ``module.qualname``, or None."""
        return self._exceptions.get(type_name)

    def written_as(self, cls: type) -> Entry | None:
        """Return the entry by which instances of exactly ``cls`` are written, or None."""
        return self._written.get(cls)

    def called(self, wire_name: str) -> Entry:
        """Return the entry of a name ``name@version`` in a message.

        Raises:
            SerializationError: if there is none; the message lists the registered versions.
        """
        if wire_name in self._read:
            return self._read[wire_name]
        name, _, _ = wire_name.rpartition("@")
        known = [str(entry.version) for entry in self._read.values() if entry.name == name]
        raise errors.SerializationError(
            f"the version of {wire_name[:200]!r} is not registered here, only {', '.join(known)}: "
            "update this process, or register a decoder for that version"
            if known
            else f"the type {wire_name[:200]!r} is not registered here: call "
            "gw.register_type on its class in this process too"
        )

    def _add(self, entry: Entry) -> None:
        taken = self._read.get(entry.wire_name)
        if taken is not None and taken.cls is not entry.cls:
            if _dotted(taken.cls) != _dotted(entry.cls):
                rule = f"{entry.wire_name} already names {_dotted(taken.cls)}; give another name="
                raise errors.DeclarationError("name", entry.name, rule)
            # An autoreload has created the class again, and the old one is obsolete.
            self._written.pop(taken.cls, None)
        self._read[entry.wire_name] = entry
        written = self._written.get(entry.cls)
        if written is None or written.name != entry.name or written.version <= entry.version:
            self._written[entry.cls] = entry
        if issubclass(entry.cls, Exception):
            self._exceptions[_dotted(entry.cls)] = entry.cls


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


#: The registry of this process.
registry = TypeRegistry()

register_type = registry.register
exception_class = registry.exception_class


@dataclasses.dataclass(frozen=True, slots=True)
class Custom:
    take: Callable[[Any], object]
    build: Callable[[Any], object]


class Members:
    """An Enum, by the name of the member; an unnamed combination of flags, by its value."""

    def __init__(self, cls: type[enum.Enum]) -> None:
        self.cls = cls

    def take(self, value: enum.Enum) -> object:
        if value.name in self.cls.__members__:
            return value.name
        return self._declared(value.value)

    def build(self, payload: object) -> object:
        if issubclass(self.cls, enum.Flag) and type(payload) is int:
            return self.cls(self._declared(payload))
        name = scalars.expect(str, payload)
        if name not in self.cls.__members__:
            known = ", ".join(self.cls.__members__)
            raise _misfit(self.cls, f"has no member {reprlib.repr(name)}, only {known}")
        return self.cls.__members__[name]

    def _declared(self, bits: int) -> int:
        """Return the value of a Flag, which may have only bits that its members declare.

        A class can request to keep or ignore others. Python keeps each value for ever.
        """
        known = functools.reduce(
            operator.or_, (flag.value for flag in self.cls.__members__.values())
        )
        if bits < 0 or bits & ~known:
            raise _misfit(self.cls, f"has no member for some of the bits {f'{bits:#b}':.80}")
        return bits


class Fields:
    """A dataclass, by its fields: the constructor checks them, and unknown names are refused.

    Fields with ``init=False`` are written if they are set, and set after the constructor.
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
        for name in given:
            if name not in self.fields:
                raise _misfit(self.cls, f"has no field {reprlib.repr(name)}")
        for name, field in self.fields.items():
            absent = field.default is field.default_factory is dataclasses.MISSING
            if name not in given and field.init and absent:
                raise _misfit(self.cls, f"needs the field {name!r}, which is missing")
        made: object = self.cls(**{k: v for k, v in given.items() if self.fields[k].init})
        for name in given:
            if not self.fields[name].init:
                # Frozen dataclasses set their own fields in this way too.
                object.__setattr__(made, name, given[name])
        return made


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
    """An exception, by its ``args`` and ``__dict__``; a user's ``__init__`` is not called."""

    def __init__(self, cls: type[Exception]) -> None:
        self.cls = cls
        self._native: Any = next(base for base in cls.__mro__ if _is_native(base))

    def take(self, value: Exception) -> object:
        # Not value.args, because OSError keeps the file name elsewhere.
        args: object = self._native.__reduce__(value)[1]
        return [args, vars(value)]

    def build(self, payload: object) -> object:
        args, attributes = scalars.expect(list, payload)
        made: Exception = self._native.__new__(self.cls, *scalars.expect(tuple, args))
        # Some keep the text of str() outside args: UnicodeDecodeError, StopIteration.
        self._native.__init__(made, *args)
        vars(made).update(_attributes(attributes))
        return made


#: Conversions of an instance: ``take`` returns a payload that gw-json can write, and ``build``
#: returns an instance, or raises any exception if the payload does not fit.
Shape = Custom | Members | Fields | Attributes | Raised


def shape_of(cls: type) -> Shape:
    """Choose how to write instances of ``cls`` without the user's functions.

    Raises:
        DeclarationError: if every shape would lose some data of its instances, or a message could
            run methods that the class has for another purpose.
    """
    if issubclass(cls, enum.Enum):
        return Members(cls)
    if (hook := next(_hooks(cls), None)) is not None:
        rule = f"has {hook}, which a message could then run"
        raise errors.DeclarationError("cls", cls, f"{rule}; pass encode= and decode=")
    if issubclass(cls, Exception):
        return Raised(cls)
    if any(_is_native(base) for base in cls.__mro__ if base is not object):
        rule = "is built on a class written in C, whose data would be lost"
        raise errors.DeclarationError("cls", cls, f"{rule}; pass encode= and decode=")
    # A subclass without its own decorator may hold more than the inherited fields.
    if "__dataclass_fields__" in vars(cls):
        return Fields(cls)
    has_slots = any(vars(base).get("__slots__") for base in cls.__mro__)
    if has_slots or cls.__basicsize__ != _Empty.__basicsize__ or not cls.__dictoffset__:
        rule = "keeps data outside of __dict__, which would be lost"
        raise errors.DeclarationError("cls", cls, f"{rule}; pass encode= and decode=")
    return Attributes(cls)


class _Empty:
    """The layout of an instance that has only a ``__dict__``."""


def _hooks(cls: type) -> Iterator[str]:
    """Yield the methods of the user's that run when an instance is built, changed or dropped."""
    for base in itertools.filterfalse(_is_native, cls.__mro__):
        params = vars(base).get("__dataclass_params__")
        for name in ("__del__", "__setattr__", "__setstate__"):
            # A frozen dataclass can only have the ``__setattr__`` that ``dataclass`` made.
            is_made = name == "__setattr__" and params is not None and params.frozen
            method = vars(base).get(name)
            is_made = is_made or getattr(method, "__module__", "") == dataclasses.__name__
            if method is not None and not is_made:
                yield name


def _is_native(cls: type) -> bool:
    return not cls.__flags__ & _HEAP_TYPE


def _attributes(payload: object) -> dict[str, object]:
    attributes = scalars.expect(dict, payload)
    for name in attributes:
        scalars.expect(str, name)
    return attributes


def _misfit(cls: type, fact: str) -> errors.SerializationError:
    return errors.SerializationError(
        f"{cls.__module__}.{cls.__qualname__} {fact}: sender and receiver run different "
        "versions of the class; register it with version= and keep a decoder for the old one"
    )


def register_annotations(function: Callable[..., object], into: TypeRegistry = registry) -> None:
    """Register the dataclasses and Enums in the annotations of ``function``.

    It looks inside generics (``list[Doc]``, ``Doc | None``, ``Annotated[Doc, ...]``), and into the
    annotated fields of classes that it finds. It silently skips unresolvable annotations, other
    classes, those of the standard library or of frameworks, and classes that need ``encode`` and
    ``decode``. A call that sends one raises an error.

    Args:
        function: the function.
        into: the registry.
    """
    plain = inspect.unwrap(function)
    scope = getattr(plain, "__globals__", {})
    seen: set[type] = set()
    for cls in _classes(getattr(plain, "__annotations__", {}), scope):
        _register(cls, into, seen)


def _register(cls: type, into: TypeRegistry, seen: set[type]) -> None:
    packages = [base.__module__.partition(".")[0] for base in cls.__mro__]
    is_users = packages[0] not in sys.stdlib_module_names and _FOREIGN.isdisjoint(packages)
    is_enum = issubclass(cls, enum.Enum)
    if cls in seen or not (is_users or is_enum):
        return
    seen.add(cls)
    # Other classes may do more than hold data. A registered class keeps its name.
    is_data = is_enum or "__dataclass_fields__" in vars(cls)
    if is_data and into.written_as(cls) is None:
        with contextlib.suppress(errors.DeclarationError):
            into.register(cls)
    for base in cls.__mro__:
        scope = getattr(sys.modules.get(base.__module__), "__dict__", {})
        for inner in _classes(vars(base).get("__annotations__", {}), scope):
            _register(inner, into, seen)


def _classes(annotations: Mapping[str, object], scope: dict[str, Any]) -> Iterator[type]:
    for name, annotation in annotations.items():
        # One at a time, so that a name for type checkers only does not hide the others.
        holder: Any = SimpleNamespace(__annotations__={name: annotation})
        try:
            hint = typing.get_type_hints(holder, globalns=scope)[name]
        except Exception:  # an annotation is any expression, and may raise anything
            continue
        yield from _inside(hint)


def _inside(hint: object) -> Iterator[type]:
    origin = typing.get_origin(hint)
    if isinstance(origin or hint, type):
        yield typing.cast("type", origin or hint)
    for argument in typing.get_args(hint):
        yield from _inside(argument)
