"""What ships is what is in the tree: setup.cfg lists the packages by hand."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def packages_below(root: Path, top: str) -> set[str]:
    return {
        ".".join(file.parent.relative_to(root).parts) for file in (root / top).rglob("__init__.py")
    }


def test_every_package_of_the_tree_ships(setup_cfg: configparser.ConfigParser) -> None:
    in_tree = packages_below(ROOT, "gw_celery")
    in_tree |= packages_below(ROOT / "django_app", "gw_celery_django")
    listed = setup_cfg["options"]["packages"].split()
    assert listed == sorted(in_tree)


def test_every_folder_with_code_is_a_package() -> None:
    for top in (ROOT / "gw_celery", ROOT / "django_app" / "gw_celery_django"):
        for file in top.rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_the_version_can_be_read_without_importing_anything() -> None:
    tree = ast.parse((ROOT / "gw_celery" / "__init__.py").read_text())
    versions = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert len(versions) == 1
    assert all(part.isdigit() for part in versions[0].split("."))


def test_both_packages_tell_type_checkers_that_they_are_typed() -> None:
    assert (ROOT / "gw_celery" / "py.typed").exists()
    assert (ROOT / "django_app" / "gw_celery_django" / "py.typed").exists()


def test_the_base_installation_asks_for_no_torch(setup_cfg: configparser.ConfigParser) -> None:
    assert "torch" not in setup_cfg["options"]["install_requires"]
    assert "torch" in setup_cfg["options.extras_require"]["torch"]


@pytest.mark.parametrize("shell", ["sh", "dash"])
def test_run_is_a_script_of_the_plain_shell(shell: str) -> None:
    try:
        done = subprocess.run([shell, "-n", ROOT / "run"], check=False)
    except FileNotFoundError:
        pytest.skip(f"no {shell} here")
    assert done.returncode == 0


def test_make_only_calls_run() -> None:
    recipes = [
        line.strip() for line in (ROOT / "Makefile").read_text().splitlines() if line[:1] == "\t"
    ]
    assert recipes == ["./run $@"]


def test_an_unknown_verb_is_an_error_that_lists_the_verbs() -> None:
    done = subprocess.run([ROOT / "run", "dance"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unknown verb: dance" in done.stderr
    assert "./run demo" in done.stderr


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("import sys; sys.exit('ensurepip' in sys.argv[-1])", "apt-get install python3-venv"),
        ("import sys; sys.exit(1)", "no Python 3.11 or newer (found:"),
    ],
    ids=["without venv", "too old"],
)
def test_one_line_says_which_python_is_missing(tmp_path: Path, python: str, said: str) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("cat", "cksum", "dirname", "rm", "sh"):
        (tmp_path / "bin" / tool).symlink_to(Path("/usr/bin") / tool)
    fake = tmp_path / "bin" / "python3"
    fake.write_text(f"#!{sys.executable} -S\n{python}\n")
    fake.chmod(0o755)
    for name in ("run", "setup.cfg", "pyproject.toml", "constraints"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["/bin/sh", tmp_path / "run", "venv"],
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
