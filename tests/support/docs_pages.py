"""The pages of the docs, and the commands that stand in them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]

# What the docs write in capitals where a reader puts something of their own, and no text will do.
FILLED_IN = {"method": "lisa", "model": "llama2_7b", "experiment": "demo", "plan.gpu": "h100_80gb"}
FILLED_IN |= {"parallel.optimizer_shard": "world", "parallel.activation_checkpointing": "full"}
FILLED_IN |= dict.fromkeys(("parallel.nodes", "parallel.replicate", "parallel.nproc_per_node"), "2")
FILLED_IN |= dict.fromkeys(("train.global_batch_size", "bench.steps", "bench.rounds"), "8")
COMMAND_OF_DOCS = re.compile(r"""^(?:[A-Z_]+=(?:"[^"]*"|'[^']*'|\S*)$|[ ]*lisa-dist .*)""", re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    """Every ``lisa-dist COMMAND KEY=VALUE ...`` of a page as it stands, on one line each, with the variables before."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL) + re.findall(
        r"(?:^    .*\n)+", text, re.MULTILINE
    )
    inline = [" ".join(words.split()) for words in re.findall(r"`(lisa-dist [a-z][^`]*=[^`]*)`", text)]
    return COMMAND_OF_DOCS.findall("\n".join([*blocks, *inline]).replace("\\\n", " "))


def commands_of(page: Path, folder: Path) -> list[list[str]]:
    """The words of every command of a page, as bash hands them over, variables replaced."""
    script = "\n".join(["set -f", "lisa-dist() { printf '%s\\0' \"$@\"; printf '\\n'; }", *command_lines(page)])
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def filled_in(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={FILLED_IN[key]}" if key in FILLED_IN and value.isupper() else word
