"""Check a built wheel: everything of the tree is in it, and a clean installation imports it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"gw_celery": ROOT, "gw_celery_django": ROOT / "django_app"}
#: Run in the clean installation, far from the checkout.
IMPORTS = """
import importlib.metadata as metadata, importlib.util, sys
import gw_celery, gw_celery.devserver, gw_celery_django
assert metadata.version("gw-celery") == gw_celery.__version__, gw_celery.__version__
assert "site-packages" in gw_celery.__file__, gw_celery.__file__
assert importlib.util.find_spec("torch") is None, "the base installation brings torch"
assert "torch" not in sys.modules
print("gw-celery", gw_celery.__version__, "imports in a clean installation, without torch")
"""


def expected() -> set[str]:
    """Every file of both packages, as the wheel names it."""
    files = (
        (path, path.relative_to(root).as_posix())
        for name, root in PACKAGES.items()
        for path in (root / name).rglob("*")
    )
    return {name for path, name in files if path.is_file() and "__pycache__" not in name}


def check_content(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        has_licence = any(name.endswith("LICENSE") for name in archive.namelist())
    faults = [f"not in the wheel: {name}" for name in sorted(expected() - shipped)]
    faults += [f"in the wheel only: {name}" for name in sorted(shipped - expected())]
    faults += [f"no {name}/py.typed" for name in PACKAGES if f"{name}/py.typed" not in shipped]
    return faults if has_licence else [*faults, "no LICENSE"]


def check_installation(wheel: Path) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="gw-celery-wheel-") as folder:
        venv.create(Path(folder, "venv"), with_pip=True)
        python = str(Path(folder, "venv", "bin", "python"))
        install = [python, "-m", "pip", "install", "--quiet", "--quiet", str(wheel)]
        for command in (install, [python, "-m", "pip", "check"], [python, "-c", IMPORTS]):
            done = subprocess.run(command, cwd=folder, check=False)
            if done.returncode:
                return [f"failed with code {done.returncode}: {' '.join(command[:5])}"]
    return []


def main() -> int:
    wheel = Path(sys.argv[1]).resolve()
    faults = check_content(wheel) + check_installation(wheel)
    for fault in faults:
        print(f"{wheel.name}: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
