"""Every block of code of the documentation runs, or is checked as far as it can be here."""

from __future__ import annotations

import configparser
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest
import yaml
from celery.bin.celery import celery as celery_command

from tests.processes import ROOT
from tests.run_page import BLOCK

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
LANGUAGES = {"python", "console", "yaml", "ini", "json", "promql", "text", ""}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\$ |celery |\./run |python -m ")
INLINE = re.compile(r"`((?:celery|\./run|python -m) [^`]+)`")
VERBS = re.findall(r"^\./run (\S+)", (ROOT / "run").read_text(), re.MULTILINE)
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
WITH_PYTHON = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_its_first_block_to_its_last(
    page: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_page", str(page)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_other_blocks_of_a_page_can_be_read_by_what_they_are_for(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text()):
        assert language in LANGUAGES, f"{page.name}: a block of {language!r}:\n{code}"
        if language in ("console", "text", ""):
            for command in _commands(code):
                _check(command)
        elif language == "yaml":
            list(yaml.safe_load_all(textwrap.dedent(code)))
        elif language == "json":
            json.loads(code)
        elif language == "ini":
            configparser.ConfigParser().read_string(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_in_the_sentences_of_a_page_exist(page: Path) -> None:
    for command in INLINE.findall(FENCE.sub("", page.read_text())):
        _check(command, is_whole=False)


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("celery -A proj gw statsu", "statsu"),
        ("celery -A proj gw worker --gpus A100", "--gpus"),
        ("celery -A proj gw worker --replicas", "requires an argument"),
        ("./run demos", "demos"),
        ("python -m gw_celery.simulat trace.csv", "gw_celery.simulat"),
        ("python -m gw_celery.simulate trace.csv --scor 1", "--scor"),
        ("pip install '.[servr]'", "servr"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, wrong: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(wrong)):
        _check(command)


def _commands(code: str) -> list[str]:
    """Return the lines behind a prompt, and those that are a command of ours without one."""
    lines = code.replace("\\\n", "").splitlines()
    return [line.removeprefix("$ ") for line in lines if COMMAND.match(line)]


def _check(command: str, *, is_whole: bool = True) -> None:
    """Check one command line; one that is not whole may lack what its last option takes."""
    words = shlex.split(command, comments=True)
    words = [word.strip("[]") for word in words if word not in ("&", "...")]
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    match words:
        case ["celery", *rest]:
            _check_celery(rest, command, is_whole=is_whole)
        case ["./run", verb, *_]:
            assert verb in VERBS, f"{command}: no verb {verb}; there are {VERBS}"
        case [python, "-m", module, *rest] if python.endswith("python"):
            _check_module(module, rest, command)
        case ["pip", "install", *rest]:
            for extra in re.findall(r"\[(\w+)", " ".join(rest)):
                assert SETUP.has_option("options.extras_require", extra), f"{command}: {extra}"


def _check_celery(words: list[str], command: str, *, is_whole: bool) -> None:
    """Walk the real commands of ``celery``; parse, but convert and call nothing."""
    found: click.Command = celery_command
    try:
        while True:
            context = click.Context(found, info_name=found.name)
            context.resilient_parsing = not is_whole
            rest = found.make_parser(context).parse_args(args=list(words))[1]
            if not isinstance(found, click.Group) or not rest:
                return
            name, *words = rest
            assert name in found.commands, f"{command}: no command {name}"
            found = found.commands[name]
    except click.UsageError as exc:
        if is_whole or not isinstance(exc, click.BadOptionUsage):
            raise AssertionError(f"{command}: {exc.format_message()}") from exc


def _check_module(module: str, words: list[str], command: str) -> None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    assert spec, f"{command}: no module {module}"
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if options and ROOT in Path(spec.origin or "").parents:
        before = [*itertools.takewhile(lambda word: not word.startswith("--"), words)]
        help_of = [sys.executable, "-m", module, *before, "--help"]
        done = subprocess.run(help_of, cwd=ROOT, capture_output=True, text=True, check=True)
        unknown = options - {*re.findall(r"--[\w-]+", done.stdout)}
        assert not unknown, f"{command}: {module} has no option {unknown}"
