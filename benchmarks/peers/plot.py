"""The picture: a panel for each workload and figure, a bar for each system, as SVG. Pure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from benchmarks.peers import figures

_LABELS, _BARS, _VALUES, _ROW, _HEAD = 190, 190, 90, 20, 44
_PANEL = _BARS + _VALUES
_OURS, _OTHERS = "#2f6f4f", "#9aa5ad"
#: Title of a column, and how much of a line it shows, in its unit.
_COLUMNS = (
    ("answers a second", lambda line: line.rate),
    ("p99, ms", lambda line: line.p99.scaled(1e3)),
    ("worker CPU of an answer, us", lambda line: line.worker_cpu.scaled(1e6)),
)


def svg(
    panels: Mapping[str, Sequence[figures.Line]],
    titles: Mapping[str, str],
    ours: str = "ours",
) -> str:
    """Draw ``panels``: lines by the title of their workload. Bars are medians, strokes ranges."""
    parts: list[str] = []
    top = 0
    for heading, lines in panels.items():
        if lines:
            parts += _panel(heading, lines, titles, ours, top)
            top += _HEAD + _ROW * len(lines) + 16
    width = _LABELS + _PANEL * len(_COLUMNS)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" '
            f'font-family="sans-serif" font-size="11" fill="#222">',
            f'<rect width="{width}" height="{top}" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _panel(
    heading: str, lines: Sequence[figures.Line], titles: Mapping[str, str], ours: str, top: int
) -> list[str]:
    parts = [_text(4, top + 16, heading, weight="bold")]
    for row, line in enumerate(lines):
        parts.append(_text(4, top + _HEAD + _ROW * row + 12, titles[line.system]))
    for column, (title, of) in enumerate(_COLUMNS):
        left = _LABELS + _PANEL * column
        parts.append(_text(left, top + 34, title, fill="#666"))
        spreads = [of(line) for line in lines]
        scale = _BARS / max(one.high for one in spreads)
        for row, (line, one) in enumerate(zip(lines, spreads, strict=True)):
            color = _OURS if line.system == ours else _OTHERS
            parts += _bar(left, top + _HEAD + _ROW * row, one, scale, color)
    return parts


def _bar(left: int, top: int, one: figures.Spread, scale: float, color: str) -> list[str]:
    low, high = left + one.low * scale, left + one.high * scale
    middle = top + 8
    return [
        f'<rect x="{left}" y="{top + 2}" width="{one.median * scale:.1f}" height="13" '
        f'fill="{color}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#222"/>',
        _text(round(high) + 4, top + 12, f"{one.median:,.0f}"),
    ]


def _text(x: int, y: int, words: str, *, weight: str = "normal", fill: str = "#222") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}" fill="{fill}">{html.escape(words)}</text>'
