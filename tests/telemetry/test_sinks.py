import json
import math
import struct
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from lisa_dist.config import Config, LaunchConfig, LoggerConfig, RunConfig, UserError
from lisa_dist.config.checks import check_combinations
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.config.running import WandbConfig
from lisa_dist.telemetry import sinks
from lisa_dist.telemetry.recorder import Recorder
from lisa_dist.telemetry.sinks import build_sink, numbers_of, public_config

ROW = {"step": 3, "loss": 2.5, "active_layers": [1, 2], "parts": {"forward": 0.5}, "skipped": True, "note": None}


def config_with(name, **options):
    return Config(logger=LoggerConfig(name=name, **options), run=RunConfig(name="trial"))


def test_only_numbers_are_sent():
    assert numbers_of(ROW) == {"loss": 2.5, "parts/forward": 0.5}


def test_no_logger_and_other_ranks_send_nothing(tmp_path, monkeypatch):
    assert build_sink(config_with("none"), RunDirectory(tmp_path)) is None
    monkeypatch.setattr(sinks, "is_main", lambda: False)
    assert build_sink(config_with("wandb"), RunDirectory(tmp_path)) is None


def test_shell_lines_are_not_sent():
    config = Config(launch=LaunchConfig(setup=["export HF_TOKEN=hidden"]))
    assert "hidden" not in json.dumps(public_config(config))
    assert public_config(config)["optimizer"]["lr"] == config.optimizer.lr


def test_wandb_offline_needs_no_account(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    config = config_with("wandb", wandb=WandbConfig(mode="offline", project="tests", tags=["a"]))
    sink = build_sink(config, RunDirectory(tmp_path))
    sink.log(ROW)
    sink.log({"step": 3, "eval_loss": 2.25})
    sink.log({"step": 4, "loss": math.nan})
    summary = dict(sink.run.summary)
    identity = sink.run.id
    sink.close()
    assert (summary["step"], summary["parts/forward"], summary["eval_loss"]) == (4, 0.5, 2.25)
    assert math.isnan(summary["loss"])
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert (tmp_path / "wandb" / "run_id.txt").read_text() == identity


def sent_to_wandb(file: Path) -> list[dict[str, float]]:
    """The rows in a file of records, each behind 7 bytes: a check sum, its length, whole or in parts."""
    content, place, record, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # bytes of a block
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if place + 7 + length > len(content):
            break  # is still being written
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            if (parsed := Record.FromString(record)).HasField("history"):
                rows.append({item.key or item.nested_key[0]: float(item.value_json) for item in parsed.history.item})
            record = b""
    return rows


def test_wandb_keeps_what_a_roll_back_does_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    sink = build_sink(config_with("wandb", wandb=WandbConfig(mode="offline")), RunDirectory(tmp_path))
    for step in (1, 2, 3):
        sink.log({"step": step, "loss": float(step)})
    sink.cut_after(1)
    for step in (2, 3):
        sink.log({"step": step, "loss": 10.0 * step})
    sink.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 60
    while len(sent_to_wandb(file)) < 5 and time.monotonic() < end:
        time.sleep(0.1)  # a process of W&B's own writes them
    assert [(row["step"], row["loss"]) for row in sent_to_wandb(file)] == [(1, 1), (2, 2), (3, 3), (2, 20), (3, 30)]


def test_a_run_that_goes_on_is_the_same_run_and_variables_stand_in_for_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    theirs = {"MODE": "offline", "PROJECT": "theirs", "ENTITY": "team", "TAGS": "a,b", "NAME": "named"}
    for name, value in theirs.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    found = []
    for options, name in ((WandbConfig(), None), (WandbConfig(project="ours", tags=["c"]), "trial")):
        config = Config(logger=LoggerConfig(name="wandb", wandb=options), run=RunConfig(name=name))
        sink = build_sink(config, RunDirectory(tmp_path))
        about = (sink.run.id, sink.run.project, sink.run.entity, sink.run.settings.mode)
        found.append((*about, sink.run.tags, sink.run.name))
        sink.close()
    identity = (tmp_path / "wandb" / "run_id.txt").read_text()
    assert found == [
        (identity, "theirs", "team", "offline", ("a", "b"), "named"),
        (identity, "ours", "team", "offline", ("c",), "trial"),
    ]


def test_a_variable_that_is_no_mode_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match=r"^WANDB_MODE=ofline: must be one of online, offline, disabled"):
        check_combinations(config_with("wandb"))
    check_combinations(config_with("wandb", wandb=WandbConfig(mode="offline")))  # a key wins
    check_combinations(config_with("none"))


def test_without_variables_the_defaults_hold():
    assert WandbConfig().with_variables({}) == WandbConfig(mode="online", project="lisa-dist")


def test_tensorboard_hides_what_a_resume_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = build_sink(config_with("tensorboard"), RunDirectory(tmp_path))
    for step in (1, 2, 3):
        sink.log({"step": step, "loss": float(step)})
    sink.close()
    sink = build_sink(config_with("tensorboard"), RunDirectory(tmp_path), first_step=2)
    sink.log({"step": 3, "loss": 30.0})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_hides_what_a_roll_back_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_with("tensorboard")
    config.run.dir = str(tmp_path)
    with Recorder(config, max_steps=4, num_blocks=2, started=0.0) as recorder:
        for step in (1, 2, 3):
            recorder.record_evaluation(step, float(step))
        recorder.cut_after(1)
        recorder.record_evaluation(2, 20.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(1, 1.0), (2, 20.0)]
