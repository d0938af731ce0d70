from __future__ import annotations

import bz2
import lzma
import tracemalloc
import zlib

import kombu
import pytest
from kombu import compression as kombu_compression

import gw_celery as gw
from gw_celery import errors
from tests.unit.worker.starting import start

MIB = 1024 * 1024
NAMES = ["gzip", "zlib", "bzip2", "lzma"]


@pytest.fixture(autouse=True)
def _bounded(app: gw.App) -> None:
    """This process is a worker that takes bodies of a MiB."""
    for refused in ("application/x-brotli", "application/x-own"):
        kombu_compression.register(bytes, bytes, refused)

    @app.remote
    async def served(x): ...

    app.celery.conf.gw_max_payload_bytes = MIB
    start(app.celery, "gpu", pool="solo")


def received(body: bytes, name: str) -> kombu.Message:
    """A message as kombu makes it of what a broker delivers."""
    return kombu.Message(body=body, headers={"compression": name})


def refusal(message: kombu.Message) -> BaseException:
    ((_, exc, _),) = message.errors
    return exc


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("body", [b"", b"x", b"x" * MIB])
def test_what_is_not_too_large_is_read(name: str, body: bytes) -> None:
    compressed, content_type = kombu_compression.compress(body, name)
    message = received(compressed, content_type)
    assert message.errors == []
    assert message.body == body


@pytest.mark.parametrize("name", NAMES)
def test_one_byte_more_is_refused(name: str) -> None:
    compressed, content_type = kombu_compression.compress(b"x" * (MIB + 1), name)
    exc = refusal(received(compressed, content_type))
    assert isinstance(exc, errors.MessageTooLarge)
    assert f"has over {MIB} bytes" in str(exc)


@pytest.mark.parametrize(
    ("make", "name", "largest"),
    [
        (bz2.BZ2Compressor, "application/x-bz2", 1024),
        (zlib.compressobj, "application/x-gzip", 128 * 1024),
        (lzma.LZMACompressor, "application/x-lzma", 32 * 1024),
    ],
)
def test_a_bomb_is_refused_and_takes_no_memory(make: type, name: str, largest: int) -> None:
    compressor, piece = make(), bytes(MIB)
    bomb = b"".join(compressor.compress(piece) for _ in range(100)) + compressor.flush()
    assert len(bomb) < largest
    tracemalloc.start()
    try:
        exc = refusal(received(bomb, name))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(exc, errors.MessageTooLarge)
    assert peak < 24 * MIB  # of the decompressors: LZMA's dictionary alone has 8 MiB


@pytest.mark.parametrize("name", NAMES)
def test_a_body_that_breaks_off_or_is_none_is_an_error_of_the_message(name: str) -> None:
    compressed, content_type = kombu_compression.compress(b"x" * 1000, name)
    assert "is cut off" in str(refusal(received(compressed[:-5], content_type)))
    assert received(b"garbage", content_type).errors


def test_what_cannot_be_bounded_is_refused_and_a_projects_own_is_left_alone() -> None:
    exc = refusal(received(b"x", "application/x-brotli"))
    assert "send it with compression='gzip'" in str(exc)
    assert received(b"x", "application/x-own").body == b"x"
