"""The classes whose instances may travel: the only map from a name in a message to a class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar, Unpack, overload

from gw_celery import errors
from gw_celery.codec import scalars, shapes

T = TypeVar("T")

#: What gw-json writes without registration: exactly these classes, not their subclasses.
BUILT_IN: frozenset[type] = frozenset(
    {bool, type(None), list, tuple, dict, set, frozenset, *(s.cls for s in scalars.SCALARS)}
)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One version of one registered class."""

    cls: type
    name: str
    version: int
    shape: shapes.Shape

    @property
    def wire_name(self) -> str:
        """What a message calls it."""
        return f"{self.name}@{self.version}"


class _Options(TypedDict, total=False):
    """The keywords of ``TypeRegistry.register``."""

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

        Without ``encode`` and ``decode``, a dataclass is written by its fields, an Enum by the
        name of the member, an exception by its ``args`` and any other object by its ``__dict__``.
        Subclasses are not included. Names of fields are checked on reading, their types are not.

        Args:
            cls: the class; left out in ``@register_type(name=...)``.
            name: what messages call it, by default ``module.qualname``.
            version: raise it when what is written changes. A class is written in the highest
                version of the name that it was given last, and every version is read.
            encode: turns an instance into something that gw-json can write.
            decode: turns that into an instance again; what it raises refuses the message.

        Returns:
            The class itself.

        Raises:
            DeclarationError: the name is taken by another class, or instances hold data that would
                not be written (slots, a subclass of ``dict``) and no functions are given.
        """

        def add(cls: type[T]) -> type[T]:
            _check(cls, name, version)
            shape = _shape(cls, encode, decode)
            self._add(Entry(cls, _dotted(cls) if name is None else name, version, shape))
            return cls

        return add if cls is None else add(cls)

    def exception_class(self, type_name: str) -> type[Exception] | None:
        """Return the registered exception class called ``module.qualname``, or None."""
        return self._exceptions.get(type_name)

    def written_as(self, cls: type) -> Entry | None:
        """Return the entry under which instances of exactly ``cls`` are written, or None."""
        return self._written.get(cls)

    def called(self, wire_name: str) -> Entry:
        """Return the entry that a message calls ``name@version``.

        Raises:
            SerializationError: there is none; the message tells which versions there are.
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
            # An autoreload made the class again: the old one is gone.
            self._written.pop(taken.cls, None)
        self._read[entry.wire_name] = entry
        written = self._written.get(entry.cls)
        if written is None or written.name != entry.name or written.version <= entry.version:
            self._written[entry.cls] = entry
        if issubclass(entry.cls, Exception):
            self._exceptions[_dotted(entry.cls)] = entry.cls


def _check(cls: object, name: str | None, version: int) -> None:
    if not isinstance(cls, type):
        raise errors.DeclarationError("cls", cls, "must be a class")
    if cls in BUILT_IN:
        raise errors.DeclarationError("cls", cls, "gw-json writes this type already")
    if issubclass(cls, BaseException) and not issubclass(cls, Exception):
        raise errors.DeclarationError("cls", cls, "must not end a process: derive from Exception")
    if name is not None and (type(name) is not str or not name or "@" in name):
        raise errors.DeclarationError("name", name, "must be a str, not empty and without '@'")
    if type(version) is not int or version < 1:
        raise errors.DeclarationError("version", version, "must be an int of 1 or more")


def _shape(
    cls: type,
    encode: Callable[[Any], object] | None,
    decode: Callable[[Any], object] | None,
) -> shapes.Shape:
    if encode is None and decode is None:
        return shapes.shape_of(cls)
    if encode is None or decode is None:
        missing = "encode" if encode is None else "decode"
        raise errors.DeclarationError(missing, None, "encode and decode go together")
    return shapes.Custom(encode, decode)


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


#: The registry of this process.
registry = TypeRegistry()

register_type = registry.register
exception_class = registry.exception_class
