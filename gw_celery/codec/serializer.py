"""gw-json's documents: their text and limits, and the two walks between values and plain JSON.

A value that JSON lacks becomes ``{"~marker": payload}``. A dict of the user's with one key that
begins with ``~`` is written as ``{"~dict": [[key, value]]}``, so no data can be taken for a marker.

Both walks count depth alike, one for each value inside another, and refuse the same sets and dicts,
so what can be written can be read.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import reprlib
from collections.abc import Callable, Collection
from typing import Any

from kombu import serialization

from gw_celery import errors
from gw_celery.codec import scalars, types

#: What ``serializer=`` and ``accept_content`` call it.
NAME = "gw-json"

#: What a message calls it.
CONTENT_TYPE = "application/x-gw-json"

_ATOMS: frozenset[type] = frozenset({str, int, float, bool, type(None)})
_STR: frozenset[type] = frozenset({str})
_COLLECTIONS: dict[type, str] = {tuple: "~tuple", set: "~set", frozenset: "~frozenset"}
_COLLECTION_OF: dict[str, type[Any]] = {marker: cls for cls, marker in _COLLECTIONS.items()}
_SCALARS = {scalar.cls: scalar for scalar in scalars.SCALARS}
_SCALAR_OF = {scalar.marker: scalar for scalar in scalars.SCALARS}
_PAIRS = "~dict"
#: How many members of a set, or keys of a dict, may have the same hash.
_MOST_OF_ONE_HASH = 128
#: Python salts the hashes of these, so that a sender cannot choose many of one hash.
_SALTED: frozenset[type] = frozenset({str, bytes})
_OBJECT = "~obj"

#: What Celery and Django themselves put into messages, by the dotted name of a base, since nothing
#: here may import them. Celery's own JSON writes them as these too. (Signatures: ``__json__``.)
_LOWERED: dict[str, Callable[[Any], object]] = {
    "celery.utils.functional._regen": list,
    "django.utils.functional.Promise": str,
    "kombu.utils.functional.lazy": lambda value: value.evaluate(),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is refused, both on writing and on reading.

    Attributes:
        depth: how many values may lie inside one another.
        size: how many bytes the text may have; checked before it is parsed.
    """

    depth: int = 100
    size: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise errors.DeclarationError(field.name, value, "must be an int of 1 or more")


class Codec:
    """gw-json with one registry of types and one set of limits."""

    def __init__(self, registry: types.TypeRegistry, limits: Limits) -> None:
        self._size = limits.size
        self._depth = limits.depth
        self._writer = Writer(registry, limits.depth, is_careful=False)
        self._careful_writer = Writer(registry, limits.depth, is_careful=True)
        self._reader = Reader(registry, limits.depth)

    def dumps(self, value: object) -> str:
        """Return ``value`` as JSON text.

        Raises:
            SerializationError: a type is not registered, the value contains itself, or it is
                deeper or longer than the limits.
        """
        try:
            text, size = self._text(value)
        except RecursionError:
            raise errors.SerializationError(_BEYOND_THE_STACK) from None
        self._check_size(size)
        return text

    def loads(self, data: str | bytes | bytearray | memoryview) -> object:
        """Return the value that ``dumps`` was given.

        Raises:
            SerializationError: the text is not gw-json, names a type that is not registered here,
                or is deeper or longer than the limits.
        """
        try:
            if isinstance(data, str):
                size = len(data) if data.isascii() else len(data.encode(errors="surrogatepass"))
            else:
                size = data.nbytes if isinstance(data, memoryview) else len(data)
            self._check_size(size)
            text = data if isinstance(data, str) else str(data, "utf-8")
            node = _parse(text)
            # The parsed value is the answer already when there is no marker (whose ``~`` may be an
            # escape) and no room for so many brackets. Searching a long text is no quicker.
            if len(text) > 2 * self._depth or '"~' in text or '"\\u007' in text:
                return self._reader.read(node)
            return node
        except errors.SerializationError:
            raise
        except RecursionError:
            raise errors.SerializationError(_BEYOND_THE_STACK) from None
        except ValueError as error:
            raise errors.SerializationError(
                f"the text is not JSON ({error}): it was cut, or not written by gw-json"
            ) from error

    def _text(self, value: object) -> tuple[str, int]:
        try:
            return _sized(_render(self._writer.write(value)))
        except errors.SerializationError:
            raise
        except ValueError:
            # A nan, an int of thousands of digits or a lone surrogate: rare enough to start again.
            return _sized(_render(self._careful_writer.write(value)))

    def _check_size(self, size: int) -> None:
        if size > self._size:
            raise errors.SerializationError(
                f"the document has {size} bytes where {self._size} are allowed: "
                "send a reference to the data, or raise the limit on both sides"
            )


