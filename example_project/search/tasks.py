"""What the workers run: the model, the two services on it, and two ordinary Celery tasks.

Web processes import this module to call the tasks, so everything heavy is imported in the bodies:
torch is loaded only in a worker that consumes the queue family ``cpu``.
"""

from __future__ import annotations

import array
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from celery import chain, shared_task
from celery.result import AsyncResult
from django.utils import timezone

import gw_celery as gw
from search.encoder import Encoded, Encoder
from search.models import Document

app = gw.App("search")


@app.context()
class MiniLM:
    """The sentence encoder, loaded once in each worker process."""

    async def __aenter__(self) -> Self:
        # A thread: the load takes seconds, and other contexts and hooks enter meanwhile.
        self._encoder = await asyncio.to_thread(Encoder.load)
        self._turn = asyncio.Lock()
        return self

    async def __aexit__(self, *exc: object) -> None:
        del self._encoder

    async def encode(self, texts: Sequence[str]) -> Encoded:
        """Call the model for ``texts``."""
        # Batches come one at a time; the single texts of Celery's own pools do not.
        async with self._turn:
            return await asyncio.to_thread(self._encoder.encode, texts)


@dataclass(frozen=True)
class ModelCall:
    """The call that a text had its share in; times in seconds.

    The first two are None where no batches are formed: on Celery's own pools.
    """

    #: Texts in the call, those that the model refused among them.
    batch_size: int | None
    #: How long this text waited in the replica until the call began.
    queue_wait: float | None
    #: How long the model computed, for all texts of the call together.
    model_time: float


@dataclass(frozen=True)
class Embedding:
    """The meaning of a text as 384 numbers, and what it took."""

    call: ModelCall
    # Celery logs what a task returned, and 384 numbers are not worth reading.
    vector: list[float] = field(repr=False)


@app.remote(gpu=gw.Gpu("CPU"), benchmark_dataset=[{"texts": "hello"}])
# A user who searches does not notice 10 ms, and what comes within them shares a call of the model.
@gw.batched(max_batch_size=32, wait_ms=10)
async def embed(texts: list[str]) -> list[Embedding | ValueError]:
    """Return the meaning of a text; texts that come together share a call."""
    model: MiniLM = app.get_context(MiniLM)
    encoded = await model.encode(texts)
    calls = _calls(len(texts), encoded.model_time)
    # An error in a text's place fails that text alone; raised, it would be a failure of the call.
    return [
        entry if isinstance(entry, ValueError) else Embedding(call, entry)
        for call, entry in zip(calls, encoded.entries, strict=True)
    ]


def _calls(count: int, model_time: float) -> list[ModelCall]:
    """Return what to tell each of the ``count`` texts of the batch that runs now."""
    batch = gw.current_batch()
    if batch is None:
        return [ModelCall(None, None, model_time)] * count
    return [ModelCall(batch.size, waited, model_time) for waited in batch.waited]


@dataclass(frozen=True)
class Hit:
    """A document that a search found; ``score`` is the cosine of the angle to the query."""

    document_id: int
    title: str
    text: str
    score: float


@dataclass(frozen=True)
class Ranking:
    """What a search found, and the call of the model for its query."""

    results: list[Hit]
    call: ModelCall


@app.cls(
    gpu=gw.Gpu("CPU"),
    probes=[gw.Probe.on("health", kind="liveness", period_s=30, failures=3)],
)
# Searches wait for the same batches, so a replica takes as many as a batch has room for.
@gw.concurrent(max_inputs=32)
class Ranker:
    """Ranks all documents by their nearness to a query; keeps their vectors in memory."""

    top_k: int = gw.parameter(default=5)

    @gw.on_enter()
    async def load(self) -> None:
        from search.corpus import Corpus

        self.corpus = Corpus()
        await self.corpus.refresh()

    @gw.method()
    async def rank(self, query: str) -> Ranking:
        """Return the ``top_k`` nearest documents, the nearest first."""
        # This process serves embed as well: awaiting it is a call here, not a message, and the
        # query shares a batch with whatever else is to be embedded.
        meaning, _ = await asyncio.gather(embed(query), self.corpus.refresh())
        nearest = self.corpus.nearest(meaning.vector, self.top_k)
        results = [
            Hit(document_id=row.pk, title=row.title, text=row.text, score=score)
            for row, score in nearest
        ]
        return Ranking(results, meaning.call)

    @gw.method()
    def health(self) -> dict[str, Any]:
        return {"ok": self.corpus.is_loaded, "documents": len(self.corpus)}


# gw-json, for Celery's own JSON has no dataclasses.
@shared_task(serializer="gw-json")
def store(meaning: Embedding, document_id: int) -> bool:
    """Keep the vector of a document, which makes it searchable; False when it is gone."""
    found = Document.objects.filter(pk=document_id)
    return bool(found.update(embedding=_packed(meaning.vector), embedded_at=timezone.now()))


@shared_task
def discard(document_id: int) -> None:
    """Drop a document that the model refused: the library holds only what can be found."""
    Document.objects.waiting().filter(pk=document_id).delete()


def make_searchable(document: Document) -> AsyncResult:
    """Send a document through the model and store what it returns.

    The answer is the one of the last step; its ``parent`` is the one of ``embed``.
    """
    steps = chain(embed.s(document.passage), store.s(document.pk))
    return steps.on_error(discard.si(document.pk)).delay()


def _packed(vector: Sequence[float]) -> bytes:
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
