from __future__ import annotations

import subprocess
import sys

from tests.processes import environment

HEAVY = {"torch", "numpy", "django", "flower", "tornado", "prometheus_client", "pytest", "pynvml"}


def loaded_by(code: str) -> set[str]:
    """The top packages that ``code`` loads beyond Celery, in a fresh interpreter."""
    script = (
        "import sys; from celery import Celery, Task, shared_task; before = set(sys.modules)\n"
        f"{code}\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    return set(done.stdout.split())


def test_importing_loads_no_heavy_library() -> None:
    loaded = loaded_by("import gw_celery")

    assert "gw_celery" in loaded
    assert not HEAVY & loaded


def test_declaring_loads_no_heavy_library() -> None:
    code = """
import gw_celery as gw
app = gw.App("x")
@app.context()
class Weights:
    async def __aenter__(self): ...
    async def __aexit__(self, *exc): ...
@app.remote(gpu=gw.Gpu("A100"))
async def square(x): ...
@app.cls(probes=[gw.Probe.on("embed")])
class Embedder:
    @gw.method()
    def embed(self, texts=()): ...
Embedder().embed
"""
    assert not HEAVY & loaded_by(code)


def test_declaring_does_not_configure_celery() -> None:
    code = """
import celery
import gw_celery as gw
made = celery.Celery("x", broker="memory://")
app = gw.App("x", celery=made)
@app.remote(gpu=gw.Gpu("A100"))
async def square(x): ...
assert not made.configured, "declaring a service loaded the configuration"
"""
    assert "gw_celery" in loaded_by(code)


def test_the_test_helper_needs_no_pytest() -> None:
    code = """
import sys
sys.modules["pytest"] = None
from gw_celery import testing
assert testing.in_process
del sys.modules["pytest"]
"""
    assert "gw_celery" in loaded_by(code)


def test_metrics_load_no_library_before_a_scrape() -> None:
    code = """
from gw_celery import conf, contrib
from gw_celery.protocol import snapshot
from gw_celery.worker import health
signs = health.Health(conf.Settings(health_port=0), {})
signs.start()
signs.beat(snapshot.Worker(hostname="w"))
signs.close()
"""
    assert "prometheus_client" not in loaded_by(code)
