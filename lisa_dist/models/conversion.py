"""Between the names of a checkpoint and those of the model: transformers 5 renames, fuses and splits at load.

Its tables of conversions (``transformers.conversion_mapping``) are used tensor by tensor, so that no more than one
converted tensor is in memory at a time. Every use of that internal interface is in this file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lisa_dist.models.architecture import meta_replica


@dataclass
class WeightSource:
    """Where one parameter comes from: a tensor of the checkpoint, or several through a conversion.

    With a conversion that fuses one tensor an expert along the first dimension (``by_expert``), any range of experts
    can be made from their tensors alone.
    """

    converter: Any = None  # transformers' WeightConverter
    names: dict[str, list[str]] = field(default_factory=dict)  # the converter's pattern -> tensors of the checkpoint

    @property
    def name(self) -> str:
        """The only tensor, where there is no conversion."""
        return next(iter(self.names.values()))[0]

    @property
    def all_names(self) -> list[str]:
        """Every tensor that it is made of."""
        return [name for names in self.names.values() for name in names]

    @property
    def by_expert(self) -> bool:
        """Whether the first dimension counts tensors of the checkpoint, untouched by the later operations."""
        first, *rest = self.converter.operations
        return isinstance(first, MergeModulelist) and first.dim == 0 and all(getattr(op, "dim", 0) > 0 for op in rest)

    def convert(self, target: str, replica: Any, read: Callable[[str], Tensor], experts: slice) -> dict[str, Tensor]:
        """Return the converted tensors by name, made from the ``experts`` of each list of tensors."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.names.items():
            for name in names[experts]:
                converter.add_tensor(target, name, pattern, read(name))
        return converter.convert(target, model=replica, config=replica.config)


def find_sources(replica: Any, checkpoint_names: Iterable[str]) -> tuple[dict[str, WeightSource], list[str]]:
    """Map each name of the model to its source; also return the checkpoint's names that the model has no place for.

    ``replica`` is the unsharded model on meta; its names and shapes decide. A source with a conversion to several
    parameters is found under the first one's name.
    """
    transforms = get_model_conversion_mapping(replica)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    ours = replica.state_dict()
    sources: dict[str, WeightSource] = {}
    unexpected: list[str] = []
    for name in sorted(checkpoint_names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, replica.base_model_prefix, ours)
        if target not in ours and name in ours:
            target, pattern = name, None
        if target not in ours:
            if not _is_ignored(replica, target):
                unexpected.append(name)
            continue
        source = sources.setdefault(target, WeightSource(None if pattern is None else by_pattern[pattern]))
        source.names.setdefault(pattern or "", []).append(name)
    return sources, unexpected


def tied_names(replica: Any) -> dict[str, str]:
    """Return, for each further name of a shared parameter, the first one."""
    first = {id(parameter): name for name, parameter in replica.named_parameters()}
    every = replica.named_parameters(remove_duplicate=False)
    return {alias: first[id(parameter)] for alias, parameter in every if alias != first[id(parameter)]}


def join_tied(replica: Any, sources: dict[str, WeightSource]) -> None:
    """Let a shared weight be read under either of its names, and once."""
    for alias, name in tied_names(replica).items():
        if alias in sources:
            source = sources.pop(alias)
            sources.setdefault(name, source)


def export_conversion(model: nn.Module) -> Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]:
    """Return the way back: a function from a parameter's name and full tensor to the checkpoint's names and tensors.

    Fused experts are split again, one by one, into tensors of their own. A parameter that a checkpoint holds joined
    with others keeps its own name and shape, which transformers reads as well. Copies are made one at a time.
    """
    replica = meta_replica(model)
    reverse = [transform.reverse_transform() for transform in get_model_conversion_mapping(replica, add_legacy=False)]
    joined = [c for c in reverse if isinstance(c, WeightConverter) and len(c.source_patterns) > 1]

    def to_checkpoint(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if any(converter.rename_source_key(name)[1] is not None for converter in joined):
            yield name, tensor
            return
        for target, value in revert_weight_conversion(replica, {name: tensor}).items():
            yield target, value if value is tensor else value.clone().contiguous()

    return to_checkpoint


def _is_ignored(replica: Any, name: str) -> bool:
    """Whether a tensor is left over from older versions of the model and carries nothing."""
    patterns = [*(replica._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    return any(re.search(pattern, name) for pattern in patterns)
