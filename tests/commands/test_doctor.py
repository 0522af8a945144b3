"""``lisa-dist doctor``: its findings and exit codes, and a self-test that really runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lisa_dist import cli
from lisa_dist.commands import doctor, self_test
from lisa_dist.config import EXIT_DONE
from lisa_dist.config.loading import load
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime import distributed
from tests.support.ranks import run_on_ranks


@pytest.mark.e2e
def test_a_machine_that_can_train_is_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 1)  # one rank, below are two
    code = cli.main(["doctor", f"run.dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for name in ("packages", "GPU", "ports", "disk for runs", "tokenizer", "self-test in ranks"):
        assert name in printed
    assert "broken" not in printed
    assert run_on_ranks(2, self_test.run, load([f"run.dir={tmp_path / 'ranks'}"])) == [EXIT_DONE] * 2


def test_what_is_broken_is_named_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "check_ranks", lambda config: iter(()))
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["torch>=99", "no-such-package", 'x; extra == "eval"']
    )
    assert doctor.run(load(["model=custom", f"model.path={tmp_path / 'nowhere'}"])) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "broken packages: torch" in printed and "no-such-package is missing" in printed and "x is" not in printed
    assert "broken tokenizer: model.path=" in printed and "pip install --upgrade lisa-dist" in printed


def test_a_driver_without_a_fitting_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver_gpus", lambda: "NVIDIA A100")
    (finding,) = doctor.check_gpus(load([]))
    assert finding.state == doctor.BROKEN and "NVIDIA A100" in finding.detail and finding.fix


def write_where_others_do_not_see(own_folder: str) -> None:
    """The file system's check with a folder of each rank's own. Runs on every rank."""
    with pytest.raises(self_test.SelfTestError, match="a file system that all machines share"):
        self_test.check_file_system(Path(own_folder) / str(distributed.rank()))


def lose_a_weight(folder: str) -> None:
    """The training check with a checkpoint that is read back wrongly. Runs on a rank."""
    original = self_test.restore_checkpoint

    def restore(train_module: Any, *arguments: Any, **named: Any) -> Any:
        found = original(train_module, *arguments, **named)
        distributed.local_shard(next(train_module.store.module.parameters()).detach())[0] += 1
        return found

    self_test.restore_checkpoint = restore
    try:
        with pytest.raises(self_test.SelfTestError, match="does not hold what was written"):
            self_test.check_training(load([f"run.dir={folder}"]), Path(folder))
    finally:
        self_test.restore_checkpoint = original


def test_the_self_test_notices_what_is_wrong(tmp_path: Path) -> None:
    run_on_ranks(2, write_where_others_do_not_see, str(tmp_path))
    run_on_ranks(1, lose_a_weight, str(tmp_path))


def test_ranks_of_a_launcher_are_tested_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "initialize", lambda config: None)
    monkeypatch.setattr(self_test, "run", lambda config: EXIT_DONE)
    config = load(["run.dir=~/runs"])
    assert doctor._test_these_ranks(config).state == doctor.OK
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and (tmp_path / "home" / "runs").is_dir()
    assert RunDirectory.of(config).path == tmp_path / "home" / "runs"
