"""What the user writes becomes the dataclasses, or one sentence that says what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import GROUPS, conf_dir, group_choices, load, load_run, resume_run, to_yaml, vary
from lisa_dist.config.other_trainers import KEYS_HERE
from lisa_dist.config.overrides import PATH_KEYS, SCHEMAS, all_keys, parse_overrides
from lisa_dist.config.sampling import SAMPLER_CONFIGS, AllSamplerConfig, FixedSamplerConfig, UniformSamplerConfig
from lisa_dist.config.sweeps import read_space

# An override, and what its sentence must name beside the override itself.
WRONG_OVERRIDES = [
    ("sampler.perod=3", ["no key sampler.perod", "active_layers, period, seed", "did you mean sampler.period?"]),
    ("model.loss_kernel=liger", ["no key model.loss_kernel", "here it is model.kernels"]),
    ("parallel.compile=true", ["no key parallel.compile", "here it is model.kernels=compile"]),
    ("lr=3", ["no key lr", "did you mean optimizer.lr?"]),
    ("lisa.train_embeddings=false", ["did you mean always_active.embeddings?"]),
    ("+sampler.foo=1", ["no key sampler.foo"]),
    ("++foo=1", ["no key foo", "the keys begin with method, model, data"]),
    ("+sampler=uniform", ["write sampler=uniform"]),
    ("~sampler.period", ["cannot be removed"]),
    ("sampler@other=uniform", ["write sampler=NAME"]),
    ("always_active.head.x=3", ["no key always_active.head.x"]),
    ("sampler.blocks=[1]", ["belongs to sampler=fixed"]),
    ("optimizer.betas.0=0.5", ["no key optimizer.betas.0", "did you mean optimizer.betas?"]),
    ("train=3", ["a group of keys", "train.max_steps=VALUE"]),
    ("sampler.period=x", ["a whole number"]),
    ("sampler.period=2.5", ["a whole number"]),
    ("train.max_steps=a", ["a whole number or null"]),
    ("train.seed=null", ["a whole number"]),
    ("optimizer.lr=fast", ["a number"]),
    ("model.trust_remote_code=maybe", ["true or false"]),
    ("optimizer.betas=3", ["a list such as [A,B], each entry a number"]),
    ("optimizer.betas=[a]", ["a list such as [A,B], each entry a number"]),
    ("optimizer.betas=[[0.9],[0.99]]", ["a list such as [A,B], each entry a number"]),
    ("logger.wandb.tags=[a,[b]]", ["each entry a text"]),
    ("logger.wandb.tags=[1.10]", ["each entry a text (quote it where it is a number"]),
    ("evaluate.tasks=[2024_01]", ["each entry a text"]),
    ("checkpoint.keep_best=3", ["true or false"]),
    ("data.packing=-1", ["true or false"]),
    ("data.columns={prompt:[a]}", ["each value a text"]),
    ("run.dir=", ["is empty", "a variable of the shell"]),
    ("data.path=''", ["is empty"]),
    ("data.columns=3", ["a mapping such as {A:B}"]),
    ("run.name=[1]", ["a text"]),
    ("sampler.period=0", ["at least 1"]),
    ("optimizer.betas=[0.9]", ["two numbers"]),
    ("precision.frozen=bf16", ["float32, bfloat16", "did you mean bfloat16?"]),
    ("parallel.nproc_per_node=two", ["auto or a whole number"]),
    ("parallel.cpu_threads=100000", ["auto or a whole number of at least 1 and at most 4096"]),
    ("optimizer.lr=nan", ["at least 0"]),
    ("method=lsa", ["must be one of", "did you mean lisa?"]),
    ("method=null", ["must be one of"]),
    ("model=lama2_7b", ["must be one of custom, demo"]),
    ("sampler=unifrom", ["must be one of all", "did you mean uniform?"]),
    ("sampler.name=all", ["choosing sampler=NAME"]),
    ("sampler=schema_all", ["must be one of all"]),
    ("experiment=demmo", ["did you mean demo?"]),
    ("run.name=a,b", ["--multirun", "run.name=[A,B]"]),
    ("run.name=a=b", ["KEY=VALUE", "quotes"]),
    ("foo", ["KEY=VALUE"]),
    ("learning_rate=1e-5", ["no key learning_rate; here it is optimizer.lr"]),
    ("training.num_train_epochs=3", ["here it is train.epochs"]),
    ("per-device-train-batch-size=3", ["here it is train.micro_batch_size"]),
    ("lora_r=8", ["here it is update.rank"]),
    ("hydra.run.dir=x", ["run.dir"]),
    ("run.dir=${nowhere}", ["run.dir"]),
]


@pytest.mark.parametrize(("override", "named"), WRONG_OVERRIDES, ids=[override for override, _ in WRONG_OVERRIDES])
def test_a_mistake_is_one_sentence_that_names_key_value_and_remedy(override: str, named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load([override])
    sentence = str(error.value)
    assert "\n" not in sentence
    assert override.partition("=")[0].lstrip("+~").partition("@")[0] in sentence
    for part in named:
        assert part in sentence


def test_model_given_as_a_path_is_told_where_a_path_goes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.path={tmp_path}")):
        load([f"model={tmp_path}"])


# Groups that choose others compose alone, the others side by side: composing is what takes the time.
ALONE = [f"{group}={name}" for group in ("method", "experiment") for name in group_choices(group)]
BESIDE = [
    " ".join(choices)
    for choices in itertools.zip_longest(
        *(
            [f"{group}={name}" for name in group_choices(group)]
            for group in GROUPS
            if group not in ("method", "experiment")
        ),
        fillvalue="",
    )
]


@pytest.mark.parametrize("chosen", [*ALONE, *BESIDE])
def test_every_yaml_file_composes(chosen: str) -> None:
    config = load(chosen.split())
    for choice in chosen.split():
        group, _, name = choice.partition("=")
        if group not in ("method", "experiment"):
            assert getattr(config, group).name == name
        if group == "method":
            assert config.method == name
        if group == "sampler":
            assert type(config.sampler) is SAMPLER_CONFIGS[name]


def changed(value: Any) -> Any:
    """Another value of the same kind, for every kind that has one that passes every check."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 1.0
    return value


