"""Packed samples kept apart, by borders, by positions or by attention masks; found by trying on a tiny copy."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

from lisa_dist.config import UserError
from lisa_dist.config.errors import in_one_line
from lisa_dist.models.architecture import POSITION_FIELDS, head_size
from lisa_dist.models.packed_attention import VARLEN, fits_flash
from lisa_dist.models.tiny_copy import FIRST_PLAIN_TOKEN, POSITIONS, VOCABULARY, NoTinyCopyError, tiny_copy
from lisa_dist.runtime import distributed

Separation = Literal["borders", "positions", "mask"]  # what keeps packed samples apart

BY_BORDERS = (VARLEN, "flash_attention_2")  # kernels that are told the borders, and need no mask

PACKED_MASKS = ("eager", "sdpa", "flex_attention")  # kernels whose masks can tell samples apart
SAMPLE_TOKENS = (21, 13)  # longer than the tiny copy's windows, and no multiple of them
PADDING = 6
REMEDY = "use data.packing=false"
# Differences in standard deviations of the logits: rounding gives up to 1e-4 in float32 and 0.1 in bfloat16, a sample
# in sight 0.3 to 6.
SAME = {torch.float32: 2e-3, torch.bfloat16: 0.2}
SEEN = 0.2


@contextmanager
def one_sample_a_row() -> Iterator[None]:
    """Let transformers build its masks without a look at the positions, which tell it where packed samples begin.

    The host would wait for its device to know them. Of fake tensors they are never known, so that a row would be taken
    for packed, and with an explicit mask keys and values be repeated for every query head.
    """
    with _packed_indices(lambda position_ids: None):
        yield


@contextmanager
def _packed_indices(find: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Let transformers find by ``find`` which sample each token is of."""
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = find
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _sample_of_each_token(position_ids: Tensor) -> Tensor:
    """Return the number of its sample in its row for each token, [b, t]: one begins where positions don't count on."""
    return (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


def takes_positions(model: Any) -> bool:
    """Whether ``model`` or its decoder names ``position_ids`` among the arguments of its forward pass."""
    return any("position_ids" in inspect.signature(part.forward).parameters for part in (model, model.base_model))


def has_table_of_positions(model: Any, blocks_path: str) -> bool:
    """Whether ``model`` can be given no longer rows than its configuration says; tried on a tiny copy with short ones.

    False too where no tiny copy can be built.
    """
    model.config = copy.deepcopy(model.config)
    model.config._attn_implementation = "eager"  # the copy is on the CPU
    for name in POSITION_FIELDS:
        if hasattr(model.config, name):
            setattr(model.config, name, POSITIONS)
    try:
        small = tiny_copy(model, blocks_path)
    except NoTinyCopyError:
        return False

    def reads(tokens: int) -> bool:
        row = torch.arange(tokens)[None]
        try:
            _logits(small, row, row if takes_positions(small) else None)
        except Exception:  # whatever a foreign forward pass raises
            return False
        return True

    return reads(POSITIONS // 2) and not reads(POSITIONS + 1)


def install_position_handling(model: nn.Module, separation: Separation | None) -> None:
    """Let ``model(position_ids=...)`` do what is right whatever the architecture makes of positions.

    Where nothing is packed, and to a model that takes none, they are not given: each counts its tokens in its own way
    (RoBERTa from 2, others not at all), and that is what its weights know. Nor are they looked at then. Call it before
    ``fully_shard`` and after :func:`~lisa_dist.objectives.chunked_head.install_loss_head`.

    ``separation`` is what keeps packed samples apart; None: nothing is packed. ``borders`` gives the kernel
    ``cu_seqlens`` under the names that transformers has for it; ``mask`` also narrows every mask that the model builds
    to pairs of tokens of one sample, [b, 1, t, t]. With the last two the borders are not looked at. A pass
    with a cache is transformers' ``generate``, which packs nothing: it gets the positions that are given, which leave
    padding at the left out.
    """
    original = model.forward
    passes_positions = separation is not None and takes_positions(model)

    @functools.wraps(original)
    def forward(*args: Any, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, **kwargs: Any) -> Any:
        if kwargs.get("use_cache"):
            given = {} if position_ids is None else {"position_ids": position_ids}
            return original(*args, **given, **kwargs)
        if separation is None:
            with one_sample_a_row():
                return original(*args, **kwargs)
        if position_ids is not None and passes_positions:
            kwargs["position_ids"] = position_ids
        if position_ids is None:
            return original(*args, **kwargs)
        if separation == "borders":
            if cu_seqlens is not None:
                longest = position_ids.shape[1]  # not the longest sample: graphs of torch.compile depend on it
                kwargs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
                kwargs |= {"max_length_q": longest, "max_length_k": longest}
            return original(*args, **kwargs)
        # On a GPU transformers would wait for it to know whether there is more than one sample.
        unseen = _packed_indices(_sample_of_each_token) if position_ids.is_cuda else nullcontext()
        with unseen, _samples_apart(position_ids) if separation == "mask" else nullcontext():
            return original(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]


@contextmanager
def _samples_apart(position_ids: Tensor) -> Iterator[None]:
    """Narrow every mask that transformers builds meanwhile to pairs of tokens of one sample.

    The masks stay the model's own (causal, windows, the kernel's dtype and polarity); transformers' table of mask
    builders lets one user replace entries of it
    (https://huggingface.co/docs/transformers/main/en/attention_interface#attention-mask-interface). A sample begins
    wherever the positions, [b, t], do not count on.
    """
    same_sample = masking_utils.packed_sequence_mask_function(_sample_of_each_token(position_ids))
    builders = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    replaced = {name: builders[name] for name in PACKED_MASKS}

    def narrowed(build: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(build)
        def build_narrowed(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> Any:
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return build(*args, mask_function=masking_utils.and_masks(mask_function, same_sample), **kwargs)

        return build_narrowed

    for name, build in replaced.items():
        builders[name] = narrowed(build)
    try:
        yield
    finally:
        for name, build in replaced.items():
            builders[name] = build


def kernels_without_mask(model: nn.Module, wanted: str, *, halved: bool, compiled: bool) -> list[str]:
    """Return the kernels for packed rows that need no dense mask and may run here, the one to be preferred first.

    Args:
        model: whose attention it is.
        wanted: ``model.attention``, ``auto`` or ``varlen``.
        halved: whether it computes in bfloat16, which flash kernels need.
        compiled: whether blocks are compiled; on a CPU ``varlen`` reads the borders, which a graph can't.
    """
    architecture: Any = model.config
    if distributed.device().type != "cuda":
        found = [VARLEN] if wanted == VARLEN or not (compiled or _drops_attention(architecture)) else []
    else:
        size = head_size(architecture)
        if size is None:
            return []
        flash = halved and fits_flash(size) and not _drops_attention(architecture)
        has_package = importlib.util.find_spec("flash_attn") is not None
        found = [VARLEN] * flash + ["flash_attention_2"] * (halved and has_package) + ["flex_attention"]
    return [kernel for kernel in found if wanted in ("auto", kernel)]


def _drops_attention(architecture: Any) -> bool:
    """Whether attention has dropout, which torch's kernel for borders has not."""
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
    return any(getattr(architecture, name, None) for name in names)


def rotary_limits(architecture: Any) -> dict[str, int]:
    """Return above how many tokens of the longest row rotary frequencies follow it for all rows, by the kind of them.

    Empty where they never do.
    """
    found = getattr(architecture, "rope_parameters", None) or {}
    limits: dict[str, int] = {}
    for rotary in (found, *(kind for kind in found.values() if isinstance(kind, dict))):
        kind = str(rotary.get("rope_type"))
        if kind == "longrope" and rotary.get("short_factor") != rotary.get("long_factor"):
            limit = rotary.get("original_max_position_embeddings") or architecture.max_position_embeddings
            limits[f"rope_type={kind}"] = limit
        elif "dynamic" in kind:
            limits[f"rope_type={kind}"] = architecture.max_position_embeddings
    return limits


def check_length_of_rows(architecture: Any, tokens: int) -> None:
    """Refuse packed rows of so many ``tokens`` where a sample's numbers would depend on what else is in its row.

    A tiny copy's samples are too short to show it.

    Raises:
        UserError: rotary frequencies follow the longest sample of a micro-batch, or queries are scaled by their places
            in the row.
    """
    limits = rotary_limits(architecture)
    if getattr(architecture, "attn_temperature_tuning", False):
        limits["attn_temperature_tuning"] = architecture.floor_scale - 1
    for name, limit in limits.items():
        if tokens > limit:
            raise UserError(
                f"data.packing=true: rows of more than {limit} tokens give a packed sample other numbers than alone "
                f"in this model ({name} of its config.json); {REMEDY}, or data.sequence_length={limit}"
            )


def find_separation(model: Any, blocks_path: str, kernel: str | None = None) -> Separation:
    """Return what keeps packed samples apart in ``model``: borders, position ids alone, or a dense mask beside them.

    Two samples are packed behind one another through a tiny copy of the architecture, in both orders; each must get
    the numbers that it gets alone by the model's own attention kernel. The copy runs on the CPU; with kernels that need
    it on this rank's device, and in bfloat16 with the flash kernels. Random states stay as they were.

    Args:
        model: as transformers builds it, on any device, without adapters.
        blocks_path: the dotted path of its stack of blocks.
        kernel: for packed rows; None: the model's own.

    Raises:
        UserError: neither keeps them apart, or that can't be tried.
    """
    name = type(model).__name__
    untried = f"data.packing=true: whether {name} keeps packed samples apart can't be tried"
    try:
        small = tiny_copy(model, blocks_path)
    except NoTinyCopyError as error:
        raise UserError(f"{untried}, since no tiny copy of it can be built ({error}); {REMEDY}") from error
    own = str(small.config._attn_implementation)
    if (kernel or own) not in ("eager", "sdpa"):
        small.to(distributed.device())  # type: ignore[arg-type]
    if (kernel or own) in BY_BORDERS and distributed.device().type == "cuda":
        small.to(torch.bfloat16)  # type: ignore[arg-type]
    found: dict[Separation, float | str] = {}
    tried: tuple[Separation, ...] = ("borders", "positions") if (kernel or own) in BY_BORDERS else ("positions", "mask")
    for separation in tried:
        original = small.forward
        install_position_handling(small, separation)
        found[separation] = difference = _tried(small, kernel)
        small.forward = original  # type: ignore[method-assign]
        if isinstance(difference, float) and difference < SAME[small.dtype]:
            return separation
    reasons = [reason if isinstance(reason, str) else f"a difference of {reason:.2g}" for reason in found.values()]
    if all(isinstance(reason, str) for reason in found.values()):
        raise UserError(f"{untried}: a tiny copy of it gives {reasons[-1]}; {REMEDY}")
    raise UserError(
        f"data.packing=true: {name} does not keep packed samples apart: in a tiny copy of it a sample packed behind "
        f"another gets other numbers than alone ({'; with an explicit mask '.join(reasons)}); {REMEDY}"
    )


def _tried(small: Any, kernel: str | None) -> float | str:
    """Return the largest difference between packed and alone, or in words why there is none to be trusted."""
    try:
        alone = [_logits(small, sample[None])[0] for sample in _samples()]
        if kernel is not None:
            verbosity = transformers.logging.get_verbosity()
            transformers.logging.set_verbosity_error()  # that it can't be set shows in the numbers
            try:
                small.set_attn_implementation(kernel)
            finally:
                transformers.logging.set_verbosity(verbosity)
        difference, joined = packed_difference(small, alone), packed_difference(small, alone, joined=True)
    except Exception as error:  # whatever a foreign forward pass raises
        return f"{type(error).__name__}: {in_one_line(error)}"
    if not difference < float("inf"):
        return "no finite numbers"
    if joined < SEEN:
        return "a tiny copy in which no token sees another"
    return difference


@torch.no_grad()
def packed_difference(model: Any, alone: list[Tensor], *, joined: bool = False) -> float:
    """Return by how much the logits of packed samples differ from those ``alone``, at most, in standard deviations.

    With ``joined``, positions and borders are given as if all samples of a row were one.
    """
    samples = _samples()
    orders = [[0, 1], [1, 0]]
    rows = [torch.cat([*(samples[index] for index in order), samples[0][:PADDING]]) for order in orders]
    lengths = [[len(samples[order[0]]), len(samples[order[1]]) + PADDING] for order in orders]
    positions = [torch.cat([torch.arange(size) for size in sizes]) for sizes in lengths]
    if joined:
        positions = [torch.arange(len(row)) for row in rows]
        lengths = [[len(row)] for row in rows]
    borders = torch.tensor([0, *(size for sizes in lengths for size in sizes)]).cumsum(0).int()
    packed = _logits(model, torch.stack(rows), torch.stack(positions), borders)
    largest = 0.0
    for row, order in zip(packed, orders):
        expected = torch.cat([alone[index] for index in order])
        difference = (row[: len(expected)] - expected).abs().max() / expected.std()
        largest = max(largest, difference.item()) if difference.isfinite() else float("inf")
    return largest


def _samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (size,), generator=generator) for size in SAMPLE_TOKENS]


@torch.no_grad()
def _logits(
    model: Any, input_ids: Tensor, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    given = {"input_ids": input_ids, "position_ids": position_ids, "cu_seqlens": cu_seqlens}
    inputs = {name: tensor.to(model.device) for name, tensor in given.items() if tensor is not None}
    return model(**inputs, use_cache=False).logits.float().cpu()
