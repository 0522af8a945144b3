"""Secrets of the environment reach no file that a run writes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from unittest import mock

import pytest
import yaml

from lisa_dist.config import Config
from lisa_dist.config.loading import load
from lisa_dist.runtime.redaction import HIDDEN, hide_secrets, hide_secrets_in, public_yaml
from tests.support.ranks import run_on_ranks
from tests.support.runs import make_config, train_here

SECRET = "correct-horse-battery-staple"
LITERAL = "hf_" + "Ab3" * 10


def test_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("OTHERAPIKEY", "swordfish-of-another")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-and-long")
    monkeypatch.setenv("SHORT_TOKEN", "the")
    assert hide_secrets(f"the key is {SECRET}, false-and-long") == f"the key is {HIDDEN}, false-and-long"
    assert hide_secrets("so is swordfish-of-another") == f"so is {HIDDEN}"
    assert hide_secrets(f"--token={LITERAL}") == f"--token={HIDDEN}"
    assert hide_secrets("https://me:pass@host/x?a=b:c@d") == f"https://{HIDDEN}@host/x?a=b:c@d"
    assert hide_secrets_in({"a": [SECRET, 3], "b": (None, "x")}) == {"a": [HIDDEN, 3], "b": [None, "x"]}


def train_with_secrets(config: Config) -> None:
    """Train, log and fail with secrets in the environment."""
    with mock.patch.dict(os.environ, {"HF_TOKEN": SECRET, "WANDB_API_KEY": "0123456789abcdef" * 2}):
        train_here(config)
        try:
            raise ValueError(f"could not log in with {SECRET}")
        except ValueError:
            logging.getLogger("lisa_dist.test").exception("a fault with %s", SECRET)


def test_no_file_of_a_run_holds_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = make_config(run_dir, "train.max_steps=1", "logger=wandb", "logger.wandb.mode=offline")
    config.logger.wandb.entity = SECRET  # as ${oc.env:HF_TOKEN} in a YAML file would set it
    config.run.name = LITERAL
    config.launch.setup = ["export PLAIN_WORD=swordfish-of-setup"]
    run_on_ranks(1, train_with_secrets, config)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"config.yaml", "rank_0.log", "state.json"} <= {path.name for path in files}
    written = {path.relative_to(run_dir): path.read_bytes() for path in files}
    # What the service itself needs goes to it alone: its own file says for which account and which run.
    ours = {path: content for path, content in written.items() if path.parts[0] != "wandb"}
    for secret in (SECRET, LITERAL, "0123456789abcdef" * 2, "swordfish-of-setup"):
        assert not [path for path, content in ours.items() if secret.encode() in content]
    assert not [path for path, content in written.items() if b"swordfish-of-setup" in content]
    assert not [path for path, content in written.items() if b"0123456789abcdef0123456789abcdef" in content]
    assert b"a fault with ***" in written[Path("logs/rank_0.log")]


def test_what_a_run_is_resumed_by_keeps_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret may be a word of a path; and what is hidden must leave YAML that can be read."""
    folder = tmp_path / "postgres"
    folder.mkdir()
    (folder / "a.jsonl").write_text("")
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    keys = [
        f"data.path={folder}/*.jsonl",
        f"data.validation={folder}/a.jsonl",
        "run.name=postgres",
        f"run.dir={folder}",
    ]
    found = yaml.safe_load(public_yaml(load([*keys, "launch.setup=[swordfish]"])))
    assert [found["data"]["path"], found["data"]["validation"]] == [f"{folder}/*.jsonl", f"{folder}/a.jsonl"]
    assert found["run"] == {"dir": str(folder), "name": HIDDEN} and found["launch"]["setup"] == []