def as_written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")


def test_every_key_can_be_overridden() -> None:
    defaults = OmegaConf.structured(Config)
    values = {key: changed(OmegaConf.select(defaults, key)) for key in all_keys(defaults) if key != "method"}
    config = load(["experiment=null", *(f"{key}={as_written(value)}" for key, value in values.items())])
    result = OmegaConf.structured(config)
    assert {key: OmegaConf.select(result, key) for key in values} == values
    assert sum(values[key] != OmegaConf.select(defaults, key) for key in values) > 30


def test_words_of_other_trainers_lead_to_keys_that_exist() -> None:
    keys = {key for name in GROUPS if name in SCHEMAS for part in SCHEMAS[name].values()
            for key in all_keys(OmegaConf.structured(part), f"{name}.")}  # fmt: skip
    keys |= {*all_keys(OmegaConf.structured(Config)), *GROUPS}
    assert not {re.split("[=,]", here)[0] for here in KEYS_HERE.values()} - keys


@pytest.mark.parametrize("path", ["a,b", "x y (1)", "[a] {b}", "~/it's", "a=b", "1e3", "$(x)", "ä#!", "'"])
def test_a_path_is_meant_as_it_is_written(path: str) -> None:
    for key in ("data.path", "run.dir", "export.path", "model.path"):
        name, part = key.split(".")
        assert getattr(getattr(load([f"{key}={path}"]), name), part) == path


def test_every_key_of_a_path_exists() -> None:
    assert set(PATH_KEYS) <= set(all_keys(OmegaConf.structured(Config)))


def test_defaults_are_the_demonstration() -> None:
    config = load([])
    assert (config.method, config.model.name, config.data.name) == ("lisa", "demo", "demo")
    assert config == load(["experiment=demo"])
    assert config.optimizer.lr != Config().optimizer.lr  # the experiment's, not the dataclass'


def test_a_model_of_ones_own_gets_neither_the_demonstration_nor_its_preset() -> None:
    config = load(["model.path=/models/mine", "data.path=rows.json"])
    assert (config.model.name, config.model.path, config.data.name) == ("custom", "/models/mine", "custom")
    assert config.optimizer == Config().optimizer
    assert config.train == Config().train


def test_data_of_ones_own_for_the_demonstrations_model() -> None:
    config = load(["data.path=rows.json"])
    assert (config.model.name, config.data.name, config.data.path) == ("demo", "custom", "rows.json")


def test_a_preset_stays_where_it_is_named_beside_a_path() -> None:
    assert load(["model=demo", "model.path=/copy"]).model.name == "demo"
    assert load(["experiment=demo", "data.path=copy.json"]).data.name == "demo"


def test_command_line_wins_over_what_a_method_overrides() -> None:
    config = load(["method=full", "sampler=uniform"])
    assert config.method == "full"
    assert type(config.sampler) is UniformSamplerConfig
    assert type(load(["method=full"]).sampler) is AllSamplerConfig


