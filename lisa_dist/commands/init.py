"""``lisa-dist init``: a configuration file to begin with, every key of training in it with what it means."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.loading import load
from lisa_dist.config.overrides import SCHEMAS
from lisa_dist.config.paths import BUILTIN_PREFIX, local_path
from lisa_dist.config.reference import keys_in
from lisa_dist.runtime.files import write_atomically

# What nearly every run sets, written even where it has its default; the keys of other parts are written as comments.
USUAL = (
    *("model.path", "data.path", "data.validation", "data.sequence_length", "sampler.active_layers", "sampler.period"),
    *("optimizer.lr", "train.max_steps", "train.epochs", "train.global_batch_size", "train.micro_batch_size"),
)
HEAD = """# Train with it: lisa-dist train {name}; on the command line key=value comes before what stands here.
# A key that is commented out has the value that stands there. `lisa-dist plan {name}` says whether it fits the GPU.
"""


def run(config: Config, file: str, groups: tuple[str, ...]) -> int:
    """Write the configuration as a commented YAML file.

    Args:
        config: the values that are written.
        file: where; nothing is written over.
        groups: the groups of keys to write, in this order.

    Raises:
        UserError: the file is there already, or can't be written.
    """
    path = local_path(file)
    if path.is_symlink() or path.exists():  # a link may lead nowhere
        raise UserError(f"{file}: is there already and is not written over, name another file: lisa-dist init NAME")
    chosen = [f"{group}={getattr(config, group).name}" for group in SCHEMAS]
    plain = load(["model=custom", "data=custom", f"method={config.method}", *chosen])
    sections = (_section(getattr(config, group), getattr(plain, group), group) for group in groups)
    text = "\n".join([HEAD.format(name=file), f"method: {config.method}\n", *sections])
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror or error})") from error
    named = {"model.path": config.model.path, "data.path": config.data.path}
    left = [key for key, value in named.items() if value is None or value.startswith(BUILTIN_PREFIX)]
    todo = f"set {' and '.join(left)} in it to your own, then: " if left else "next: "
    print(f"wrote {file}; {todo}lisa-dist train {shlex.quote(file)}")
    return EXIT_DONE


def _section(part: object, plain: object, group: str) -> str:
    """Return a group as YAML: as keys what is usual, or not what the choices above it give; the rest as comments."""
    lines = [f"{group}:"]
    for key in keys_in(part, f"{group}."):
        own = key.name.removeprefix(f"{group}.")
        value = _value(part, own)
        chooses = own == "name" and group in SCHEMAS
        if own == "name" and group in ("model", "data"):
            continue  # of a preset, for records
        mark = "" if chooses or key.name in USUAL or value != _value(plain, own) else "# "
        written = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n")
        lines.append(f"  {mark}{own}: {written.removesuffix('...').strip()}  # {key.meaning}")
    return "\n".join(lines) + "\n"


def _value(part: object, name: str) -> Any:
    for attribute in name.split("."):
        part = getattr(part, attribute)
    return part