def configure(limits: Limits) -> None:
    """Set the limits of this process."""
    global _codec
    _codec = Codec(types.registry, limits)


def dumps(value: object) -> str:
    """Return ``value`` as gw-json text, with the types and limits of this process.

    Raises:
        SerializationError: as ``Codec.dumps``.
    """
    return _codec.dumps(value)


def loads(data: str | bytes | bytearray | memoryview) -> object:
    """Return the value that ``dumps`` was given, with the types and limits of this process.

    Raises:
        SerializationError: as ``Codec.loads``.
    """
    return _codec.loads(data)


def register() -> None:
    """Make gw-json known to kombu, and so to Celery; calling it again changes nothing."""
    # kombu declares no types, and the stubs for it only half of them.
    serializers: Any = serialization.registry
    serializers.register(NAME, dumps, loads, CONTENT_TYPE, "utf-8")


class Writer:
    """Turns values into plain JSON values with markers.

    Without ``is_careful`` it takes every str, int and float for one that JSON can write. That is
    nearly always so, and far quicker; where the JSON encoder refuses one, a careful walk marks it.
    """

    def __init__(self, registry: types.TypeRegistry, depth: int, is_careful: bool) -> None:
        self._registry = registry
        self._depth = depth
        self._is_careful = is_careful
        self._atoms = frozenset({bool, type(None)}) if is_careful else _ATOMS

    def write(self, value: object, depth: int = 1) -> object:
        """Return ``value`` as JSON values; raise ``SerializationError`` for what cannot be."""
        cls = type(value)
        if cls in _ATOMS and not (self._is_careful and scalars.json_changes(value)):
            return value
        if depth > self._depth:
            raise _too_deep(self._depth, "or contains itself: break the cycle, or send it flatter")
        if cls is list:
            return self._items(value, depth + 1)  # type: ignore[arg-type]
        if cls is dict:
            return self._dict(value, depth + 1)  # type: ignore[arg-type]
        if cls in _COLLECTIONS:
            items: list[object] = [*value]  # type: ignore[misc]
            _check_hashes(cls, items)
            return {_COLLECTIONS[cls]: self._items(items, depth + 1)}
        if cls in _SCALARS:
            return {_SCALARS[cls].marker: _SCALARS[cls].write(value)}
        return self._object(value, depth)

    def _items(self, values: list[object], depth: int) -> list[object]:
        atoms = self._atoms
        # Two C loops: quicker than a comprehension by far when a list is long and flat.
        if atoms.issuperset(map(type, values)):
            return values
        return [v if type(v) in atoms else self.write(v, depth) for v in values]

    def _dict(self, value: dict[Any, object], depth: int) -> object:
        if not _STR.issuperset(map(type, value)) or self._misleads(value):
            _check_hashes(dict, value)
            # A list for each pair: the keys are any values, and are written as such.
            return {_PAIRS: [self._items([*pair], depth) for pair in value.items()]}
        atoms = self._atoms
        if atoms.issuperset(map(type, value.values())):
            return value
        return {k: v if type(v) in atoms else self.write(v, depth) for k, v in value.items()}

    def _misleads(self, value: dict[str, object]) -> bool:
        if len(value) == 1 and next(iter(value)).startswith("~"):
            return True
        return self._is_careful and any(map(scalars.json_changes, value))

    def _object(self, value: object, depth: int) -> object:
        cls = type(value)
        entry = self._registry.written_as(cls)
        if entry is not None:
            payload = _ask(cls, entry.shape.take, value)
            return {_OBJECT: [entry.wire_name, self.write(payload, depth + 1)]}
        names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
        lower = getattr(cls, "__json__", None) or next(
            (_LOWERED[name] for name in names if name in _LOWERED), None
        )
        if lower is None:
            raise errors.SerializationError(self._unregistered(cls))
        # One level more than is read, so that a ``__json__`` that returns itself ends.
        return self.write(_ask(cls, lower, value), depth + 1)

    def _unregistered(self, cls: type) -> str:
        fact = f"gw-json cannot write {cls.__module__}.{cls.__qualname__}: it is not registered"
        remedy = f"register it with gw.register_type({cls.__name__})"
        for base in cls.__mro__:
            if base in types.BUILT_IN:
                plain = base.__name__
                return f"{fact}, and would come back as {plain}: send a plain {plain}, or {remedy}"
            if self._registry.written_as(base) is not None:
                return f"{fact}, only its base class {base.__qualname__} is: {remedy}"
        return f"{fact}: {remedy}, or send plain data instead"


