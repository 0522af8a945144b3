"""Commands of the docs that need no torch run as they are pasted, one page after the other, in a folder of their own.

That the others compose is tested in ``tests/test_quality.py``; the pages say when they were last run as a whole.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.docs_pages import PAGES, command_lines, commands_of

WITHOUT_TORCH = {"init", "launch", "runs", "report"}

PROGRAM = """
import contextlib, io, json, os, sys

sys.modules["torch"] = None  # importing it raises ImportError
from lisa_dist.cli import main

results = []
for folder, arguments in json.load(sys.stdin):
    os.chdir(folder)
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            code = main(arguments)
        except ImportError as error:
            code = str(error)
    results.append((code, said.getvalue()))
print(json.dumps(results))
"""


def prepare(folder: Path) -> None:
    """Make what the docs call DIR and FILE.json, the run that they report of, and a file of a reader's own."""
    (folder / "DIR").mkdir(parents=True)
    (folder / "DIR" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "FILE.json").write_text('[{"prompt": "a", "completion": "b"}]')
    run = folder / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("method: lisa\nmodel:\n  path: builtin:demo\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1, "tokens": 8}\n')
    (run / "summary.json").write_text('{"exit_reason": "finished", "final_loss": 1.0}')


def test_cheap_commands_run_as_pasted(tmp_path: Path) -> None:
    todo: list[tuple[str, list[str]]] = []
    for page in PAGES:
        folder = tmp_path / page.stem
        prepare(folder)
        found = {tuple(words): None for words in commands_of(page, tmp_path) if words[0] in WITHOUT_TORCH}
        if not any(words[0] == "init" for words in found):
            (folder / "my.yaml").write_text("method: lisa\nmodel.path: DIR\ndata.path: FILE.json\n")
        for words in found:
            if any(word in ("run.dir=DIR", "sweep.dir=DIR") or word.startswith("sweep.trials") for word in words):
                continue  # of any run that a reader may have
            own = [word.replace("/shared", str(folder / "shared")) for word in words]
            todo.append((str(folder), [*own, "launch.dry_run=true"] if own[0] == "launch" else own))
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(todo),
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout)
    assert {words[0] for _, words in todo} >= {"init", "launch", "report"}
    assert [(words, said) for (_, words), (code, said) in zip(todo, results) if code != 0] == []


def test_commands_mean_the_same_in_every_shell() -> None:
    """zsh ends with ``no matches found`` where brackets are not in quotes."""
    bare = {
        line: re.sub(r"'[^']*'|\"[^\"]*\"|\$\{.*?\}|\s#.*", "", line) for page in PAGES for line in command_lines(page)
    }
    assert [line for line, unquoted in bare.items() if re.search(r"[][{}()*?]", unquoted)] == []
