"""One self-contained HTML page: headline numbers, charts, tables, text; light and dark, narrow and wide.

Charts are figures of plotly.js, whose code the page brings along: nothing is fetched when it is opened.
"""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from lisa_dist.runtime.files import to_json

PAGE_START = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
# Distinguishable with every kind of colour blindness: Okabe and Ito, https://jfly.uni-koeln.de/color/; lighter on dark.
STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b2130; --soft: #5b6472; --rule: #dfe3ea;
  --colors: #0072b2 #d55e00 #009e73 #cc79a7 #b07d00 #56b4e9 #7a7a7a; }
@media (prefers-color-scheme: dark) { :root { --back: #0f131a; --card: #181e28; --text: #e6e9ef; --soft: #a5afbd;
  --rule: #303949; --colors: #56b4e9 #ff9355 #2fc79b #e29cc4 #f0c24a #9ad7ff #b5b5b5; } }
* { box-sizing: border-box; }
body { margin: 0; padding: clamp(.6rem, 2vw, 1.25rem); background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 100rem; margin: auto; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: .95rem; margin: 0 0 .5rem; } p { margin: .2rem 0 0; }
.soft, th, .numbers span { color: var(--soft); font-size: .85rem; }
.numbers div, .card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .8rem; }
.banner { margin: 1rem 0 0; padding: .6rem .9rem; border-left: .25rem solid #d55e00; background: var(--card); }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.numbers b { display: block; font-size: 1.1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: .8rem; }
.card { min-width: 0; } .wide { grid-column: 1 / -1; }
.scroll, pre { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--rule); }
td { white-space: pre-line; } .number { text-align: right; font-variant-numeric: tabular-nums; }
a { color: inherit; } summary { cursor: pointer; } pre { font-size: .82rem; }
"""

SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)"), narrow = matchMedia("(max-width: 40rem)");
const read = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function draw() {
  const [text, soft, rule, card] = ["--text", "--soft", "--rule", "--card"].map(read);
  const colors = read("--colors").split(" ");
  for (const place of document.querySelectorAll(".plot")) {
    const {data, layout} = JSON.parse(place.nextElementSibling.textContent);
    for (const trace of data) {
      if (trace.type == "heatmap") trace.colorscale = trace.colorscale || [[0, card], [1, colors[0]]];
      const color = colors[(trace.meta || 0) % colors.length];
      trace.line = {...trace.line, color};
      trace.marker = {...trace.marker, color: trace.marker?.color || color};
    }
    for (const axis of Object.keys(layout).filter(key => /^[xy]axis/.test(key)))
      Object.assign(layout[axis], {gridcolor: rule, linecolor: rule, zerolinecolor: rule});
    for (const shape of layout.shapes || []) shape.line = {color: soft, width: 1, dash: "dash"};
    Object.assign(layout, {paper_bgcolor: card, plot_bgcolor: card, font: {color: soft, size: 12},
      hoverlabel: {bgcolor: card, bordercolor: rule, font: {color: text}}, dragmode: narrow.matches ? false : "zoom"});
    Plotly.react(place, data, layout, {responsive: true, displaylogo: false, displayModeBar: false});
  }
  document.body.dataset.drawn = "true";
}
async function start() {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent), byte => byte.charCodeAt(0));
  const code = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
  document.head.append(Object.assign(document.createElement("script"), {textContent: code}));
  draw();
  dark.addEventListener("change", draw);
}
start();
"""


@dataclass
class Card:
    """A box of the page: a heading and, below it, HTML."""

    heading: str
    body: str
    note: str = ""  # plain text
    wide: bool = False  # takes a row of its own


@dataclass
class Link:
    """A cell of a table that leads to another page."""

    text: str
    address: str  # relative to the page


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
        f'{PAGE_START} content="width=device-width, initial-scale=1">'
        + (f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "")
        + f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><main>'
        f"<h1>{escape(title)}</h1>"
        + (f'<p class="soft">{escape(subtitle)}</p>' if subtitle else "")
        + (f'<p class="banner">{escape(banner)}</p>' if banner else "")
        + f'<section class="numbers">{boxes}</section>\n<section class="cards">'
        + "\n".join(_card(card) for card in cards)
        + "</section></main><noscript>The charts are drawn by a script, and this browser runs none.</noscript>\n"
        f'<script type="text/plain" id="library">{_library()}</script>\n<script>{SCRIPT}</script></body></html>\n'
    )


def chart(figure: dict[str, Any] | None) -> str:
    """Return the place of a chart and its figure (``data`` and ``layout`` of plotly.js); None: there is nothing."""
    if figure is None:
        return '<p class="soft">nothing recorded</p>'
    data = to_json(figure).replace("<", "\\u003c")  # no text of a user's ends the script
    height = figure["layout"]["height"]
    return f'<div class="plot" style="height:{height}px"></div><script type="application/json">{data}</script>'


def folded_text(heading: str, text: str) -> str:
    """Return a box that opens at a click, with preformatted text."""
    return f"<details><summary>{escape(heading)}</summary><pre>{escape(text)}</pre></details>"


def table(columns: list[str], rows: Sequence[Sequence[str | Link]], numbers_from: int = 1) -> str:
    """Return a table of plain text and links; columns from ``numbers_from`` on are set to the right."""

    def line(tag: str, values: Sequence[str | Link]) -> str:
        texts = [
            escape(one) if isinstance(one, str) else f'<a href="{escape(one.address)}">{escape(one.text)}</a>'
            for one in values
        ]
        styles = ["" if place < numbers_from else ' class="number"' for place in range(len(texts))]
        return f"<tr>{''.join(f'<{tag}{style}>{text}</{tag}>' for style, text in zip(styles, texts))}</tr>"

    return f'<div class="scroll"><table>{line("th", columns)}{"".join(line("td", row) for row in rows)}</table></div>'


@functools.cache
def _library() -> str:
    """Return the code of plotly.js, a third of its size."""
    return base64.b64encode(zlib.compress(get_plotlyjs().encode())).decode()


def _card(card: Card) -> str:
    heading = f"<h2>{escape(card.heading)}</h2>" if card.heading else ""
    note = f'<p class="soft">{escape(card.note)}</p>' if card.note else ""
    return f'<article class="card{" wide" if card.wide else ""}">{heading}{card.body}{note}</article>'
