"""Decompress no more of a message than its limit: what a sender compressed is untrusted, too.

kombu decompresses while it makes the message, before it can be looked at, with the decoders of
one registry; here that registry gets bounded ones.
"""

from __future__ import annotations

import bz2
import functools
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from kombu import compression

from gw_celery import errors

#: What a header may ask of LZMA; its strongest preset needs half of it.
_LZMA_MEMORY = 128 * 1024 * 1024
_BOUNDED: dict[str, Callable[[], Any]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": functools.partial(lzma.LZMADecompressor, memlimit=_LZMA_MEMORY),
}
#: Those of kombu's that are there with a package of their own, and know no bound here.
_REFUSED = ("application/x-brotli", "application/zstd")


def bound(largest: int) -> None:
    """Have this process refuse bodies of more than ``largest`` bytes while it decompresses them.

    What a project has registered besides kombu's own stays as it is.
    """
    for content_type in compression.encoders():
        encoder, _ = compression.get_encoder(content_type)
        if content_type in _BOUNDED:
            decoder = functools.partial(_decompress, _BOUNDED[content_type], largest)
            compression.register(encoder, decoder, content_type)
        elif content_type in _REFUSED:
            decoder = functools.partial(_refuse, content_type)
            compression.register(encoder, decoder, content_type)


def _decompress(make: Callable[[], Any], largest: int, body: bytes) -> bytes:
    decompressor = make()
    data: bytes = decompressor.decompress(body, largest + 1)
    if len(data) > largest:
        raise errors.MessageTooLarge(f"over {largest}", largest)
    if not decompressor.eof:
        raise errors.UnreadableMessage(
            f"a compressed body of {len(body)} bytes breaks off: send it again"
        )
    return data


def _refuse(content_type: str, body: bytes) -> bytes:
    raise errors.UnreadableMessage(
        f"a body is compressed as {content_type}, whose size cannot be bounded: send it with "
        f"compression='gzip', 'bzip2' or 'lzma'"
    )
