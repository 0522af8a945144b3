import json
import math

import pytest

from lisa_dist.config import Config, LaunchConfig, LoggerConfig, RunConfig
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.config.running import WandbConfig
from lisa_dist.telemetry import sinks
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
    assert (summary["loss"], summary["parts/forward"], summary["eval_loss"]) == (2.5, 0.5, 2.25)  # of step 3
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert (tmp_path / "wandb" / "run_id.txt").read_text() == identity


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
