"""The documentation says what the code does."""

from __future__ import annotations

import ast
import dataclasses
import re

from gw_celery import conf
from tests.processes import ROOT


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    documented = dict(re.findall(r"^\| `gw_(\w+)` \| .+?, `([^`]+)` \|", text, re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(conf.Settings)}
    assert documented.keys() == defaults.keys()
    assert {name: _value(text) for name, text in documented.items()} == defaults


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_at_most_100_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def _value(text: str) -> object:
    if text in ("()", "None", "False"):
        return ast.literal_eval(text)
    product = 1.0
    for factor in text.split("*"):
        try:
            product *= float(factor)
        except ValueError:  # the name of a queue, an address
            return text
    return product
