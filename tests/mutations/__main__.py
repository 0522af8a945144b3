"""Applies each mutation to a copy of the checkout and runs the test that should notice it.

``python -m tests.mutations`` tries them all, ``python -m tests.mutations WORD ...`` those whose name has one of the
words. ``--table`` prints the table of docs/reliability.md instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
COPIED = ["lisa_dist", "conf", "launch", "tests", "pyproject.toml"]
PASSED, FAILED = 0, 1  # pytest's exit codes; others mean that no test has spoken
SECONDS_FOR_A_TEST = 600  # that hangs


def mutated(mutation: Mutation, source: str) -> str:
    """Return the source with the error in it.

    Raises:
        ValueError: the piece that is to be replaced does not occur exactly once, so the mutation is stale.
    """
    count = source.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} has {count} of {mutation.old!r}, must have one; fix it")
    return source.replace(mutation.old, mutation.new)


def copy_checkout(folder: Path) -> None:
    """Copy what tests need to ``folder``, without compiled files, which could be older than what they stand for."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, *tests: str) -> tuple[int, str]:
    """Run tests of the copy; returns pytest's exit code and what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--timeout={SECONDS_FOR_A_TEST}"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    paths = [f"tests/{test}" for test in tests]
    done = subprocess.run([*command, *paths], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def is_noticed(mutation: Mutation, folder: Path) -> bool:
    """Whether the mutation's test fails on a copy with the error; the copy is left as it was."""
    file = folder / "lisa_dist" / mutation.file
    source = file.read_text()
    file.write_text(mutated(mutation, source))
    try:
        code, output = run_tests(folder, mutation.test)
    finally:
        file.write_text(source)
    if code not in (PASSED, FAILED):
        raise RuntimeError(f"{mutation.name}: pytest ended with code {code}\n{output}")
    return code == FAILED


def unnoticed(mutations: list[Mutation]) -> list[str]:
    """Try mutations, telling of each, and return the names of those that no test has noticed.

    Raises:
        RuntimeError: a test fails without any mutation, so that it would prove nothing.
    """
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name)
        copy_checkout(folder)
        code, output = run_tests(folder, *dict.fromkeys(mutation.test for mutation in mutations))
        if code != PASSED:
            raise RuntimeError(f"the tests don't pass without mutations\n{output}")
        missed = []
        for number, mutation in enumerate(mutations, start=1):
            begun = time.monotonic()
            noticed = is_noticed(mutation, folder)
            told = "noticed" if noticed else "NOT NOTICED"
            print(f"{number}/{len(mutations)} {mutation.name}: {told}, {time.monotonic() - begun:.0f} s", flush=True)
            missed += [] if noticed else [mutation.name]
    return missed


def table() -> str:
    """Return the mutations and their tests as a table for the docs."""
    lines = ["| what goes wrong | the test that notices |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {mutation.name} | `{mutation.test}` |" for mutation in MUTATIONS)])


def main() -> int:
    """Run the command line described at the top."""
    words = sys.argv[1:]
    if words == ["--table"]:
        print(table())
        return 0
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.name for word in words)]
    missed = unnoticed(chosen)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} are noticed" + "".join(f"\nnot noticed: {m}" for m in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