@pytest.fixture
def own_groups(tmp_path: Path) -> str:
    """A folder of the user's own: an experiment that chooses a method, and data with a mistake in it."""
    experiment = (
        "# @package _global_\ndefaults:\n  - override /method: full\n  - override /data: mine\ntrain:\n  seed: 7\n"
    )
    for name, text in {
        "experiment/mine.yaml": experiment,
        "data/mine.yaml": "name: mine\npath: mine.json\n",
        "data/typo.yaml": "pth: mine.json\n",
        "data/wrong_type.yaml": "sequence_length: long\n",
        "data/broken.yaml": "a: [\n",
        "data/round.yaml": "defaults: [about]\n",
        "data/about.yaml": "defaults: [round]\n",
        "data/shell.yaml": "path: ${SCRATCH}/rows.json\n",
    }.items():
        (tmp_path / "own groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own groups" / name).write_text(text)
    return str(tmp_path / "own groups")


def test_own_groups_of_config_dir(own_groups: str) -> None:
    config = load(["experiment=mine"], own_groups)
    assert (config.method, config.data.path, config.train.seed) == ("full", "mine.json", 7)
    assert type(config.sampler) is AllSamplerConfig
    config = load(["experiment=mine", "method=lisa", "data=demo", "train.seed=8"], own_groups)
    assert (config.method, config.data.name, config.train.seed) == ("lisa", "demo", 8)
    assert type(config.sampler) is UniformSamplerConfig
    assert type(load(["experiment=mine", "sampler=fixed"], own_groups).sampler) is FixedSamplerConfig


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("typo", "data.pth"),
        ("wrong_type", "data.sequence_length"),
        ("broken", "broken.yaml"),
        ("round", "the defaults of a YAML file lead back to it"),
        ("shell", "data.path: ${NAME} means a key"),
    ],
)
def test_a_mistake_in_a_users_yaml_is_one_sentence(own_groups: str, name: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        load([f"data={name}"], own_groups)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_config_dir_must_exist() -> None:
    with pytest.raises(UserError, match="--config-dir nowhere"):
        load([], "nowhere")


def test_texts_stay_as_written() -> None:
    config = load(["run.name=1e3", "data.validation=0.10", "parallel.shard=2", "launch.time=1:00:00"])
    assert (config.run.name, config.data.validation) == ("1e3", "0.10")
    assert (config.parallel.shard, config.launch.time) == ("2", "1:00:00")


@pytest.mark.parametrize("name", ["[v2]", "a (1)", "a,b", "a=b", "{c}", "it's", 'a"b', "~x", "1e3", "ü", "glob(*)"])
def test_a_path_that_exists_is_meant_by_its_name(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for key in ("data.path", "+run.dir", "generate.prompts"):
        for path in (name, str(tmp_path / name)):
            (override,) = parse_overrides([f"{key}={path}"])
            assert (override.key, override.value) == (key.lstrip("+"), path)
            assert list(read_space([f"{key}={path}"])) == [override.key]


def test_paths_reach_the_configuration_as_they_are_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("1e3", "[v2]", "a,b"):
        (tmp_path / name).mkdir()
    config = load(["data.path=1e3", "run.dir=[v2]", "generate.prompts=a,b", "model.path='x, y'"])
    assert (config.data.path, config.run.dir, config.generate.prompts, config.model.path) == (
        "1e3", "[v2]", "a,b", "x, y",
    )  # fmt: skip


def test_what_of_a_path_is_not_read_as_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "null").mkdir()
    texts = ["run.dir=null", "run.dir='new [1]/a (2)'", "run.dir=new [1]/a (2)", "generate.prompts=[a,b]"]
    values = [override.value for override in parse_overrides(texts)]
    assert values == [None, "new [1]/a (2)", "new [1]/a (2)", ["a", "b"]]
    assert len(read_space(["data.path=a.jsonl,b.jsonl"])["data.path"]) == 2


def test_free_mappings_take_any_name() -> None:
    config = load(["data.columns={prompt:question}", "model.architecture.hidden_size=8", "+model.architecture.a.b=1"])
    assert config.data.columns == {"prompt": "question"}
    assert config.model.architecture == {"hidden_size": 8, "a": {"b": 1}}


def test_the_last_of_two_overrides_counts() -> None:
    assert load(["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("name", ["${a}", "$${a} and ${b}", r"\${a}", r"a\\${a}", r"\a", "$a"])
def test_what_looks_like_a_key_in_braces_may_be_a_text(name: str, tmp_path: Path) -> None:
    config = load([])
    config.run.name = config.run.dir = name
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run(str(tmp_path), []).run.name == name
    assert vary(config, ["train.seed=3"]).run == config.run


def test_config_yaml_repeats_the_run(tmp_path: Path) -> None:
    config = load(["sampler=fixed", "sampler.blocks=[1,2]", "checkpoint.async=true", "model.architecture.a=1e-5"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_run(str(tmp_path), [])
    assert dataclasses.replace(again, run=config.run) == config
    assert again.checkpoint.in_background and config.checkpoint.in_background  # == does not see this field
    assert again.model.architecture == {"a": 1e-5}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train:\n  sed: 1\n", "train.sed"),
        ("sampler:\n  name: nothing\n", "sampler.name=nothing"),
        ("sampler:\n  name: fixed\n  eta: 1\n", "sampler.eta"),
        ("- 1\n", "must hold a configuration"),
        ("model: 3\n", "config.yaml: model=3: must hold keys"),
        ("sampler: 3\n", "config.yaml: sampler=3: must hold keys"),
        ("a: [\n", "cannot be read as YAML"),
        ("train: !!python/object/apply:os.getpid []\n", "cannot be read as YAML"),
    ],
)
def test_config_yaml_is_read_strictly(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(named)):
        load_run(str(tmp_path), [])


def test_commands_read_the_configuration_of_a_run(tmp_path: Path) -> None:
    run = load(["sampler=fixed", "sampler.blocks=[3]", "run.dir=/elsewhere", "train.seed=5"])
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    config = load_run(str(tmp_path), [f"run.dir={tmp_path}", "export.path=out"])
    assert (config.train.seed, config.export.path, config.run.dir) == (5, "out", str(tmp_path))
    assert config.sampler == run.sampler
    with pytest.raises(UserError, match="sampler=all: the groups of a run"):
        load_run(str(tmp_path), ["sampler=all"])
    with pytest.raises(UserError, match=r"export\.pth=x"):
        load_run(str(tmp_path), ["export.pth=x"])
    with pytest.raises(UserError, match=r"run\.dir=nowhere"):
        load_run("nowhere", [])


def written(run_dir: Path, *overrides: str) -> Path:
    """The directory of a run with these settings."""
    (run_dir / "config.yaml").write_text(to_yaml(load([*overrides, f"run.dir={run_dir}"])))
    return run_dir


def test_a_run_goes_on_with_its_own_settings_and_those_given(tmp_path: Path) -> None:
    overrides = ["model.path=/m", "data.path=/d.jsonl", "method=lora", "sampler=sweep", "sampler.period=7"]
    overrides += ["optimizer.lr=0.5", "logger=wandb", "logger.wandb.project=mine", "checkpoint.new_data=true"]
    run = load([*overrides, f"run.dir={written(tmp_path, *overrides)}"])
    run.checkpoint.new_data = False  # holds for one start
    assert resume_run(str(tmp_path), []) == run
    # The same choices again, as a job that was requeued repeats them, and in another order.
    assert resume_run(str(tmp_path), ["sampler=sweep", "method=lora", "experiment=null", "logger=wandb"]) == run
    found = resume_run(str(tmp_path), ["checkpoint.new_data=true", "optimizer.lr=0.25", "data.path=/e.jsonl"])
    assert (found.optimizer.lr, found.data.path, found.checkpoint.new_data) == (0.25, "/e.jsonl", True)
    assert found.sampler == run.sampler and found.logger == run.logger
    other = resume_run(str(tmp_path), ["logger=tensorboard", "scheduler=linear", "scheduler.warmup_steps=3"])
    assert (other.logger.name, other.scheduler.name, other.scheduler.warmup_steps) == ("tensorboard", "linear", 3)
    assert (other.model, other.optimizer, other.method) == (run.model, run.optimizer, "lora")
    assert resume_run(str(tmp_path), ["sampler=all"]).sampler.name == "all"
    for wrong in ("sampler=some", "optimizer.rl=1", "train.seed=x"):
        with pytest.raises(UserError, match=re.escape(wrong.partition("=")[0])):
            resume_run(str(tmp_path), [wrong])


def test_an_experiment_is_a_whole_configuration(tmp_path: Path) -> None:
    written(tmp_path, "model.path=/m", "data.path=/d.jsonl")
    overrides = ["experiment=demo", f"run.dir={tmp_path}"]
    assert resume_run(str(tmp_path), overrides) == load(overrides)


def test_the_groups_of_the_checkout_are_the_ones_that_are_read() -> None:
    assert (conf_dir() / "config.yaml").is_file()
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} >= set(GROUPS)


def test_every_field_of_the_configuration_is_a_group_or_the_method() -> None:
    for field in dataclasses.fields(Config):
        assert field.name == "method" or dataclasses.is_dataclass(getattr(Config(), field.name))


def test_another_method_brings_its_sampler_and_what_was_set_stays():
    base = ["model=custom", "method=lisa"]
    for more, expected in ([], (1, 50)), (["sampler.period=7"], (1, 7)), (["sampler.active_layers=3"], (3, 50)):
        sampler = vary(load([*base, *more]), ["method=badam"]).sampler
        assert (sampler.active_layers, sampler.period) == expected


@pytest.mark.parametrize("name", ["0_lr=0.001", "0_method=lisa_lr=0.001"])
def test_the_directory_of_a_sweeps_job_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    with pytest.raises(UserError, match=f"^{name}: .*; the directory of a run is named by run.dir={name}$"):
        load([name])
