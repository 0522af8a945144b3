"""Turns YAML groups and ``key=value`` overrides into the dataclasses, with Hydra as a typed loader and nothing more."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from lisa_dist.config import Config
from lisa_dist.config.errors import UserError, check_choice, nearest
from lisa_dist.config.optimization import OptimizerConfig
from lisa_dist.config.other_trainers import key_here
from lisa_dist.config.overrides import (
    SCHEMAS,
    KeyOverride,
    all_keys,
    apply_override,
    describe_type,
    node_of,
    parse_overrides,
)
from lisa_dist.config.run_directory import RunDirectory

T = TypeVar("T")

VARIED = {
    "method": ("method", "sampler", "update", "always_active"),
    "sampler": ("sampler",),
    "update": ("update",),
    "optimizer": ("optimizer",),
}  # the groups that vary() may choose anew, and the keys that each of them settles
KEPT = {
    "sampler": ("active_layers", "period", "seed"),
    "optimizer": tuple(field.name for field in fields(OptimizerConfig) if field.name != "name"),
}  # what vary() keeps of a group chosen anew, where it was set
GROUPS = ("model", "data", "method", "sampler", "update", "optimizer", "scheduler", "logger", "experiment")


@dataclass
class _Schema(Config):
    """The configuration while it is composed: the types of what is chosen of SCHEMAS stand, not of all."""

    sampler: Any = MISSING
    update: Any = MISSING
    optimizer: Any = MISSING


def conf_dir() -> Path:
    """Return the folder of the YAML groups: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def load(overrides: list[str], config_dir: str | None = None) -> Config:
    """Compose the configuration from the groups, then set the keys that the user overrides.

    Args:
        overrides: Hydra's ``group=name`` and ``key=value``; the last of two for the same key counts.
        config_dir: a folder with the user's own groups beside those of the package.

    Raises:
        UserError: an override names no key or group, or holds a wrong type or an impossible value.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: must be a folder that exists")
    keys = parse_overrides(overrides)
    groups = {override.key: override for override in keys if override.key in GROUPS}
    for override in groups.values():
        _check_group(override, config_dir)
    choices = _with_defaults({name: override.value for name, override in groups.items()}, {key.key for key in keys})
    return _with_keys(_one_sentence(lambda: _compose(choices, config_dir)), keys)


def _with_keys(config: DictConfig, overrides: list[KeyOverride]) -> Config:
    """Set the single keys among ``overrides``, and return the dataclasses."""
    for override in overrides:
        if override.key not in GROUPS:
            apply_override(config, override)
    return _to_dataclasses(config)


def _with_defaults(choices: dict[str, str | None], keys: set[str]) -> dict[str, str | None]:
    """Choose the demonstration where no model is chosen, and no preset of what the user brings along."""
    demo = "experiment" not in choices and "model" not in choices and "model.path" not in keys
    if choices.get("experiment") is None:  # an experiment's presets stay: the path may be a local copy of theirs
        for group in ("model", "data"):
            if f"{group}.path" in keys and group not in choices:
                choices = {**choices, group: "custom"}
    return {**choices, "experiment": "demo"} if demo else choices


def group_choices(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names that ``group=NAME`` may choose from."""
    folders = [conf_dir() / group, *([Path(config_dir) / group] if config_dir else [])]
    return sorted(
        {str(file.relative_to(folder).with_suffix("")) for folder in folders for file in folder.rglob("*.yaml")}
    )


def _check_group(override: KeyOverride, config_dir: str | None) -> None:
    group, value = override.key, override.value
    if override.text.startswith("+"):
        raise UserError(f"{override.text}: write {override.text.lstrip('+')}, every group is there already")
    if value is None and group == "experiment":
        return
    name = value if isinstance(value, str) else override.text.partition("=")[2]
    if group in ("model", "data") and name not in group_choices(group, config_dir) and Path(name).exists():
        raise UserError(f"{group}={name}: chooses a preset by name, a path goes into {group}.path={name}")
    check_choice(group, name, group_choices(group, config_dir))


def _compose(choices: dict[str, str | None], config_dir: str | None) -> DictConfig:
    """Return the chosen groups' content, which the caller may change."""
    return copy.deepcopy(_composed(tuple(choices.items()), config_dir))


