"""The document as a whole: its text, its limits, and its name among kombu's serializers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from kombu import serialization

from gw_celery import errors
from gw_celery.codec import types, walk

#: What ``serializer=`` and ``accept_content`` call it.
NAME = "gw-json"

#: What a message calls it.
CONTENT_TYPE = "application/x-gw-json"


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
        self._writer = walk.Writer(registry, limits.depth)
        self._careful_writer = walk.Writer(registry, limits.depth, is_careful=True)
        self._reader = walk.Reader(registry, limits.depth)

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
            text = self._decoded(data)
            node = _parse(text)
            return self._reader.read(node) if self._needs_walk(text) else node
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

    def _decoded(self, data: str | bytes | bytearray | memoryview) -> str:
        if isinstance(data, str):
            self._check_size(len(data) if data.isascii() else len(data.encode(errors=_ESCAPES)))
            return data
        self._check_size(data.nbytes if isinstance(data, memoryview) else len(data))
        return str(data, "utf-8")

    def _check_size(self, size: int) -> None:
        if size > self._size:
            raise errors.SerializationError(
                f"the document has {size} bytes where {self._size} are allowed: "
                "send a reference to the data, or raise the limit on both sides"
            )

    def _needs_walk(self, text: str) -> bool:
        # The parsed value is the answer already when there is no marker (whose ``~`` may be an
        # escape) and no room for so many brackets. Searching a long text is no quicker than a walk.
        return len(text) > 2 * self._depth or '"~' in text or '"\\u007' in text


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
_ESCAPES = "surrogatepass"
_BEYOND_THE_STACK = (
    "the value is nested deeper than the stack of this thread allows: send it flatter"
)
_codec = Codec(types.registry, Limits())
