"""What a newcomer touches to add a sampler, an optimizer, an update, a data format and an objective; it then trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import free_ports, read_summary, rows_of_steps

ROOT = Path(__file__).parents[1]
# What is added: the files that are new, and in those that are there what comes in front of a piece of their text.
SAMPLER: dict[str, str | tuple[str, str]] = {
    "lisa_dist/method/sampling/last.py": """
from lisa_dist.method.sampling.base import Sampler


class LastSampler(Sampler):
    def _choose(self, period: int) -> list[int]:
        return list(range(self.num_blocks - self.num_active, self.num_blocks))
""",
    "conf/sampler/last.yaml": "defaults: [schema_last]\n",
    "lisa_dist/config/sampling.py": (
        "SAMPLER_CONFIGS: dict[str, type[SamplerConfig]] = {",
        """
@dataclass
class LastSamplerConfig(SamplerConfig):
    name: str = "last"


SAMPLER_CONFIGS: dict[str, type[SamplerConfig]] = {
    "last": LastSamplerConfig,""",
    ),
    "lisa_dist/method/sampling/__init__.py": (
        "SAMPLERS: dict[str, Callable[[Any, int], Sampler]] = {",
        """from lisa_dist.method.sampling.last import LastSampler

SAMPLERS: dict[str, Callable[[Any, int], Sampler]] = {
    "last": LastSampler,""",
    ),
}
OPTIMIZER: dict[str, str | tuple[str, str]] = {
    "lisa_dist/method/optim/signs.py": """
import torch

from lisa_dist.method.optim.spec import OptimizerSpec


def signs(config):
    return OptimizerSpec((), lambda groups: Signs(groups, {"lr": config.lr}), lambda *_: {}, lambda shard: 0)


class Signs(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign() * group["lr"])
""",
    "conf/optimizer/signs.yaml": "defaults: [schema_signs]\n",
    "lisa_dist/config/optimization.py": (
        "OPTIMIZER_CONFIGS: dict[str, type[OptimizerConfig]] = {",
        """
@dataclass
class SignsConfig(OptimizerConfig):
    name: str = "signs"


OPTIMIZER_CONFIGS: dict[str, type[OptimizerConfig]] = {
    "signs": SignsConfig,""",
    ),
    "lisa_dist/method/optim/__init__.py": (
        'SPECS: dict[str, Callable[[Any], OptimizerSpec]] = {"adamw"',
        """from lisa_dist.method.optim.signs import signs

SPECS: dict[str, Callable[[Any], OptimizerSpec]] = {"signs": signs, "adamw\"""",
    ),
}
UPDATE: dict[str, str | tuple[str, str]] = {
    "lisa_dist/method/updates/norms.py": """
from lisa_dist.method.updates.base import Update


class Norms(Update):
    def trainable_parameters(self, names: list[str]) -> list[str]:
        return [name for name in names if "norm" in name]
""",
    "conf/update/norms.yaml": "defaults: [schema_norms]\n",
    "lisa_dist/config/updates.py": (
        "UPDATE_CONFIGS: dict[str, type[UpdateConfig]] = {",
        """
@dataclass
class NormsUpdateConfig(UpdateConfig):
    name: str = "norms"


UPDATE_CONFIGS: dict[str, type[UpdateConfig]] = {
    "norms": NormsUpdateConfig,""",
    ),
    "lisa_dist/method/updates/__init__.py": (
        "UPDATES: dict[str, Callable[[Any], Update]] = {",
        """from lisa_dist.method.updates.norms import Norms

UPDATES: dict[str, Callable[[Any], Update]] = {
    "norms": lambda config: Norms(),""",
    ),
}
DATA_FORMAT: dict[str, str | tuple[str, str]] = {
    "lisa_dist/data/formats.py": (
        '        Format("text", ("text",), (), _from_text),',
        """        Format("lines", ("line",), (), lambda row: row["line"]),
        Format("text", ("text",), (), _from_text),""",
    ),
    "lisa_dist/config/data.py": ('FORMATS = ["auto"', 'FORMATS = ["lines", "auto"'),
}
OBJECTIVE: dict[str, str | tuple[str, str]] = {
    "lisa_dist/objectives/doubled.py": """
from lisa_dist.objectives.supervised import prepare_supervised


def prepare_doubled(model, layers, config, in_place):
    supervised = prepare_supervised(model, layers, config, in_place)

    def doubled(model, micro_batch):
        loss, tokens = supervised(model, micro_batch)
        return 2 * loss, tokens

    return doubled
""",
    "lisa_dist/method/module.py": (
        "    objective = prepare_supervised(",
        """    from lisa_dist.objectives.doubled import prepare_doubled

    objective = prepare_doubled(""",
    ),
}
# As torchrun sets them: the process is the rank, none is started for it.
ONE_RANK = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
ONE_RANK |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
# The registries, which are one line each, not counted: docs/design.md has these numbers.
ADDED = [(SAMPLER, 3), (OPTIMIZER, 3), (UPDATE, 3), (DATA_FORMAT, 2), (OBJECTIVE, 2)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all of it added."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("lisa_dist", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for added, _ in ADDED:
        for name, content in added.items():
            file = folder / name
            if isinstance(content, str):
                assert not file.exists()
                file.write_text(content)
            else:
                old, new = content
                assert file.read_text().count(old) == 1, (name, old)
                file.write_text(file.read_text().replace(old, new))
    return folder


@pytest.mark.parametrize(("added", "files"), ADDED, ids=["sampler", "optimizer", "update", "data format", "objective"])
def test_so_many_files_are_touched_beside_the_registry(added: dict[str, str | tuple[str, str]], files: int) -> None:
    assert len([name for name in added if not name.endswith("__init__.py")]) == files


@pytest.mark.e2e
def test_what_was_added_trains(package: Path, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "lines.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"line": f"line {number} of a text"}) + "\n" for number in range(8)))
    overrides = ["sampler=last", "optimizer=signs", "update=norms", "data=custom", "data.format=lines"]
    overrides += ["model=demo", "experiment=null", f"data.path={data}", f"run.dir={run_dir}", "sampler.active_layers=2"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}", "train.max_steps=2", "train.global_batch_size=2"]
    overrides += [f"always_active.{part}=false" for part in ("embeddings", "norm", "head")]
    done = subprocess.run(
        [sys.executable, "-m", "lisa_dist", "train", *overrides],
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package), **ONE_RANK},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of_steps(run_dir)
    blocks, width = 6, 128
    assert [row["active_layers"] for row in rows] == [[blocks - 2, blocks - 1]] * 2
    assert rows[0]["loss"] > 10  # twice that of a model that knows nothing, ln 1024
    assert read_summary(run_dir)["trained_parameters"]["blocks"] == 2 * 2 * width
    assert read_summary(run_dir)["persistent_bytes"]["optimizer_state"] == 0
