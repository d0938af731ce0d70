"""docs/log-lines.md lists every log line of level WARNING and above, as the code writes it.

The lines come from the calls of the loggers; their meanings and remedies are written on the page.
``GW_UPDATE_GOLDENS=1`` rewrites its tables, with empty cells for lines that are new.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests import golden
from tests.processes import ROOT

PAGE = ROOT / "docs" / "log-lines.md"
LEVELS = {
    "critical": "CRITICAL",
    "error": "ERROR",
    "exception": "ERROR",
    "warning": "WARNING",
}
HEAD = "|line|meaning|what to do|\n|---|---|---|\n"
#: Words of a line that the page shows: enough to tell it from all others.
SHOWN_WORDS = 7
#: Words of the page for each line, with the line itself.
MOST_WORDS = 18.5

#: What `background_thread.Outage` logs: the beginning is that of its owner.
OUTAGE = "%s: %r; tried again until it works"

#: (level, beginning of the line)
Line = tuple[str, str]


def lines_of_the_code() -> dict[Line, str]:
    """Every line and where it is written."""
    files = [*ROOT.glob("gw_celery/**/*.py"), *ROOT.glob("django_app/**/*.py")]
    written: dict[Line, str] = {}
    for file in sorted(files):
        for level, text in written_in(file):
            line = level, shown(text)
            known = written.setdefault(line, text)
            assert known == text, f"two lines begin alike: {known!r}, {text!r}"
    return written


def written_in(file: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse(file.read_text())
    names = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        logger, _, method = called.rpartition(".")
        level, text = "", ""
        if logger.endswith("logger") and method in LEVELS:
            first = node.args[0]
            text = template(names[first.id] if isinstance(first, ast.Name) else first)
            level = LEVELS[method]
        elif called.endswith("Outage") or is_thread(node, called):
            level, text = "WARNING", OUTAGE.replace("%s", template(node.args[1]))
        if level and text != OUTAGE:
            yield level, text


def is_thread(node: ast.Call, called: str) -> bool:
    """Whether this is the call of ``BackgroundThread.__init__`` by a subclass."""
    name = node.args[0] if called == "super().__init__" and len(node.args) == 2 else None
    return isinstance(name, ast.Constant) and str(name.value).startswith("gw-")


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "%s" for part in node.values
        )
    return "%s"


def shown(text: str) -> str:
    words = re.sub(r"%[-+.\d]*[a-z]", "…", text).replace("%%", "%").split()
    cut = words[:SHOWN_WORDS]
    return " ".join(cut) + (" …" if len(words) > SHOWN_WORDS and cut[-1] != "…" else "")


def rows_of_the_page() -> dict[Line, tuple[str, str]]:
    """The meaning and the remedy of each line."""
    rows: dict[Line, tuple[str, str]] = {}
    level = ""
    for text in PAGE.read_text().splitlines():
        if text.startswith("## "):
            level = text.removeprefix("## ")
        elif text.startswith("|`"):
            _, line, meaning, remedy, _ = text.split("|")
            rows[level, line.strip("`")] = meaning, remedy
    return rows


def rewrite(lines: dict[Line, str]) -> None:
    rows = rows_of_the_page()
    text = PAGE.read_text().partition("\n## ")[0]
    for level in ("CRITICAL", "ERROR", "WARNING"):
        text += f"\n## {level}\n\n{HEAD}"
        for line in sorted((line for of, line in lines if of == level), key=sorted_by):
            meaning, remedy = rows.get((level, line), ("", ""))
            text += f"|`{line}`|{meaning}|{remedy}|\n"
    PAGE.write_text(text)


def sorted_by(line: str) -> str:
    return re.sub(r"[^a-z]", "", line.lower())


def test_every_line_of_level_warning_and_above_is_on_the_page() -> None:
    lines = lines_of_the_code()
    if golden.IS_UPDATE:
        rewrite(lines)
    rows = rows_of_the_page()
    missing = sorted(lines.keys() - rows.keys())
    outdated = sorted(rows.keys() - lines.keys())
    assert (missing, outdated) == ([], []), f"{PAGE.name}: add {missing}, remove {outdated}"


def test_every_line_of_the_page_has_a_meaning_and_a_remedy() -> None:
    empty = [line for line, cells in rows_of_the_page().items() if not all(cells)]
    assert not empty, f"fill in their cells in {PAGE.name}: {empty}"


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= MOST_WORDS * len(rows_of_the_page())
