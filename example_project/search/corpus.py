"""The library's vectors as one matrix in a worker's memory.

Imported by workers only: it needs numpy, which web processes do without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from django.db.models import Count, Max, Sum

from search.models import Document


class Row(NamedTuple):
    """What an answer shows of a document."""

    pk: int
    title: str
    text: str


class Corpus:
    """All searchable documents, read again only after they changed."""

    def __init__(self) -> None:
        self._version: dict[str, object] | None = None
        self._rows: list[Row] = []
        self._matrix = np.empty((0, 0), dtype=np.float32)
        self._turn = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_loaded(self) -> bool:
        return self._version is not None

    async def refresh(self) -> None:
        """Read the documents unless the database still holds what is in memory."""
        # One at a time: of two searches at once, the slower must not bring back what is older.
        async with self._turn:
            await self._refresh()

    async def _refresh(self) -> None:
        # The version first: what is added while the rows are read costs one more reading at the
        # next call. The other way round it would be missed.
        version = await _version()
        if version == self._version:
            return
        stored = Document.objects.searchable().values_list("pk", "title", "text", "embedding")
        found = [row async for row in stored]
        vectors = [np.frombuffer(embedding, dtype="<f4") for *_, embedding in found]
        self._rows = [Row(pk, title, text) for pk, title, text, _ in found]
        self._matrix = np.array(vectors, dtype=np.float32)
        self._version = version

    def nearest(self, vector: Sequence[float], limit: int) -> list[tuple[Row, float]]:
        """Return the ``limit`` rows of the highest cosine with ``vector``, the highest first."""
        if not self._rows:
            return []
        # All vectors have length one, so that their products are the cosines.
        scores = self._matrix @ np.asarray(vector, dtype=np.float32)
        best = np.argsort(-scores, kind="stable")[:limit]
        return [(self._rows[position], float(scores[position])) for position in best]


async def _version() -> dict[str, object]:
    """Numbers of which one changes when a document is added, embedded anew or deleted."""
    return await Document.objects.searchable().aaggregate(
        count=Count("pk"), ids=Sum("pk"), latest=Max("embedded_at")
    )
