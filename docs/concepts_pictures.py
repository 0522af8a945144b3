"""Draws the pictures of docs/concepts.md and the README: ``python docs/concepts_pictures.py`` writes them anew."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

DOCS = Path(__file__).parent
WIDTH = 760
# Light and dark; colours that can be told apart whatever one sees (after Okabe and Ito).
STYLE = """
.card { fill: #ffffff; } .text { fill: #222222; } .weak { fill: #666666; } .line { stroke: #999999; fill: none; }
.frozen { fill: #d5d8dc; } .weight { fill: #0072b2; } .moment { fill: #56b4e9; } .gradient { fill: #e69f00; }
.gathered { fill: #009e73; }
@media (prefers-color-scheme: dark) {
  .card { fill: #22252b; } .text { fill: #eeeeee; } .weak { fill: #aaaaaa; } .frozen { fill: #555b66; }
}
text { font: 14px system-ui, sans-serif; } .small { font-size: 12px; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
"""
BLOCKS, PERIODS, ACTIVE = 8, 6, 2
RUN = "lisa_by_part"  # of docs/results


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" class="{kind}"/>'


def words(x: float, y: float, text: str, kind: str = "text") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{text}</text>'


def legend(y: float, entries: dict[str, str]) -> list[str]:
    parts, x = [], 20.0
    for kind, text in entries.items():
        parts += [box(x, y - 11, 14, 14, kind), words(x + 20, y, text, "text small")]
        x += 44 + 6.6 * len(text)
    return parts


def picture(title: str, height: int, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    card = f'<rect width="{WIDTH}" height="{height}" rx="8" class="card"/>'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", card, *parts, "</svg>", ""])


def period() -> str:
    """The map of what trains when: blocks upwards, periods to the right."""
    generator = random.Random(4)
    active = [set(generator.sample(range(BLOCKS), ACTIVE)) for _ in range(PERIODS)]
    rows = ["head", "norm", *(f"block {index}" for index in reversed(range(BLOCKS))), "embeddings"]
    left, top, wide, high = 120, 44, 100, 20
    parts = [words(left + column * wide + 46, 30, f"period {column + 1}", "text middle") for column in range(PERIODS)]
    for place, row in enumerate(rows):
        y = top + place * (high + 4)
        parts.append(words(left - 10, y + 15, row, "text end"))
        for column in range(PERIODS):
            trains = not row.startswith("block") or int(row.split()[1]) in active[column]
            parts.append(box(left + column * wide, y, wide - 8, high, "weight" if trains else "frozen"))
    bottom = top + len(rows) * (high + 4)
    parts.append(f'<path class="line" d="M{left} {bottom + 2} v6 h{wide - 8} v-6"/>')
    parts.append(words(left + 46, bottom + 24, "K steps", "text middle"))
    parts.append(words(left + wide, bottom + 24, "then: freeze, draw, thaw", "weak"))
    parts += legend(bottom + 52, {"weight": "trains: master, gradient, moments", "frozen": "frozen: a bf16 weight"})
    return picture("Which blocks train in which period", bottom + 66, parts)


def memory() -> str:
    """Bytes a parameter, and what that makes of Llama 2 7B on one GPU, by the table of docs/memory.md."""
    row = re.search(r"^\| Llama 2 7B \| 1 \|(.*)\|$", (DOCS / "memory.md").read_text(), re.MULTILINE)
    assert row is not None
    full, lora, lisa = (float(cell.replace("*", "").split("/")[0]) for cell in row[1].split("|")[:3])
    parts = [
        words(20, 30, "bytes a parameter, split over the ranks"),
        words(400, 30, "Llama 2 7B on one GPU, GiB that stay"),
    ]
    parts += [words(20, 66, "frozen"), box(90, 50, 2 * 15, 22, "frozen"), words(90 + 2 * 15 + 8, 66, "2", "weak")]
    parts.append(words(20, 100, "trained"))
    for start, size, kind in ((0, 4, "weight"), (4, 4, "moment"), (8, 4, "moment"), (12, 4, "gradient")):
        parts.append(box(90 + start * 15, 84, size * 15 - 2, 22, kind))
    parts.append(words(90 + 16 * 15 + 8, 100, "16", "weak"))
    for place, (name, size) in enumerate((("full", full), ("lisa", lisa), ("lora", lora))):
        y = 50 + place * 34
        parts += [words(400, y + 16, name), box(450, y, size * 2.1, 22, "weight")]
        parts.append(words(450 + size * 2.1 + 8, y + 16, f"{size:g}", "weak"))
    kinds = {"frozen": "bf16 weight", "weight": "fp32 master", "moment": "two moments", "gradient": "gradient"}
    return picture("What a parameter costs", 190, [*parts, *legend(170, kinds)])


def placement() -> str:
    """Four ranks: each has a quarter of every block, and for a moment one whole block."""
    ranks, wide, top = 4, 150, 44
    trained = {2, 5}
    parts = [words(90 + rank * (wide + 12) + wide / 2, 30, f"rank {rank}", "text middle") for rank in range(ranks)]
    y = float(top)
    for block in range(BLOCKS):
        high = 26 if block in trained else 10
        parts.append(words(80, y + high / 2 + 4, f"block {block}", "text small end"))
        for rank in range(ranks):
            x = 90 + rank * (wide + 12)
            if block in trained:
                kinds = ("weight", "moment", "moment", "gradient")
                parts += [box(x + place * wide / 4, y, wide / 4 - 2, high, kind) for place, kind in enumerate(kinds)]
            else:
                parts.append(box(x, y, wide / 4 - 2, high, "frozen"))
        y += high + 8
    parts.append(words(80, y + 22, "in use", "text small end"))
    for rank in range(ranks):
        parts.append(box(90 + rank * (wide + 12), y + 4, wide - 2, 26, "gathered"))
    said = "one block at a time is gathered whole in bf16, used and let go, and the next is on its way"
    parts.append(words(90, y + 50, said, "weak small"))
    names = {"frozen": "frozen shard", "weight": "master shard", "moment": "moments", "gradient": "gradient"}
    parts += legend(y + 80, {**names, "gathered": "gathered block"})
    return picture("What lies where", int(y) + 96, parts)


def run() -> str:
    """A run of docs/results.md: its loss, and below which blocks trained when."""
    folder = DOCS / "results" / RUN
    steps, layers = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "layers.jsonl")
    )
    losses = {row["step"]: row["loss"] for row in steps if "loss" in row}
    held_out = {row["step"]: row["eval_loss"] for row in steps if "eval_loss" in row}
    last, blocks, left, wide, high, thin = max(losses), layers[0]["num_blocks"], 90, WIDTH - 110, 150, 6
    shown = [*losses.values(), *held_out.values()]
    least, most = min(shown), max(shown)

    def at(step: float, loss: float) -> tuple[float, float]:
        return round(left + wide * step / last, 1), round(30 + high * (most - loss) / (most - least), 1)

    path = "L".join("{:g} {:g}".format(*at(step - 0.5, loss)) for step, loss in losses.items())
    parts = [
        words(left - 10, 36, f"{most:.2f}", "weak small end"),
        words(left - 10, 34 + high, f"{least:.2f}", "weak small end"),
    ]
    parts += [words(left - 10, 36 + high / 2, "loss", "text end"), f'<path class="line" d="M{path}"/>']
    for step, loss in held_out.items():
        x, y = at(step, loss)
        parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" class="gradient"/>')
        anchor, shift = ("small end", -10) if step else ("small", 10)
        parts.append(words(x + shift, y + 4, f"{loss:.3f}", f"text {anchor}"))
    top = high + 56
    ends = [row["step"] - 1 for row in layers[1:]] + [last]
    for row, end in zip(layers, ends):
        start = row["step"] - 1
        for block in range(blocks):
            kind = "weight" if block in row["active_layers"] else "frozen"
            y = top + (blocks - 1 - block) * thin
            parts.append(box(left + wide * start / last, y, wide * (end - start) / last - 3, thin - 1, kind))
    for block, place in ((blocks - 1, top + 8), (0, top + blocks * thin)):
        parts.append(words(left - 10, place, f"block {block}", "text small end"))
    bottom = top + blocks * thin
    parts += [
        words(left, bottom + 20, "step 0", "weak small"),
        words(left + wide, bottom + 20, f"step {last}", "weak small end"),
    ]
    kinds = {"weight": "trains", "frozen": "frozen", "gradient": "held-out loss (the line: of each step's rows)"}
    return picture("A run: its loss, and the blocks that train", bottom + 60, [*parts, *legend(bottom + 46, kinds)])


PICTURES = {"period": period, "memory": memory, "placement": placement, "run": run}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (DOCS / f"concepts_{name}.svg").write_text(draw())
