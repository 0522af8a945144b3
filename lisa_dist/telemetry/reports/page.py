"""One self-contained HTML page: headline numbers, charts, text; light and dark, narrow and wide."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b2130; --soft: #667085; --rule: #e3e6ec;
  --c0: #2563eb; --c1: #e4572e; --c2: #0f9d76; --c3: #9b51e0; --c4: #c98a00; --c5: #0891b2; --c6: #d6336c;
  --c7: #64748b; --bad: #b42318; --good: #067647; }
@media (prefers-color-scheme: dark) { :root { --back: #0f131a; --card: #181e28; --text: #e6e9ef; --soft: #98a2b3;
  --rule: #2b3341; --c0: #6ea8fe; --c1: #ff8a65; --c2: #3ddbaa; --c3: #c4a1ff; --c4: #f2c14e; --c5: #4dd0e1;
  --c6: #ff85b3; --c7: #a3b1c6; --bad: #ff8f85; --good: #4fd1a0; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.25rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 76rem; margin: 0 auto; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
.subtitle, .note { color: var(--soft); margin: .2rem 0 0; overflow-wrap: anywhere; }
.note { font-size: .85rem; }
.banner { margin: 1rem 0 0; padding: .6rem .9rem; border-radius: .6rem; border-left: .25rem solid var(--bad);
  background: var(--card); overflow-wrap: anywhere; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.numbers div, .card { background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; }
.numbers div { padding: .7rem .9rem; }
.numbers b { display: block; font-size: 1.15rem; font-weight: 650; white-space: nowrap; }
.numbers span { color: var(--soft); font-size: .8rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.card { padding: .9rem 1rem; min-width: 0; }
.card.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); } .mark { stroke: var(--soft); stroke-dasharray: 3 4; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.line.faint { opacity: .3; stroke-width: 1.2; } .dot { fill: currentColor; }
.cell { fill: var(--c0); } .share { fill: var(--c7); opacity: .55; }
.color0 { color: var(--c0); } .color1 { color: var(--c1); } .color2 { color: var(--c2); } .color3 { color: var(--c3); }
.color4 { color: var(--c4); } .color5 { color: var(--c5); } .color6 { color: var(--c6); } .color7 { color: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; color: var(--soft); margin-top: .4rem; }
.legend i { display: inline-block; width: .9rem; height: .2rem; border-radius: 1px; background: currentColor;
  vertical-align: middle; margin-right: .4rem; }
.legend i.faint { opacity: .4; }
.empty { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: .6rem 0 0; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
summary { cursor: pointer; font-weight: 600; font-size: .95rem; }
.bad { color: var(--bad); } .good { color: var(--good); }
@media (max-width: 34rem) { body { padding: .75rem; } .card { padding: .75rem; } svg text { font-size: 15px; }
  .numbers { grid-template-columns: 1fr 1fr; } }
"""


@dataclass
class Card:
    """A box of the page: a heading and, below it, HTML."""

    heading: str
    body: str
    note: str = ""  # plain text
    wide: bool = False  # takes a row of its own


def render_page(
    title: str,
    *,
    subtitle: str = "",
    banner: str = "",
    numbers: dict[str, str],
    cards: list[Card],
    refresh: int | None = None,
) -> str:
    """Return the page. ``numbers`` are those at its top: name to text; everything but card bodies is plain text.

    With ``refresh`` the browser reads the file again every so many seconds.
    """
    boxes = "".join(f"<div><b>{escape(text)}</b><span>{escape(name)}</span></div>" for name, text in numbers.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        + (f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "")
        + f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{escape(title)}</h1>"
        + (f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else "")
        + (f'<p class="banner">{escape(banner)}</p>' if banner else "")
        + f'<section class="numbers">{boxes}</section>\n<section class="cards">'
        + "\n".join(_card(card) for card in cards)
        + "</section></main></body></html>\n"
    )


def folded_text(heading: str, text: str) -> str:
    """Return a box that opens at a click, with preformatted text."""
    return f"<details><summary>{escape(heading)}</summary><pre>{escape(text)}</pre></details>"


def table(columns: list[str], rows: list[list[str]], numbers_from: int = 1) -> str:
    """Return a table of plain text; columns from ``numbers_from`` on are set to the right."""

    def cells(tag: str, values: list[str]) -> str:
        marked = [(value, ' class="number"' if place >= numbers_from else "") for place, value in enumerate(values)]
        return "".join(f"<{tag}{style}>{escape(value)}</{tag}>" for value, style in marked)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", columns)}</tr>{body}</table></div>'


def _card(card: Card) -> str:
    heading = f"<h2>{escape(card.heading)}</h2>" if card.heading else ""
    note = f'<p class="note">{escape(card.note)}</p>' if card.note else ""
    return f'<article class="card{" wide" if card.wide else ""}">{heading}{card.body}{note}</article>'
