"""The specs of a GPU that a plan needs: one file of ``conf/gpu`` each."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import yaml

from lisa_dist.config.errors import UserError, nearest
from lisa_dist.config.loading import conf_dir
from lisa_dist.config.paths import local_path


@dataclass(frozen=True)
class Gpu:
    """What one GPU can do at most, in SI units, as its maker states it."""

    description: str
    matrix_flops: float  # dense bf16 operations a second
    memory_bytes: int
    memory_bandwidth: float  # bytes a second
    link_bandwidth_within_node: float  # to the other GPUs of its machine, bytes a second, one direction
    link_bandwidth_across_nodes: float  # its share of the machine's network, bytes a second, one direction
    host_bandwidth: float  # to and from host memory, bytes a second, one direction


def read_gpu(name: str) -> Gpu:
    """Return the specs of a preset of ``conf/gpu``, or those of a file ``*.yaml`` of the same keys.

    Raises:
        UserError: there is no such preset or file, or the file lacks a key.
    """
    presets = {file.stem: file for file in sorted((conf_dir() / "gpu").glob("*.yaml"))}
    path = presets.get(name, local_path(name))
    if path.suffix != ".yaml" or not path.is_file():
        raise UserError(
            f"plan.gpu={name}: must be one of {', '.join(presets)}, or a file of the same keys{nearest(name, presets)}"
        )
    try:
        specs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"plan.gpu={name}: cannot be read as YAML, {str(error).splitlines()[0]}") from None
    wanted = {field.name for field in fields(Gpu)}
    if not isinstance(specs, dict) or set(specs) != wanted:
        raise UserError(f"plan.gpu={name}: the file must have exactly the keys {', '.join(sorted(wanted))}")
    description = str(specs.pop("description"))
    try:
        numbers = {key: float(value) for key, value in specs.items()}
        possible = all(0 < number < math.inf for number in numbers.values())
    except (TypeError, ValueError):
        possible = False
    if not possible:
        raise UserError(f"plan.gpu={name}: every key but description must be a number above 0")
    return Gpu(description, memory_bytes=int(numbers.pop("memory_bytes")), **numbers)