@functools.cache  # takes 0.3 s, and a plan, a bench and a sweep compose the same again and again
def _composed(choices: tuple[tuple[str, str | None], ...], config_dir: str | None) -> DictConfig:
    _register_schemas()
    overrides = [f"{group}={name}" for group, name in choices if name is not None]
    if config_dir is not None:
        address = f"file://{Path(config_dir).resolve()}".replace("\\", "\\\\").replace("'", "\\'")
        overrides.append(f"hydra.searchpath=['{address}']")
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        composed = compose("config", overrides)
    for group in SCHEMAS:
        if OmegaConf.get_type(composed, group) is dict:  # a user's own YAML file without its schema
            composed[group] = OmegaConf.merge(_schema_of(group, composed[group], group), composed[group])
    return composed


@functools.cache
def _register_schemas() -> None:
    """Tell Hydra the dataclasses, so that every value of every YAML file is checked against its type."""
    store = ConfigStore.instance()
    store.store(name="schema", node=_Schema)
    for group, classes in SCHEMAS.items():
        for name, schema in classes.items():
            store.store(group=group, name=f"schema_{name}", node=schema)


def _to_dataclasses(config: DictConfig) -> Config:
    composed = _one_sentence(lambda: OmegaConf.to_object(config))
    result = Config(**{field.name: getattr(composed, field.name) for field in fields(Config)})
    for group, classes in SCHEMAS.items():
        part = getattr(result, group)
        if type(part) is not classes.get(part.name):
            raise UserError(f"{group}.name={part.name}: is set by choosing {group}=NAME, one of {', '.join(classes)}")
    return result


def _one_sentence(build: Callable[[], T]) -> T:
    """Call ``build``; Hydra's and OmegaConf's errors of many lines become a :class:`UserError` of one sentence."""
    try:
        return build()
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_sentence(error)) from None
    except RecursionError:
        raise UserError("--config-dir: the defaults of a YAML file lead back to it; leave that out") from None


