"""CPU time that ``import gw_celery`` adds to a process that has Celery.

    python -m benchmarks.import_time [--rounds 15]

Each round is a fresh interpreter, after one that is not counted: it may have to compile.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

_SCRIPT = """
import time
from celery import Celery, Task, shared_task
before = time.process_time()
import gw_celery
print(time.process_time() - before)
"""


def main() -> None:
    """Print the median and the range, in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    _measured()
    taken = [_measured() for _ in range(rounds)]
    print(
        f"import gw_celery: {statistics.median(taken):.0f} ms of CPU beyond celery "
        f"(rounds {min(taken):.0f}-{max(taken):.0f})"
    )


def _measured() -> float:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    )
    return float(done.stdout) * 1000


if __name__ == "__main__":
    main()
