"""Answers by transformers' ``generate`` with its cache, and whether an architecture's cache can be trusted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from lisa_dist.config.errors import in_one_line
from lisa_dist.models.architecture import POSITION_FIELDS, original_class
from lisa_dist.models.masking import SAME
from lisa_dist.models.packed_attention import VARLEN
from lisa_dist.models.tiny_copy import FIRST_PLAIN_TOKEN, VOCABULARY, NoTinyCopyError, tiny_copy
from lisa_dist.runtime import distributed

CacheUse = Literal["batched", "single", "none"]  # several prompts together, one at a time, or no cache at all

Choose = Callable[[Tensor], Tensor]  # logits of the next token, [b, V], float32 -> the tokens, [b]
Ended = Callable[[list[int]], bool]  # whether an answer so far is the whole one

TRIED_PROMPTS = (21, 13)  # tokens: longer than the tiny copy's windows, and no multiple of them
TRIED_TOKENS = 4  # one that the prompt gives, the others by the cache
PADDING = 0  # any token: nothing looks at it


def generate_rows(
    model: Any,
    prompts: list[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    *,
    choose: Choose | None = None,
    ended: Ended | None = None,
    synced: bool = False,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Return the tokens that the model goes on with after each prompt, without the stopping one.

    Shorter prompts are padded at the left. Collective where the model is sharded: every rank, each with prompts of its
    own, ``synced`` and the same ``max_new_tokens``; a rank that is done goes on with the others until all are.

    Args:
        model: a causal language model in eval mode.
        prompts: at least one, none empty.
        stop_ids: tokens that end an answer.
        max_new_tokens: the longest answer.
        choose: what draws the next tokens; None: the most likely ones.
        ended: is asked after each token.
        synced: whether other ranks generate at the same time.
        streamer: is given the tokens of a single prompt as they come.
    """
    device = distributed.device()
    length = max(map(len, prompts))
    criteria = [] if ended is None else [_EndedRows(ended, length)]
    outputs = _generate(
        model,
        prompts,
        device,
        GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids) or None),
        logits_processor=LogitsProcessorList([] if choose is None else [_Chosen(choose)]),
        stopping_criteria=StoppingCriteriaList(criteria),
        synced_gpus=synced,
        streamer=streamer,
    )
    return [_until_stop(row, stop_ids, ended) for row in outputs[:, length:].tolist()]


def _until_stop(row: list[int], stop_ids: set[int], ended: Ended | None) -> list[int]:
    """Return a row up to its first stopping token, or to where it had ended: what follows is padding."""
    stop = next((place for place, token in enumerate(row) if token in stop_ids), len(row))
    if ended is None:
        return row[:stop]
    return row[: next((place for place in range(1, stop) if ended(row[:place])), stop)]


def _generate(
    model: Any, prompts: list[list[int]], device: torch.device, settings: GenerationConfig, **arguments: Any
) -> Any:
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), PADDING)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, length - len(ids) :] = torch.tensor(ids)
        mask[row, length - len(ids) :] = 1
    settings.update(do_sample=False, use_cache=True, pad_token_id=PADDING)
    # What a configuration says of penalties, temperatures and ends is not asked for here.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        return model.generate(
            input_ids.to(device), attention_mask=mask.to(device), generation_config=settings, **arguments
        )
    finally:
        model.generation_config = own


class _Chosen(LogitsProcessor):
    """Makes what ``choose`` draws the most likely token: transformers' own draws depend on the whole batch."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(1, self.choose(scores)[:, None], 0.0)  # type: ignore[return-value]


class _EndedRows(StoppingCriteria):
    def __init__(self, ended: Ended, prompt_length: int) -> None:
        self.ended, self.prompt_length = ended, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        answers = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.ended(row) for row in answers], device=input_ids.device)  # type: ignore[return-value]


@contextmanager
def answering(model: Any, kernel: str) -> Iterator[None]:
    """Put the model in eval mode, without gradients and with the attention kernel ``kernel``, while that lasts."""
    was_training, usual = model.training, model.config._attn_implementation
    model.eval()
    if kernel != usual:
        model.set_attn_implementation(kernel)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if kernel != usual:
            model.set_attn_implementation(usual)


def kernel_for_answers(model: Any) -> str:
    """Return the attention kernel to answer with: the model's, or transformers' choice where that is for packed rows.

    Which knows neither padding nor a cache.
    """
    if model.config._attn_implementation != VARLEN:
        return str(model.config._attn_implementation)
    return str(_without_weights(model, None).config._attn_implementation)


def _without_weights(model: Any, kernel: str | None) -> Any:
    config = copy.deepcopy(model.config)
    config._attn_implementation = kernel
    with torch.device("meta"):
        return original_class(model)._from_config(config, dtype=torch.float32)


def positions_of(architecture: PretrainedConfig) -> int | None:
    """Return how many positions the model was made for, None where its configuration does not say."""
    found = (getattr(architecture, name, None) for name in POSITION_FIELDS)
    return next((number for number in found if isinstance(number, int) and number > 0), None)  # XLNet says -1


def find_cache_use(model: Any, blocks_path: str, kernel: str) -> tuple[CacheUse, str]:
    """Return how ``generate`` may use its cache for ``model``, and why it may not do more.

    Two prompts are answered by a tiny copy of the architecture, together and one at a time; with the cache it must find
    the logits that it finds for the whole text. The copy is on the CPU unless the kernel needs this rank's device.
    Random states stay as they were.

    Args:
        model: on any device, sharded, quantised or with adapters as it may be.
        blocks_path: the dotted path of its stack of blocks.
        kernel: of attention.
    """
    try:
        small: Any = tiny_copy(_without_weights(model, kernel), blocks_path)
    except NoTinyCopyError as error:
        return "none", f"no tiny copy of it can be built to try ({error})"
    if kernel not in ("eager", "sdpa"):
        small.to(distributed.device())
    if "flash" in kernel:
        small.to(torch.bfloat16)
    reasons = []
    tried: tuple[CacheUse, ...] = ("batched", "single")
    for use in tried:
        try:
            difference = _cached_difference(small, together=use == "batched")
        except Exception as error:  # whatever a foreign forward raises at what it does not expect
            reasons.append(in_one_line(error) or type(error).__name__)
            continue
        if difference < SAME[small.dtype]:
            return use, reasons[0] if reasons else ""
        reasons.append(f"a tiny copy's logits differ by {difference:.2g} standard deviations")
    return "none", reasons[-1]


def _cached_difference(small: Any, together: bool) -> float:
    """Return the largest difference that the cache makes to logits, in their standard deviations."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (length,), generator=generator).tolist()
        for length in TRIED_PROMPTS
    ]
    largest = 0.0
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        settings = GenerationConfig(max_new_tokens=TRIED_TOKENS, return_dict_in_generate=True, output_logits=True)
        found = _generate(small, batch, small.device, settings)
        for prompt, row, logits in zip(batch, found.sequences, torch.stack(found.logits, dim=1)):
            text = row[-len(prompt) - TRIED_TOKENS :]
            with torch.no_grad():
                whole = small(input_ids=text[None], use_cache=False).logits[0].float()
            expected = whole[-TRIED_TOKENS - 1 : -1]
            difference = (logits.float() - expected).abs().max() / expected.std()
            largest = max(largest, float(difference)) if difference.isfinite() else float("inf")
    return largest
