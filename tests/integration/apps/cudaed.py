"""``served``, with a torch of which CUDA is up while the file ``CUDA_UP`` exists."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

from served import celery as celery

torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
    is_initialized=lambda: Path(os.environ["CUDA_UP"]).exists()
)
sys.modules["torch"] = torch
