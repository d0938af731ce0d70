"""What a call leaves when its device has no memory left; torch is used only where it is loaded."""

from __future__ import annotations

import gc
import sys
import traceback


def is_exhausted(exc: Exception) -> bool:
    """Whether a device ran out of memory, by the name of torch's class: torch is not imported."""
    return any(one.__name__ == "OutOfMemoryError" for one in type(exc).__mro__)


def free(exc: Exception) -> None:
    """Let go of the failed call's tensors, and of what torch keeps for later."""
    held: BaseException | None = exc
    while held is not None:
        traceback.clear_frames(held.__traceback__)
        held = held.__context__
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
