"""gw-json's documents, in every process: limits, and the conversions to and from plain JSON.

A value that JSON lacks becomes ``{"~marker": payload}``. A user's dict whose only key begins with
``~`` is written as ``{"~dict": [[key, value]]}``, so that data cannot be mistaken for a marker.

Writing and reading count depth in the same way (one level per value inside another), and refuse the
same sets and dicts. What can be written can therefore be read.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Collection
from typing import Any

from kombu import serialization

from gw_celery import errors
from gw_celery.codec import scalars, types

#: Its name in ``serializer=`` and ``accept_content``.
NAME = "gw-json"

#: Its content type in a message.
CONTENT_TYPE = "application/x-gw-json"

_ATOMS: frozenset[type] = frozenset({str, int, float, bool, type(None)})
_STR: frozenset[type] = frozenset({str})
_COLLECTIONS: dict[type, str] = {tuple: "~tuple", set: "~set", frozenset: "~frozenset"}
_COLLECTION_OF: dict[str, type[Any]] = {marker: cls for cls, marker in _COLLECTIONS.items()}
_SCALARS = {scalar.cls: scalar for scalar in scalars.SCALARS}
_SCALAR_OF = {scalar.marker: scalar for scalar in scalars.SCALARS}
_PAIRS = "~dict"
#: Maximum number of members of a set, or keys of a dict, with the same hash.
_MOST_OF_ONE_HASH = 128
#: The same if long numbers may be compared with Decimals, which is slow.
_MOST_SLOW_OF_ONE_HASH = 16
#: Number of characters of a long number.
_LONG = 100
#: Types with salted hashes: a sender cannot choose many values of one hash.
_SALTED: frozenset[type] = frozenset({str, bytes})
_OBJECT = "~obj"

#: Objects that Celery and Django put into messages, by the dotted name of a base class, because
#: this module must not import them. Celery's own JSON converts them too. (Signatures have
#: ``__json__``.)
_LOWERED: dict[str, Callable[[Any], object]] = {
    "celery.utils.functional._regen": list,
    "django.utils.functional.Promise": str,
    "kombu.utils.functional.lazy": lambda value: value.evaluate(),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits for writing and reading.

    Attributes:
        depth: maximum nesting of values.
        size: maximum bytes of the text, checked before parsing.
        values: maximum number of JSON values in the text, checked before parsing. An empty list or
            dict counts twice.
    """

    depth: int = 100
    size: int = 64 * 1024 * 1024
    values: int = 2_000_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise errors.DeclarationError(field.name, value, "must be an int of 1 or more")


class Codec:
    """gw-json with one registry of types and one set of limits."""

    def __init__(self, registry: types.TypeRegistry, limits: Limits) -> None:
        self._size = limits.size
        self._values = limits.values
        self._depth = limits.depth
        self._writer = Writer(registry, limits.depth, is_careful=False)
        self._careful_writer = Writer(registry, limits.depth, is_careful=True)
        self._reader = Reader(registry, limits.depth)

    def dumps(self, value: object) -> str:
        """Return ``value`` as JSON text.

        Raises:
            SerializationError: if a type is not registered, the value contains itself, or it
                exceeds the limits.
        """
        try:
            text, size = self._text(value)
        except RecursionError:
            raise errors.SerializationError(_BEYOND_THE_STACK) from None
        self._check_size(size)
        self._check_values(text)
        return text

    def loads(self, data: str | bytes | bytearray | memoryview) -> object:
        """Return the value from the text that ``dumps`` wrote.

        Raises:
            SerializationError: if the text is not gw-json, names a type that is not registered
                here, or exceeds the limits.
        """
        try:
            text = self.checked(data)
            node = _parser().decode(text)
            # The parsed value is the answer if the text has no marker (whose ``~`` may be escaped)
            # and is too short to be too deep. Searching a long text saves no time.
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

    def checked(self, data: str | bytes | bytearray | memoryview) -> str:
        """Return the text of any JSON document within the limits of size and values.

        Raises:
            SerializationError: if it exceeds them.
            UnicodeDecodeError: if it is not text.
        """
        if isinstance(data, str):
            size = len(data) if data.isascii() else len(data.encode(errors="surrogatepass"))
        else:
            size = data.nbytes if isinstance(data, memoryview) else len(data)
        self._check_size(size)
        text = data if isinstance(data, str) else str(data, "utf-8")
        self._check_values(text)
        return text

    def _text(self, value: object) -> tuple[str, int]:
        writer = self._writer if scalars.bounds_ints() else self._careful_writer
        try:
            return _sized(_render(writer.write(value)))
        except errors.SerializationError:
            raise
        except ValueError:
            # A nan, a very long int or a lone surrogate: rare enough to start again.
            return _sized(_render(self._careful_writer.write(value)))

    def _check_size(self, size: int) -> None:
        if size > self._size:
            raise errors.SerializationError(
                f"the document has {size} bytes where {self._size} are allowed: "
                "send a reference to the data, or raise the limit on both sides"
            )

    def _check_values(self, text: str) -> None:
        # Strings are left out only if their commas and brackets can matter: that takes longer.
        if len(text) < self._values or _values(text) <= self._values:
            return
        if (values := _values(_STRING.sub("", text))) > self._values:
            raise errors.SerializationError(
                f"the document has {values} values where {self._values} are allowed: send many "
                "numbers as bytes, or raise gw_max_payload_values on both sides"
            )