def _sentence(error: BaseException) -> str:
    """Return what is wrong in a YAML file: of a chain of errors one knows the key, and the first knows the file."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    lines = [str(link).strip().splitlines()[0].rstrip(".:") for link in chain]
    file = re.match(r"In '([^']+)'", lines[0])
    where = f" (in {file[1]}.yaml)" if file else ""
    if isinstance(chain[-1], yaml.MarkedYAMLError):
        return f"{chain[-1].problem_mark}: cannot be read as YAML, {chain[-1].problem}".strip()
    keyed = [link for link in chain if getattr(link, "full_key", None)]
    if not keyed:
        return lines[0]
    key = keyed[-1].full_key  # type: ignore[attr-defined]
    schema = OmegaConf.structured(Config)
    if isinstance(keyed[-1], ConfigKeyError | ConfigAttributeError):
        return f"{key}: there is no such key{where}{key_here(key) or nearest(key, all_keys(schema))}"
    if isinstance(keyed[-1], ValidationError) and key in all_keys(schema):
        return f"{key}: must be {describe_type(node_of(schema, key))}{where}"
    if isinstance(keyed[-1], InterpolationKeyError):
        return f"{key}: ${{NAME}} means a key, and there is none of that name; a variable of the shell is $NAME{where}"
    return f"{key}: {str(keyed[-1]).splitlines()[0]}{where}"


def to_yaml(config: Config, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings) -> str:
    """Return the configuration as YAML, keys as the user writes them; ``change`` is made to its values before."""
    return OmegaConf.to_yaml(_literal(change(asdict(config))))


def _literal(value: Any) -> Any:
    """Return a value, or a dataclass, whose texts OmegaConf takes as they are: ``${`` would mean a key."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if is_dataclass(value):
        value = copy.copy(value)  # with fields that its __init__ does not take
        vars(value).update(_literal(vars(value)))
    return value


def load_run(run_dir: str, overrides: list[str]) -> Config:
    """Return the configuration of a run directory with the overrides on top; ``run.dir`` is ``run_dir``.

    Raises:
        UserError: no run is there, or its config.yaml is no YAML or holds a key or a value that the dataclasses do not
            know, or an override is wrong or chooses a group, which a run has settled.
    """
    file = RunDirectory(Path(run_dir)).config
    if not file.is_file():
        raise UserError(f"run.dir={run_dir}: must be the directory of a run, which has a {file.name}")
    parsed = parse_overrides(overrides)
    for override in parsed:
        if override.key in GROUPS:
            raise UserError(f"{override.text}: the groups of a run that exists are settled, set single keys instead")
    return _with_keys(_read(file), [*parsed, _run_dir_override(run_dir)])


def _run_dir_override(run_dir: str) -> KeyOverride:
    return KeyOverride("run.dir", run_dir, f"run.dir={run_dir}")


def resume_run(run_dir: str, overrides: list[str], config_dir: str | None = None) -> Config:
    """Return the configuration with which training in ``run_dir`` goes on: that of the run, the overrides on top.

    A group whose name is the run's keeps the run's keys; another choice replaces it. An experiment is a whole
    configuration, so with one nothing is taken from the run. ``checkpoint.new_data`` holds for one start only.

    Raises:
        UserError: an override, or the run's config.yaml, is wrong.
    """
    parsed = parse_overrides(overrides)
    groups = {override.key: override.text for override in parsed if override.key in GROUPS}
    if any(override.key == "experiment" and override.value is not None for override in parsed):
        return load(overrides, config_dir)
    run = _to_dataclasses(_read(RunDirectory(Path(run_dir)).config))
    fresh = load(["model=custom", *groups.values()], config_dir)
    changes: dict[str, Any] = {}
    for group in groups.keys() - {"experiment"}:
        parts = VARIED.get(group, (group,))
        if any(_name_of(getattr(run, part)) != _name_of(getattr(fresh, part)) for part in parts):
            changes |= {part: getattr(fresh, part) for part in parts}
    config = OmegaConf.structured(_literal(replace(run, **changes)))
    config.checkpoint.new_data = False
    return _with_keys(config, [*parsed, _run_dir_override(run_dir)])


def _name_of(part: Any) -> str | None:
    return part if isinstance(part, str) else getattr(part, "name", None)


def vary(config: Config, overrides: list[str]) -> Config:
    """Return ``config`` with further overrides: single keys, and groups of VARIED chosen anew.

    A sampler that is chosen anew keeps the number of active blocks, the period and the seed where they are not those
    that ``config`` would have by its method and sampler alone; an optimizer likewise keeps all that optimizers share.

    Raises:
        UserError: an override is wrong, or chooses another group.
    """
    parsed = parse_overrides(overrides)
    chosen = [override for override in parsed if override.key in GROUPS]
    fresh = load(["model=custom", *(override.text for override in chosen)]) if chosen else config
    changes: dict[str, Any] = {}
    for override in chosen:
        if override.key not in VARIED:
            raise UserError(f"{override.text}: only {', '.join(VARIED)} can be varied among the groups, or single keys")
        changes |= {name: getattr(fresh, name) for name in VARIED[override.key]}
    for group, names in KEPT.items():
        # Of sampler=all the active blocks are no choice of the user's, and no other sampler's to keep.
        if group in changes and getattr(changes[group], "active_layers", 0) is not None:
            part = getattr(config, group)
            usual = getattr(load(["model=custom", f"method={config.method}", f"{group}={part.name}"]), group)
            kept = {name: getattr(part, name) for name in names if getattr(part, name) != getattr(usual, name)}
            changes[group] = replace(changes[group], **kept)
    return _with_keys(OmegaConf.structured(_literal(replace(config, **changes))), parsed)


def _read(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML, {str(error).splitlines()[0]}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: must hold a configuration, as the config.yaml of a run does")
    config = OmegaConf.structured(_Schema)
    for name, own in content.items():
        if own and not isinstance(own, Mapping) and is_dataclass(getattr(Config(), str(name), None)):
            raise UserError(f"{path}: {name!s}={own}: must hold keys, as in the config.yaml of a run")
    for group in SCHEMAS:
        config[group] = _schema_of(group, content.get(group) or {}, f"{path}: {group}")
    try:
        return _one_sentence(lambda: OmegaConf.merge(config, content))  # type: ignore[return-value]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _schema_of(group: str, content: Mapping[str, Any], key: str) -> DictConfig:
    """Return the defaults of what ``content`` names of a group of SCHEMAS; ``key`` is the group's in messages."""
    name = content.get("name", getattr(Config(), group).name)
    check_choice(f"{key}.name", name, SCHEMAS[group])
    return OmegaConf.structured(SCHEMAS[group][name])
