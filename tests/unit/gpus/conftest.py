from __future__ import annotations

from tests.gpu_workers import gpu_worker as gpu_worker
