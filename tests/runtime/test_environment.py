"""What a rank can tell of its place before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from lisa_dist.config import ParallelConfig, UserError
from lisa_dist.runtime.distributed import initialize
from lisa_dist.runtime.environment import ALLOCATOR_SETTINGS, interface_towards


def test_interface_by_which_a_host_is_reached() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None


@pytest.mark.parametrize(
    "chosen", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": ""}]
)
def test_segments_grow_where_nothing_was_chosen_before_torch_is_imported(chosen: dict[str, str]) -> None:
    code = (
        "import os, sys; from unittest import mock; from lisa_dist import cli\n"
        "with mock.patch.object(cli, '_run', lambda *_: print('torch' in sys.modules, "
        "{key: value for key, value in os.environ.items() if 'ALLOC_CONF' in key})): cli.main([])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR_SETTINGS}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**environment, **chosen}
    )
    assert run.stdout.strip() == f"False {chosen or {'PYTORCH_ALLOC_CONF': 'expandable_segments:True'}}"


def test_a_rank_needs_all_that_a_launcher_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
        missing = {"RANK": "WORLD_SIZE", "WORLD_SIZE": "MASTER_ADDR", "MASTER_ADDR": "MASTER_PORT"}[name]
        with pytest.raises(UserError, match=rf"^{missing}: must be set for a rank \(RANK=0\)"):
            initialize(ParallelConfig(cpu_threads="1"))


def test_a_rank_that_sees_several_gpus_is_told_which_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^LOCAL_RANK: must be set for a rank \(RANK=0\) that sees 8 GPUs"):
        initialize(ParallelConfig(cpu_threads="1"))
