"""Which options go together, found by asking ``checks.py`` and ``idle_options.py`` for every pair: for the docs.

``python -m lisa_dist.config.combinations > docs/combinations.md`` writes the page of the docs anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_accumulation, check_combinations
from lisa_dist.config.errors import as_written
from lisa_dist.config.idle_options import options_without_effect
from lisa_dist.config.overrides import SCHEMAS

INTRODUCTION = """# What goes with what

Every pair of the options below, as the checks before a start judge it. This page is written by
`python -m lisa_dist.config.combinations > docs/combinations.md`, which asks `checks.py` and `idle_options.py` of
`lisa_dist/config`: change those and run the command again.

*Refused* means exit code 2 and the sentence below, before anything is loaded; *no effect* is said when training starts,
and in the notes of a plan; ✓ works. Where nothing else is said, a pair stands beside `sampler=uniform`,
`update=full_rank` (`lora` with quantised weights), and 4 ranks in two replicas. What depends on the model (tied
weights, attention of packed samples, kernels) is told when it is read.
"""
YES, ABSENT = "✓", ""  # works; the key does not exist there

Option = dict[str, Any]  # keys as the user writes them -> values; the first is the option, the others what it needs

# Two replicas of two ranks, one micro-batch of each rank a step: so that nothing is without effect by itself.
RANKS = 4
USUAL: Option = {
    "sampler": "uniform",
    "update": "full_rank",
    "optimizer": "adamw",
    "optimizer.grad_clip": 0.0,
    "parallel.replicate": 2,
    "train.global_batch_size": RANKS,
}
_ACCUMULATION: Option = {"train.global_batch_size": 2 * RANKS}
_NON_BLOCK: Option = {"always_active.embeddings": False, "always_active.head": False}
_BLOCK_MAJOR: Option = {"parallel.offload": "frozen", "parallel.replicate": 1, **_ACCUMULATION}
KEYS: list[Option] = [
    {"model.quantization": "nf4", "update": "lora"},
    {"update.dora": True},
    {"sampler.law": "weight_norm"},
    {"sampler.non_block_modules": True, **_NON_BLOCK},
    {"optimizer.in_backward": True},
    {"optimizer.state_on_freeze": "offload"},
    {"optimizer.grad_clip": 1.0},
    {"parallel.optimizer_shard": "world"},
    {"parallel.offload": "frozen"},
    {"parallel.offload": "all"},
    {"parallel.replicate": RANKS},
    {"parallel.block_major": True, **_BLOCK_MAJOR},
    {"parallel.offload_activations": True, "parallel.block_major": True, **_BLOCK_MAJOR},
    {"parallel.reshard_after_forward": False},
    {"parallel.prefetch": 2},
    {"parallel.defer_reduction": True, **_ACCUMULATION},
    _ACCUMULATION,
    {"train.on_nonfinite": "skip"},
    {"precision.frozen": "float32"},
    {"precision.on_freeze": "nearest"},
    {"data.packing": True},
    {"data.group_by_length": True},
    {"data.format": "text"},
    {"data.train_on_prompt": True},
]


def page() -> str:
    """Return docs/combinations.md."""
    reasons: list[str] = []
    lines = [INTRODUCTION]
    for group in ("update", "sampler"):
        names: list[Option] = [{group: name} for name in SCHEMAS[group]]
        lines += [f"## {group}=NAME", "", f"| | {' | '.join(SCHEMAS[group])} |", "| --- " * (len(names) + 1) + "|"]
        for key in KEYS:
            cells = [_cell(name, key, reasons) for name in names]
            if any(cell not in (YES, ABSENT) for cell in cells) or ABSENT in cells:
                lines.append(f"| {_label(key)} | {' | '.join(cells)} |")
        lines += ["", "All other keys of the last table go with each of them.", ""]
    lines += ["## Pairs of keys", "", "All pairs of the keys below go together but these:", ""]
    lines += ["| | with | |", "| --- | --- | --- |"]
    for number, one in enumerate(KEYS):
        for other in KEYS[number + 1 :]:
            cell = _cell(one, other, reasons)
            if cell not in (YES, ABSENT):
                lines.append(f"| {_label(one)} | {_label(other)} | {cell} |")
    lines += ["", f"The keys: {', '.join(_label(key) for key in KEYS)}.", "", "## What is said", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join(lines) + "\n"


def judge(one: Option, other: Option) -> tuple[str, str] | None:
    """Return how two options go together, ``refused`` or ``no effect`` (empty: they do), and the sentence for it.

    None where a key is not one of the sampler, the update or the optimizer that is chosen.
    """
    if next(iter(one)) == next(iter(other)):  # two values of one key
        return "", ""
    # Keys that belong to one name of a group are tried with that name; a name that is asked for counts more.
    both = {**_owner(one), **_owner(other), **other, **one}
    try:
        config = _with({**USUAL, **both})
        if config is None:
            return None
        check_combinations(config)
        check_accumulation(config, RANKS)
    except UserError as error:
        return "refused", str(error)
    alone = {sentence for option in (one, other) for sentence in _idle({**USUAL, **_owner(option), **option})}
    idle = [sentence for sentence in _idle({**USUAL, **both}) if sentence not in alone]
    return ("no effect", "; ".join(idle)) if idle else ("", "")


def _owner(option: Option) -> Option:
    """Return the name that has the keys of an option, where the usual one of their group has not."""
    for key in option:
        group, _, name = key.partition(".")
        if name and group in SCHEMAS and not _has(SCHEMAS[group][USUAL[group]], name):
            return {group: next(choice for choice, schema in SCHEMAS[group].items() if _has(schema, name))}
    return {}


def _idle(option: Option) -> list[str]:
    config = _with(option)
    return [] if config is None else options_without_effect(config, RANKS)


def _with(option: Option) -> Config | None:
    """Return the configuration with these keys, names of a group first; None where a key is not there."""
    config = Config(method="full")  # which is named only where everything trains
    for key, value in sorted(option.items(), key=lambda item: "." in item[0]):
        group, _, name = key.partition(".")
        if not name:
            config = dataclasses.replace(config, **{group: SCHEMAS[group][value]()})
        elif not _has(type(getattr(config, group)), name):
            return None
        else:
            config = dataclasses.replace(
                config, **{group: dataclasses.replace(getattr(config, group), **{name: value})}
            )
    return config


def _has(schema: type[Any], name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(schema))


def _cell(one: Option, other: Option, reasons: list[str]) -> str:
    """Return a cell of a table, and add its sentence to ``reasons`` where it is a new one."""
    judged = judge(one, other)
    if judged is None:
        return ABSENT
    verdict, reason = judged
    if not verdict:
        return YES
    if reason not in reasons:
        reasons.append(reason)
    return f"{verdict} ({reasons.index(reason) + 1})"


def _label(option: Option) -> str:
    key, value = next(iter(option.items()))
    if option == _ACCUMULATION:
        return "several micro-batches a step"
    return f"`{key}={'RANKS' if key == 'parallel.replicate' else as_written(value)}`"


if __name__ == "__main__":
    print(page(), end="")
