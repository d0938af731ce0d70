"""Virtual environments for what cannot be installed beside us, kept below ``.cache``."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".cache" / "peers"
TIMEOUT = 300.0


class Unavailable(Exception):
    """Raised when a system cannot be installed or does not start; says why."""


def python(name: str, requirements: Sequence[str]) -> Path:
    """Return the interpreter of an environment with ``requirements``, made when missing.

    Behind its own packages it finds those of this environment: torch and the model are there.

    Raises:
        Unavailable: with the end of what pip said.
    """
    folder = FOLDER / name
    program, stamp = folder / "bin" / "python", folder / ".stamp"
    wanted = "\n".join(requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return program
    print(f"installing {' '.join(requirements)} ...", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(program), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--no-input", *requirements])
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    # Paths of a .pth file come after the folder that it lies in.
    behind = Path(_run([str(program), "-c", ask]).strip()) / "behind.pth"
    behind.write_text(sysconfig.get_path("purelib") + "\n")
    stamp.write_text(wanted)
    return program


def versions(program: Path | str, names: Sequence[str]) -> dict[str, str]:
    """The versions of the distributions that an interpreter has."""
    script = "import sys, importlib.metadata as m\nfor n in sys.argv[1:]: print(n, m.version(n))"
    said = _run([str(program), "-c", script, *names])
    return dict(line.split() for line in said.splitlines())


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[-1]} was not installed within {TIMEOUT:.0f} s") from None
    if done.returncode:
        raise Unavailable(" ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}")
    return done.stdout