def configure(limits: Limits) -> None:
    global _codec
    _codec = Codec(types.registry, limits)


def dumps(value: object) -> str:
    """Return ``value`` as gw-json text, with the types and limits of this process.

    Raises:
        SerializationError: as ``Codec.dumps``.
    """
    return _codec.dumps(value)


def loads(data: str | bytes | bytearray | memoryview) -> object:
    """Return the value of a gw-json text, with the types and limits of this process.

    Raises:
        SerializationError: as ``Codec.loads``.
    """
    return _codec.loads(data)


def checked(data: str | bytes) -> str:
    """Return JSON text of any serializer, within the limits of this process.

    Raises:
        SerializationError: as ``Codec.checked``.
        UnicodeDecodeError: as ``Codec.checked``.
    """
    return _codec.checked(data)


def register() -> None:
    """Register gw-json with kombu, and so with Celery; repeated calls change nothing."""
    # kombu has no types, and its stubs have only half of them.
    serializers: Any = serialization.registry
    serializers.register(NAME, dumps, loads, CONTENT_TYPE, "utf-8")


class Writer:
    """Converts values to plain JSON values with markers.

    Without ``is_careful`` it assumes that JSON can write every str, int and float, which is nearly
    always true and much faster. If the encoder refuses one, a careful writer marks it.
    """

    def __init__(self, registry: types.TypeRegistry, depth: int, is_careful: bool) -> None:
        self._registry = registry
        self._depth = depth
        self._is_careful = is_careful
        self._atoms = frozenset({bool, type(None)}) if is_careful else _ATOMS

    def write(self, value: object, depth: int = 1) -> object:
        """Return ``value`` as JSON values; raise ``SerializationError`` if that is impossible."""
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
        # Two loops in C, much faster than a comprehension for a long flat list.
        if atoms.issuperset(map(type, values)):
            return values
        return [v if type(v) in atoms else self.write(v, depth) for v in values]

    def _dict(self, value: dict[Any, object], depth: int) -> object:
        if not _STR.issuperset(map(type, value)) or self._misleads(value):
            _check_hashes(dict, value)
            # A list for each pair, because keys may be any values.
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
        # One more level, so that a ``__json__`` that returns itself ends.
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
    """Converts parsed JSON with markers back to values."""

    def __init__(self, registry: types.TypeRegistry, depth: int) -> None:
        self._registry = registry
        self._depth = depth

    def read(self, node: Any, depth: int = 1) -> object:
        """Return the value of ``node``; raise ``SerializationError`` if it is invalid.

        ``node`` comes from the JSON decoder: str, int, float, bool, None, lists and dicts.
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
            # Also user code may raise: __hash__ and __eq__ of registered classes.
            raise errors.SerializationError(
                f"the marker {marker!r} holds {reprlib.repr(payload)}, which cannot be read "
                f"({type(error).__name__}: {error}): the message was not written by gw-json"
            ) from error
        raise errors.SerializationError(
            f"the marker {marker[:80]!r} is not known here: update gw_celery in this process"
        )


def _ask(cls: type, function: Callable[[Any], object], argument: object) -> object:
    """Call a function of a user's class, and name the class if that fails."""
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
    """Refuse a set or dict with many keys of one hash, before it is built.

    Each such key is compared with all before it. Any sender can choose such numbers, and tuples and
    objects that hold them; 64 MB of them would take a day.
    """
    few = _MOST_SLOW_OF_ONE_HASH
    if len(keys) <= few or cls is tuple or _SALTED.issuperset(map(type, keys)):
        return
    if len(keys) - len(set(map(hash, keys))) < few:
        return
    counts = collections.Counter(map(hash, keys))
    # Also numbers inside tuples and objects show in these texts.
    texts = [repr(key) for key in keys if counts[hash(key)] > few]
    is_slow = any("Decimal(" in text for text in texts) and max(map(len, texts)) > _LONG
    limit = few if is_slow else _MOST_OF_ONE_HASH
    most = max(counts.values())
    if most > limit:
        raise errors.SerializationError(
            f"{most} keys of a {cls.__name__} of {len(keys)} have the same hash, over the limit of "
            f"{limit}: send a list instead"
        )


def _too_deep(limit: int, remedy: str) -> errors.SerializationError:
    return errors.SerializationError(f"the value is nested deeper than {limit} levels, {remedy}")


def _values(text: str) -> int:
    return 1 + text.count(",") + text.count("[") + text.count("{")


def _parser() -> json.JSONDecoder:
    return _decoder if scalars.bounds_ints() else _careful_decoder


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


def _sized(text: str) -> tuple[str, int]:
    return text, len(text) if text.isascii() else len(text.encode())


# Created once, because json.dumps and json.loads create new ones for most options. A cycle cannot
# reach the encoder, because the walk before it is limited in depth.
_render = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
).encode
_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
_careful_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=scalars.parse_int)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BEYOND_THE_STACK = (
    "the value is nested deeper than the stack of this thread allows: send it flatter"
)
_codec = Codec(types.registry, Limits())
