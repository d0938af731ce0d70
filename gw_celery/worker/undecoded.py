"""A delivered call in the worker's parent, which does not decode its body: only a child does.

A body may freeze the process that decodes it, fill its memory, or build objects of the user's
classes. Celery's strategy and request read the arguments and the links of a call from the message:
``Undecoded`` answers with texts, and with links for the failures that Celery stores in the parent
(a time limit, a revocation, a lost child). They are read from the end of a body in JSON. For any
other body, and for ``retry_on_worker_lost``, the child reports what is needed in gw-json.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Never

from kombu import serialization
from kombu.message import Message

from gw_celery import codec, errors

logger = logging.getLogger(__name__)

#: The first key of the links, which no string can contain: there its quotes would be escaped.
_LINKS = re.compile(rb'\{\s*"(?:callbacks|errbacks|chain|chord)"\s*:')
#: Maximum size of the links in bytes, and maximum number of places in it where they may begin.
_LONGEST_LINKS = 256 * 1024
_MOST_BEGINNINGS = 8
#: It knows no class of the user, so that the parent builds none.
_codec = codec.Codec(codec.TypeRegistry(), codec.Limits())
_READ: dict[str, Callable[[bytes], Any]] = {
    codec.CONTENT_TYPE: _codec.loads,
    "application/json": lambda text: serialization.loads(text, "application/json", "utf-8"),
}


class Undecoded(Message):
    """A copy of ``message`` with the same acknowledgement, whose body is never decoded."""

    def __init__(self, message: Any) -> None:
        # Without the headers, because they would have the body decompressed again.
        super().__init__(  # type: ignore[no-untyped-call]
            body=message.body,
            delivery_tag=message.delivery_tag,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            delivery_info=message.delivery_info,
            properties=message.properties,
            accept=message.accept,
            channel=message.channel,
        )
        self.headers = message.headers

    def decode(self) -> Call:
        return self._call

    def learn_links(self, text: str) -> None:
        """Take the links that the child has read."""
        self._call[2].text = text

    @functools.cached_property
    def _call(self) -> Call:
        args, kwargs = (self.headers.get(name) for name in ("argsrepr", "kwargsrepr"))
        return Call((Arguments(args), Arguments(kwargs), Links(self)))


class Call(tuple[Any, ...]):
    """Celery asks whether it contains ``"args"``, as the mappings of older protocols do."""

    __slots__ = ()

    def __contains__(self, key: object) -> bool:
        return False


class Arguments(str):
    """Stands for arguments: the text that the sender wrote about them."""

    __slots__ = ()

    def __new__(cls, text: object) -> Arguments:
        return super().__new__(cls, text or "")

    def __iter__(self) -> Never:
        # Otherwise Celery's ``retry_on_worker_lost`` could send a call with the letters.
        raise errors.UsageError("the arguments of a call are decoded in its child only")

    def __json__(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


class Links(Mapping[str, Any]):
    """The callbacks, errbacks, chain and chord of a call; read when Celery needs them."""

    def __init__(self, message: Message) -> None:
        #: The report of the child.
        self.text = ""
        self._message = message

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    @functools.cached_property
    def _content(self) -> Mapping[str, Any]:
        try:
            links: Any = _codec.loads(self.text) if self.text else _read(self._message)
            return dict(links)
        except Exception as exc:
            headers = self._message.headers
            logger.warning(
                "task %s[%s]: its errbacks and chord, if any, are not told of its failure: %s",
                *(headers.get("task"), headers.get("id"), exc),
            )
        return {}


def _read(message: Message) -> Any:
    """Return the last value of a body ``[arguments, keyword arguments, links]``.

    gw-json writes this body as ``{"~tuple": [...]}``.

    Raises:
        SerializationError: if that is impossible without the user's classes.
    """
    body = message.body.encode() if isinstance(message.body, str) else message.body
    read = _READ.get(message.content_type)
    if read is None:
        raise errors.SerializationError(f"no child has decoded its {message.content_type}")
    end = body[-_LONGEST_LINKS:].rstrip().removesuffix(b"}").removesuffix(b"]")
    begins = [found.start() for found in _LINKS.finditer(end)][-_MOST_BEGINNINGS:]
    for begin in reversed(begins):
        with contextlib.suppress(Exception):  # also for a value inside the links: it ends before
            return read(end[begin:])
    if begins or len(body) > _LONGEST_LINKS:
        raise errors.SerializationError("they are too long, or have types other than JSON's")
    return {}
