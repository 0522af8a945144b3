"""A configuration file in YAML gives what the same keys on the command line give, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from lisa_dist.cli import main
from lisa_dist.commands.init import run as init
from lisa_dist.config import UserError
from lisa_dist.config.config_file import file_overrides, names_config_file
from lisa_dist.config.loading import load, to_yaml
from lisa_dist.config.overrides import parse_overrides, write_override
from lisa_dist.config.sweeps import combinations, read_space

FILE = """
method: lora
model:
  path: /models/it's (mine), v2
model.quantization: nf4  # a dotted key beside those of the group
data:
  path: "~/rows [1].jsonl"
  columns: {prompt: question, completion: the answer}
update:
  rank: 8
  target_modules: [q_proj, v_proj]
optimizer:
  lr: 2e-4
  part_lr: {blocks: 1e-5}
sampler:
  name: fixed
  blocks: [0, 2]
scheduler:
  name: linear
checkpoint:
logger:
  wandb:
    tags: [a b, 'null', "true"]
run:
  name: 1e3
"""


def read(tmp_path: Path, text: str, *others: str) -> list[str]:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    return [*file_overrides(str(file), list(others)), *others]


def test_a_sweep_varies_what_a_file_sets(tmp_path: Path) -> None:
    jobs = combinations(read_space(read(tmp_path, FILE, "optimizer.lr=1e-3,1e-4")))
    assert [(load(job).optimizer.lr, load(job).update.rank) for job in jobs] == [(1e-3, 8), (1e-4, 8)]  # type: ignore[attr-defined]


def test_a_file_sets_what_the_same_keys_set(tmp_path: Path) -> None:
    config = load(read(tmp_path, FILE, "optimizer.lr=1e-3"))
    assert (config.method, config.model.path, config.model.quantization) == ("lora", "/models/it's (mine), v2", "nf4")
    assert (config.data.path, config.data.columns) == (
        "~/rows [1].jsonl",
        {"prompt": "question", "completion": "the answer"},
    )
    assert (config.update.name, config.update.rank, config.update.target_modules) == ("lora", 8, ["q_proj", "v_proj"])  # type: ignore[attr-defined]
    assert (config.sampler.name, config.sampler.blocks) == ("fixed", [0, 2])  # type: ignore[attr-defined]
    assert (config.optimizer.lr, config.optimizer.part_lr) == (1e-3, {"blocks": 1e-5}), "the command line comes last"
    assert (config.scheduler.name, config.logger.wandb.tags) == ("linear", ["a b", "null", "true"])
    assert config.always_active.head is False, "the method's own preset"


def test_nothing_of_the_demonstration_is_in_a_file(tmp_path: Path) -> None:
    config = load(read(tmp_path, "train:\n  max_steps: 5\n"))
    assert (config.model.path, config.data.path, config.train.max_steps) == (None, None, 5)
    assert config.optimizer == load(["model=custom"]).optimizer
    assert load(read(tmp_path, "model: qwen3_0_6b\n")).model.name == "qwen3_0_6b"
    assert load(read(tmp_path, "train: {seed: 1}\n", "model=qwen3_0_6b", "data=gsm8k")).data.name == "gsm8k"
    assert load(read(tmp_path, "experiment: demo\n")) == load([])


def test_a_number_is_what_its_key_makes_of_it(tmp_path: Path) -> None:
    text = "launch: {time: 24:00:00}\nrun: {name: 1e3}\ndata: {split: 007, columns: {prompt: 2}}\n"
    config = load(read(tmp_path, text + "model.architecture: {a: 1e6, b: [3]}\noptimizer: {lr: 1.e-5, eps: 1.E-7}\n"))
    assert (config.launch.time, config.run.name, config.data.split) == ("24:00:00", "1e3", "007")
    assert (config.data.columns, config.model.architecture) == ({"prompt": "2"}, {"a": 1e6, "b": [3]})
    with pytest.raises(UserError, match=r"optimizer.eps=inf: must be a finite number"):
        load(read(tmp_path, "optimizer: {eps: .inf}\n"))
    assert (config.optimizer.lr, config.optimizer.eps) == (1e-5, 1e-7)  # type: ignore[attr-defined]


def test_a_truth_is_what_its_key_makes_of_it(tmp_path: Path) -> None:
    text = "run: {name: on}\nlaunch: {partition: no}\ndata: {packing: yes, group_by_length: Off}\n"
    config = load(read(tmp_path, text + "model.architecture: {a: yes, b: [No, {c: ON}]}\ncheckpoint: {async: on}\n"))
    assert (config.run.name, config.launch.partition) == ("on", "no")
    assert (config.data.packing, config.data.group_by_length) == (True, False)
    assert config.model.architecture == {"a": True, "b": [False, {"c": True}]} and config.checkpoint.in_background


def test_what_a_run_wrote_can_be_read_as_a_file(tmp_path: Path) -> None:
    config = load(["method=owlore", "update.rank=4", "data.path=x y.jsonl", "optimizer=lion", "launch.setup=[a b]"])
    assert load(read(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    "chosen",
    [
        [],
        ["method=lora", "always_active.head=true", "update.dropout=0.1"],
        ["model=gemma3_1b", "optimizer=adamw8bit", "optimizer.lr=0.1", "sampler=bandit", "data.path=a (b), c.jsonl"],
        ["experiment=llama3_1_8b", "logger=wandb", "logger.wandb.tags=[x]", 'run.name="it\'s"'],
    ],
)
def test_init_writes_a_file_that_says_the_same(chosen: list[str], tmp_path: Path) -> None:
    file = str(tmp_path / "my.yaml")
    assert main(["init", file, *chosen]) == 0
    written, config = load(file_overrides(file, [])), load(chosen)
    written.model.name, written.data.name = config.model.name, config.data.name  # of presets, for records
    assert written == config
    with pytest.raises(UserError, match="not written over"):
        init(config, file, ("train",))


def test_init_says_what_is_left_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for name, chosen in (("a", []), ("b", ["model.path=DIR"]), ("c d", ["model=qwen3_4b", "data.path=FILE.json"])):
        assert main(["init", str(tmp_path / name), *chosen]) == 0
        said.append(capsys.readouterr().out.partition("; ")[2].replace(str(tmp_path), "").strip())
    to_set = "set model.path and data.path in it to your own, then: lisa-dist train /a"
    assert said == [to_set, "set data.path in it to your own, then: lisa-dist train /b", "next: lisa-dist train '/c d'"]


WRONG = [
    ("train: {sede: 1}", "no key train.sede"),
    ("train: {max_steps: many}", "train.max_steps='many': must be a whole number"),
    ("methd: lora", "no key methd"),
    ("method: lroa", "did you mean lora?"),
    ("model: llama3_1_8", "must be one of"),
    ("defaults: [model]", "a preset is chosen by its group's name"),
    ("- a", "must hold keys and values"),
    ("a: [", "cannot be read as YAML"),
    ("train:\n  seed: 1\ntrain:\n  seed: 2\n", "duplicate key train"),
    ("optimizer: {lr: 1e-5}\noptimizer.lr: 2e-5", "optimizer.lr is set twice, to 1e-5 and 2e-5; keep one"),
    ("optimizer: lion\noptimizer.name: adamw", "optimizer is set twice, to lion and adamw"),
    ("train: {max_steps: 1:30}", "train.max_steps=1:30: must be a whole number"),
    ("optimizer: 3", "must be one of"),
    ("train: 3", "a group of keys"),
    ("optimizer: {lr: }", "must be a number"),
    ("run: {dir: [a]}", "run.dir=[a]: must be one path"),
    ("data: &d\n  columns: *d\n", "an anchor (&NAME) holds itself"),
    ("launch:\n  setup: |\n    a\n    b\n", "launch.setup='a b ': must be a list"),
    ("train: {max_steps: yes}", "train.max_steps=yes: must be a whole number"),
    ("logger: {wandb: {tags: [on]}}", "must be a list"),
]


@pytest.mark.parametrize(("text", "named"), WRONG, ids=[text for text, _ in WRONG])
def test_a_mistake_in_a_file_is_one_sentence_that_names_the_file(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert str(tmp_path / "my.yaml") in str(error.value) and named in str(error.value) and "\n" not in str(error.value)


def test_words_that_are_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = tmp_path / "a=b (c).yaml"
    strange.write_text("model: demo\ndata: demo\n")
    assert names_config_file(str(strange)) and names_config_file("my.yaml") and names_config_file("~/my.yaml")
    assert not names_config_file("run.name=my.yaml") and not names_config_file("~sampler.period")
    assert main(["train", str(strange), "train.max_steps=7", "--cfg", "job"]) == 0
    assert "max_steps: 7" in capsys.readouterr().out
    assert main(["plan", "my.yml", "train.seed=1"]) == 2
    assert "my.yml: must be KEY=VALUE, or a YAML file that exists" in capsys.readouterr().err
    assert main(["train", str(strange), "other.yaml"]) == 2
    assert "one configuration file is read" in capsys.readouterr().err


TEXTS = ["null", "true", "nan", "5", "", " a", "it's", "a\\", "\\'b'", "a,b [c] (d) {e}=f", "~x", "ü\n"]


@pytest.mark.parametrize("value", [None, True, 3, 1e-5, *TEXTS])
def test_every_value_is_written_so_that_it_is_read_again(value: object) -> None:
    for whole in (value, [value, "x"], {"name": value}):
        assert parse_overrides([write_override("launch.setup", whole)])[0].value == whole