class Reader:
    """Turns parsed JSON with markers back into values."""

    def __init__(self, registry: types.TypeRegistry, depth: int) -> None:
        self._registry = registry
        self._depth = depth

    def read(self, node: Any, depth: int = 1) -> object:
        """Return the value that ``node`` describes; raise ``SerializationError`` if there is none.

        ``node`` is what the JSON decoder made: str, int, float, bool, None, lists and dicts.
        """
        if type(node) in _ATOMS:
            return node
        if depth > self._depth:
            raise _too_deep(self._depth, "which is the limit here: send it flatter")
        if type(node) is list:
            return self._items(node, depth + 1)
        if len(node) == 1:
            [(marker, payload)] = node.items()
            if marker.startswith("~"):
                return self._marked(marker, payload, depth + 1)
        if _ATOMS.issuperset(map(type, node.values())):
            return node
        return {k: v if type(v) in _ATOMS else self.read(v, depth + 1) for k, v in node.items()}

    def _items(self, nodes: list[object], depth: int) -> list[object]:
        if _ATOMS.issuperset(map(type, nodes)):
            return nodes
        return [n if type(n) in _ATOMS else self.read(n, depth) for n in nodes]

    def _marked(self, marker: str, payload: object, depth: int) -> object:
        try:
            if marker in _COLLECTION_OF:
                cls = _COLLECTION_OF[marker]
                items = self._items(scalars.expect(list, payload), depth)
                _check_hashes(cls, items)
                return cls(items)
            if marker in _SCALAR_OF:
                return _SCALAR_OF[marker].read(payload)
            if marker == _PAIRS:
                pairs: list[Any] = [
                    self._items(scalars.expect(list, pair), depth)
                    for pair in scalars.expect(list, payload)
                ]
                _check_hashes(dict, [key for key, _ in pairs])
                return dict(pairs)
            if marker == _OBJECT:
                wire_name, content = scalars.expect(list, payload)
                entry = self._registry.called(scalars.expect(str, wire_name))
                value = self.read(content, depth)
                return _ask(entry.cls, entry.shape.build, value)
        except (errors.SerializationError, RecursionError):
            raise
        except Exception as error:
            # Beside bad payloads: __hash__ and __eq__ of registered classes, which are users' code.
            raise errors.SerializationError(
                f"the marker {marker!r} holds {reprlib.repr(payload)}, which cannot be read "
                f"({type(error).__name__}: {error}): the message was not written by gw-json"
            ) from error
        raise errors.SerializationError(
            f"the marker {marker[:80]!r} is not known here: update gw_celery in this process"
        )


def _ask(cls: type, function: Callable[[Any], object], argument: object) -> object:
    """Call what a user's class brings, and name the class when that fails."""
    try:
        return function(argument)
    except (errors.SerializationError, RecursionError):
        raise
    except Exception as error:
        raise errors.SerializationError(
            f"{cls.__module__}.{cls.__qualname__} failed in gw-json "
            f"({type(error).__name__}: {error}): check its fields, or its encode and decode"
        ) from error


def _check_hashes(cls: type, keys: Collection[object]) -> None:
    """Refuse a set or dict of which many keys have one hash: each is compared with all before it.

    Any sender can write such numbers, and tuples and objects that hold them; 64 MB of them would
    take a day. So that is counted before the container is built.
    """
    if len(keys) <= _MOST_OF_ONE_HASH or cls is tuple or _SALTED.issuperset(map(type, keys)):
        return
    if len(keys) - len(set(map(hash, keys))) < _MOST_OF_ONE_HASH:
        return
    most = max(collections.Counter(map(hash, keys)).values())
    if most > _MOST_OF_ONE_HASH:
        raise errors.SerializationError(
            f"{most} keys of a {cls.__name__} of {len(keys)} have the same hash, over the limit of "
            f"{_MOST_OF_ONE_HASH}: send a list instead"
        )


def _too_deep(limit: int, remedy: str) -> errors.SerializationError:
    return errors.SerializationError(f"the value is nested deeper than {limit} levels, {remedy}")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


def _sized(text: str) -> tuple[str, int]:
    return text, len(text) if text.isascii() else len(text.encode())


# Made once: json.dumps and json.loads make new ones for each call that is not the plainest.
# A cycle cannot reach the encoder, for the walk before it has an end.
_render = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
).encode
_parse = json.JSONDecoder(parse_constant=_refuse_constant).decode
_BEYOND_THE_STACK = (
    "the value is nested deeper than the stack of this thread allows: send it flatter"
)
_codec = Codec(types.registry, Limits())
